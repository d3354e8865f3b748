// Op gate: sqrt(softplus(x W^T)), the best k experts or those of a token's id, their weights.
//
// Up to four tokens: one kernel, a cluster that holds the matrix before the tokens are there; its blocks
// send their scores to the first one, which chooses. More: a matrix product (op linear), then a kernel
// that chooses.

#include <assert.h>

#include "dispatch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;

// log(1 + e^x), and x itself where float32 cannot tell them apart, as torch does.
__device__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }
__device__ float score_of(float x) { return sqrtf(softplus(x)); }

// A number whose order as an unsigned integer is the float's order; NaN comes last, as the largest.
__device__ uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return isnan(x) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// How experts are chosen, and where to.
struct Choice {
    const float* bias;    // [count] or null
    const void* tid2eid;  // [vocabulary, k] int32 or int64, or null
    int tid2eid_bytes;
    int64_t vocabulary;
    const int64_t* tokens;
    int k;
    float scale;
    float* routing;   // [n, k]
    int32_t* chosen;  // [n, k]

    __device__ uint32_t rank(float score, int expert) const {
        return ordered(bias == nullptr ? score : score + bias[expert]);
    }
    __device__ int by_token(int64_t row, int slot, int count) const {
        const int64_t token = tokens[row], at = token * k + slot;
        assert(token >= 0 && token < vocabulary && "gate: a token id is outside tid2eid");
        const int64_t expert =
            tid2eid_bytes == 8 ? ((const int64_t*)tid2eid)[at] : ((const int32_t*)tid2eid)[at];
        assert(expert >= 0 && expert < count && "gate: tid2eid names no expert");
        return (int)expert;
    }
};

// One warp chooses for token `row`, whose scores lie in plain [32 * kEach] (shared memory); left: ranks of
// experts lane + 32 j, 0 behind the last one.
template <int kEach>
__device__ void choose(const Choice& to, int64_t row, int count, const float* plain,
                       uint32_t (&left)[kEach]) {
    const int lane = threadIdx.x % 32;
    int mine = 0;  // the expert in slot `lane`
    if (to.tid2eid != nullptr) {
        if (lane < to.k) mine = to.by_token(row, lane, count);
    } else {
        for (int i = 0; i < to.k; i++) {
            uint32_t best = 0, at = 0;
#pragma unroll
            for (int j = kEach - 1; j >= 0; j--)
                if (left[j] >= best) best = left[j], at = j;  // the lowest of equal ones
            uint32_t top = __reduce_max_sync(~0u, best);
            uint32_t first = __reduce_min_sync(~0u, best == top ? lane + 32 * at : ~0u);
#pragma unroll
            for (int j = 0; j < kEach; j++)
                if (lane + 32 * j == first) left[j] = 0;
            if (lane == i) mine = first;
        }
    }
    float score = lane < to.k ? plain[mine] : 0, sum = 0;
    for (int i = 0; i < to.k; i++) sum += __shfl_sync(~0u, score, i);
    if (lane < to.k) {
        to.routing[row * to.k + lane] = score / sum * to.scale;
        to.chosen[row * to.k + lane] = mine;
    }
}

// ---------------------------------------------------------------- many tokens

// One block a token. scores [n, count] holds x W^T and receives the scores.
template <int kEach>
__global__ void __launch_bounds__(kThreads) gate_kernel(float* scores, int count, Choice to) {
    __shared__ float plain[32 * kEach];
    __shared__ uint32_t rank[32 * kEach];
    let_next_start();
    wait_for_previous();
    scores += blockIdx.x * (int64_t)count;
    for (int e = threadIdx.x; e < 32 * kEach; e += kThreads) {
        float score = e < count ? score_of(scores[e]) : 0;
        if (e < count) scores[e] = score;
        plain[e] = score;
        rank[e] = e < count ? to.rank(score, e) : 0;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    uint32_t left[kEach];
#pragma unroll
    for (int j = 0; j < kEach; j++) left[j] = rank[threadIdx.x + 32 * j];
    choose<kEach>(to, blockIdx.x, count, plain, left);
}

// ---------------------------------------------------------------- few tokens

constexpr int kBlocks = 16;                          // of the cluster
constexpr int kFewThreads = 512, kRows = kFewThreads / 32;  // one row of the matrix a warp
constexpr int kFewTokens = 4, kMostExperts = kBlocks * kRows;
constexpr int kWidest = 4096;                        // columns

struct Few {
    const bf16 *x, *weight;  // [n, d], [count, d]
    int n, d, count;
    float* scores;  // [n, count]
};

// The product of eight bf16 with eight others.
__device__ float dot(const uint4& a, const uint4& b) {
    const auto &x = reinterpret_cast<const Vector<bf16>&>(a), &y = reinterpret_cast<const Vector<bf16>&>(b);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += to_float(x.at[j]) * to_float(y.at[j]);
    return sum;
}

// Writes to the same variable of the cluster's first block.
__device__ void send_to_first(float* at, float value) {
    asm volatile("{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %0, 0;\n"
                 "st.shared::cluster.f32 [remote], %1;\n}" ::"r"(
                     (uint32_t)__cvta_generic_to_shared(at)),
                 "f"(value)
                 : "memory");
}

__global__ void __launch_bounds__(kFewThreads, 2) gate_few_kernel(const Few p, const Choice to) {
    extern __shared__ __align__(16) uint4 matrix[];  // [kRows][d / 8], then tokens [n][d / 8]
    __shared__ float plain[kFewTokens][kMostExperts], bias[kMostExperts];
    constexpr int kEach = kMostExperts / 32;
    let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = p.d / 8;
    const int expert = blockIdx.z * kRows + warp;
    uint4 *row = matrix + warp * vectors, *x = matrix + kRows * vectors;
    for (int v = lane; v < vectors; v += 32)
        copy_async(row + v, p.weight + expert * (int64_t)p.d + v * 8, expert < p.count);
    commit_copies();
    if (to.bias != nullptr && threadIdx.x < p.count) bias[threadIdx.x] = to.bias[threadIdx.x];
    cluster_barrier();  // all blocks have begun, so that the first one can be written to
    wait_for_previous();
    for (int i = threadIdx.x; i < p.n * vectors; i += kFewThreads) x[i] = ((const uint4*)p.x)[i];
    wait_for_copies<0>();
    __syncthreads();
    for (int t = 0; t < p.n; t++) {
        float sum = 0;
#pragma unroll 4
        for (int v = lane; v < vectors; v += 32) sum += dot(row[v], x[t * vectors + v]);
        const float score = score_of(warp_sum(sum));
        if (lane == 0 && expert < p.count) {
            p.scores[t * (int64_t)p.count + expert] = score;
            send_to_first(&plain[t][expert], score);
        }
    }
    cluster_barrier();
    if (blockIdx.z > 0 || warp >= p.n) return;
    uint32_t left[kEach];
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int e = lane + 32 * j;
        const float score = e < p.count ? plain[warp][e] : 0;
        left[j] = e < p.count ? ordered(to.bias == nullptr ? score : score + bias[e]) : 0;
    }
    choose<kEach>(to, warp, p.count, plain[warp], left);
}

int gate_few(const Few& p, const Choice& to, void* stream) {
    const size_t shared = (kRows + p.n) * p.d * sizeof(bf16);
    static const int allowed = (int)cudaFuncSetAttribute(
        gate_few_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (allowed != cudaSuccess) return allowed;
    const int status = allow_shared(gate_few_kernel, (kRows + kFewTokens) * kWidest * sizeof(bf16));
    if (status != cudaSuccess) return status;
    return launch_clusters(kBlocks, gate_few_kernel, dim3(1, 1, kBlocks), kFewThreads, shared, stream,
                           p, to);
}

// with_each(count, [&](auto each) { constexpr int kEach = each; }): enough of them for `count` experts.
template <class Body> int with_each(int64_t count, Body body) {
    if (count <= 256) return body(std::integral_constant<int, 8>{});
    if (count <= 512) return body(std::integral_constant<int, 16>{});
    return body(std::integral_constant<int, 32>{});
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// scores [n, count] float32, logits in and scores out; then struct Choice, k <= count.
DSV4_EXPORT int dsv4_gate(float* scores, int64_t n, int64_t count, const float* bias,
                          const void* tid2eid, int tid2eid_bytes, int64_t vocabulary,
                          const int64_t* tokens, int64_t k, float scale, float* routing,
                          int32_t* chosen, void* stream) {
    if (count > 1024 || k > 32 || k > count) return kUnsupported;
    Choice to = {bias, tid2eid, tid2eid_bytes, vocabulary, tokens, (int)k, scale, routing, chosen};
    return with_each(count, [&](auto each) {
        return launch(gate_kernel<each>, dim3(n), kThreads, 0, stream, scores, (int)count, to);
    });
}

// The same from x [n, d] bfloat16, n <= 4, and weight [count, d] bfloat16, both at multiples of 16 bytes;
// d <= 4096, count <= 256.
DSV4_EXPORT int dsv4_gate_few(const void* x, int64_t n, int64_t d, const void* weight, int64_t count,
                              float* scores, const float* bias, const void* tid2eid,
                              int tid2eid_bytes, int64_t vocabulary, const int64_t* tokens,
                              int64_t k, float scale, float* routing, int32_t* chosen,
                              void* stream) {
    if (count > kMostExperts || k > 32 || k > count || n > kFewTokens || d % 8 || d > kWidest)
        return kUnsupported;
    Choice to = {bias, tid2eid, tid2eid_bytes, vocabulary, tokens, (int)k, scale, routing, chosen};
    return gate_few({(const bf16*)x, (const bf16*)weight, (int)n, (int)d, (int)count, scores}, to,
                    stream);
}
