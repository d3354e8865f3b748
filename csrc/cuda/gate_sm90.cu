// Op gate: sqrt(softplus(x W^T)), the best k experts or those of a token's id, their weights.
//
// Up to four tokens: one kernel, whose last block chooses. More: a matrix product (op linear), then a
// kernel that chooses.

#include <assert.h>

#include "dispatch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

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

constexpr int kRows = 2;                              // of the matrix, a block
constexpr int kRowThreads = kThreads / kRows;         // that share one
constexpr int kHeld = 8, kWidest = kHeld * 8 * kRowThreads;  // vectors a thread, columns

struct Few {
    const bf16 *x, *weight;  // [n, d], [count, d]
    int n, d, count;
    float* scores;      // [n, count]
    unsigned* arrived;  // blocks that are done: 0 before and after
};

// The product of eight bf16 with eight others.
__device__ float dot(const uint4& a, const uint4& b) {
    const auto &x = reinterpret_cast<const Vector<bf16>&>(a), &y = reinterpret_cast<const Vector<bf16>&>(b);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += to_float(x.at[j]) * to_float(y.at[j]);
    return sum;
}

// Whether this is the last block to come here; then it sees what the others wrote before.
__device__ bool last_to_arrive(unsigned* arrived) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Each block multiplies two rows of the matrix, held in registers before the activations are there, with
// T tokens; the last one chooses, one warp a token.
template <int kEach, int T>
__global__ void __launch_bounds__(kThreads, 2) gate_few_kernel(const Few p, const Choice to) {
    __shared__ float partial[kWarps][T], plain[T][32 * kEach];
    let_next_start();
    const int row = threadIdx.x / kRowThreads, first = threadIdx.x % kRowThreads * 8;
    const int expert = blockIdx.x * kRows + row;
    uint4 held[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; h++)
        if (const int at = first + h * 8 * kRowThreads; at < p.d)
            held[h] = load_stream(p.weight + min(expert, p.count - 1) * (int64_t)p.d + at);
    wait_for_previous();
#pragma unroll
    for (int t = 0; t < T; t++) {
        uint4 x[kHeld];
#pragma unroll
        for (int h = 0; h < kHeld; h++)
            if (const int at = first + h * 8 * kRowThreads; at < p.d && t < p.n)
                x[h] = *(const uint4*)(p.x + t * (int64_t)p.d + at);
        float sum = 0;
#pragma unroll
        for (int h = 0; h < kHeld; h++)
            if (first + h * 8 * kRowThreads < p.d && t < p.n) sum += dot(held[h], x[h]);
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][t] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kRows * T) {
        const int t = threadIdx.x % T, r = threadIdx.x / T, e = blockIdx.x * kRows + r;
        float total = 0;
        for (int w = 0; w < kWarps / kRows; w++) total += partial[r * (kWarps / kRows) + w][t];
        if (t < p.n && e < p.count) p.scores[t * (int64_t)p.count + e] = score_of(total);
    }
    if (!last_to_arrive(p.arrived)) return;
    const int t = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (t >= T || t >= p.n) return;
    uint32_t left[kEach];
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int e = lane + 32 * j;
        const float score = e < p.count ? __ldcg(p.scores + t * (int64_t)p.count + e) : 0;
        plain[t][e] = score;
        left[j] = e < p.count ? to.rank(score, e) : 0;
    }
    __syncwarp();
    choose<kEach>(to, t, p.count, plain[t], left);
}

template <int kEach> int gate_few(const Few& p, const Choice& to, void* stream) {
    auto kernel = p.n == 1 ? gate_few_kernel<kEach, 1> : gate_few_kernel<kEach, 4>;
    return launch(kernel, dim3(ceil_div(p.count, kRows)), kThreads, 0, stream, p, to);
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

// The same from x [n, d] bfloat16, n <= 4, and weight [count, d] bfloat16, both at multiples of 16 bytes.
// arrived: a counter that is 0; one launch at a time may have it.
DSV4_EXPORT int dsv4_gate_few(const void* x, int64_t n, int64_t d, const void* weight, int64_t count,
                              float* scores, unsigned* arrived, const float* bias,
                              const void* tid2eid, int tid2eid_bytes, int64_t vocabulary,
                              const int64_t* tokens, int64_t k, float scale, float* routing,
                              int32_t* chosen, void* stream) {
    if (count > 1024 || k > 32 || k > count || n > 4 || d % 8 || d > kWidest) return kUnsupported;
    Choice to = {bias, tid2eid, tid2eid_bytes, vocabulary, tokens, (int)k, scale, routing, chosen};
    Few p = {(const bf16*)x, (const bf16*)weight, (int)n, (int)d, (int)count, scores, arrived};
    return with_each(count, [&](auto each) { return gate_few<each>(p, to, stream); });
}
