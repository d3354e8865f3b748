// Op gate, after its scores' matrix product (op linear): sqrt(softplus(x)), pick k experts, weights.

#include <assert.h>

#include "dispatch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;

// log(1 + e^x), and x itself where float32 cannot tell them apart, as torch does.
__device__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// A number whose order as an unsigned integer is the float's order; NaN comes last, as the largest.
__device__ uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return isnan(x) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One block a token. scores [n, count] holds x W^T and receives the scores. kEach: experts that a lane
// of the first warp looks at.
template <class Token, int kEach>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(float* scores, int count, const float* bias, const Token* tid2eid, int64_t vocabulary,
                const int64_t* tokens, int k, float scale, float* routing, int32_t* chosen) {
    __shared__ float plain[32 * kEach];
    __shared__ uint32_t rank[32 * kEach];
    let_next_start();
    wait_for_previous();
    scores += blockIdx.x * (int64_t)count;
    for (int e = threadIdx.x; e < 32 * kEach; e += kThreads) {
        float score = e < count ? sqrtf(softplus(scores[e])) : 0;
        if (e < count) scores[e] = score;
        plain[e] = score;
        rank[e] = e < count ? ordered(bias == nullptr ? score : score + bias[e]) : 0;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    int lane = threadIdx.x, mine = 0;  // the expert in slot `lane`
    if (tid2eid != nullptr) {
        int64_t token = tokens[blockIdx.x];
        assert(token >= 0 && token < vocabulary && "gate: a token id is outside tid2eid");
        if (lane < k) mine = tid2eid[token * k + lane];
        assert(mine >= 0 && mine < count && "gate: tid2eid names no expert");
    } else {
        uint32_t left[kEach];
#pragma unroll
        for (int j = 0; j < kEach; j++) left[j] = rank[lane + 32 * j];
        for (int i = 0; i < k; i++) {
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
    float score = lane < k ? plain[mine] : 0, sum = 0;
    for (int i = 0; i < k; i++) sum += __shfl_sync(~0u, score, i);
    if (lane < k) {
        routing[blockIdx.x * (int64_t)k + lane] = score / sum * scale;
        chosen[blockIdx.x * (int64_t)k + lane] = mine;
    }
}

template <class Token>
int gate(float* scores, int64_t n, int count, const float* bias, const void* tid2eid,
         int64_t vocabulary, const int64_t* tokens, int k, float scale, float* routing,
         int32_t* chosen, void* stream) {
    auto kernel = count <= 256   ? gate_kernel<Token, 8>
                  : count <= 512 ? gate_kernel<Token, 16>
                                 : gate_kernel<Token, 32>;
    return launch(kernel, dim3(n), kThreads, 0, stream, scores, count, bias, (const Token*)tid2eid,
                  vocabulary, tokens, k, scale, routing, chosen);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// scores [n, count] float32, logits in and scores out; bias [count] or null; tid2eid [vocabulary, k]
// int32 or int64 (tid2eid_bytes an element) with tokens [n], or null; routing, chosen [n, k].
DSV4_EXPORT int dsv4_gate(float* scores, int64_t n, int64_t count, const float* bias,
                          const void* tid2eid, int tid2eid_bytes, int64_t vocabulary,
                          const int64_t* tokens, int64_t k, float scale, float* routing,
                          int32_t* chosen, void* stream) {
    if (count > 1024 || k > 32 || k > count) return kUnsupported;
    auto run = tid2eid_bytes == 8 ? gate<int64_t> : gate<int32_t>;
    return run(scores, n, (int)count, bias, tid2eid, vocabulary, tokens, (int)k, scale, routing,
               chosen, stream);
}
