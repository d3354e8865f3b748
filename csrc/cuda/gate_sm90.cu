// Op gate, after its scores' matrix product (op linear): sqrt(softplus(x)), pick k experts, weights.

#include <assert.h>

#include "dispatch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256, kMostExperts = 1024, kMostChosen = 32;

// log(1 + e^x), and x itself where float32 cannot tell them apart, as torch does.
__device__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// Whether (a, i) comes before (b, j): larger first, NaN largest as in torch's sort, ties to the
// lower index.
__device__ bool before(float a, int i, float b, int j) {
    if (isnan(a) != isnan(b)) return isnan(a);
    return a > b || ((a == b || isnan(a)) && i < j);
}

// The best of `value` over a warp, with its index, in every lane.
__device__ void warp_best(float& value, int& index) {
    for (int offset = 16; offset > 0; offset /= 2) {
        float other = __shfl_xor_sync(~0u, value, offset);
        int at = __shfl_xor_sync(~0u, index, offset);
        if (before(other, at, value, index)) value = other, index = at;
    }
}

// One block a token. scores [n, count] holds x W^T and receives the scores.
template <class Token>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(float* scores, int count, const float* bias, const Token* tid2eid, int64_t vocabulary,
                const int64_t* tokens, int k, float scale, float* routing, int32_t* chosen) {
    __shared__ float plain[kMostExperts], biased[kMostExperts];
    __shared__ int picked[kMostChosen];
    let_next_start();
    wait_for_previous();
    scores += blockIdx.x * (int64_t)count;
    for (int e = threadIdx.x; e < count; e += kThreads) {
        float score = sqrtf(softplus(scores[e]));
        scores[e] = plain[e] = score;
        biased[e] = bias == nullptr ? score : score + bias[e];
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    int lane = threadIdx.x;
    if (tid2eid != nullptr) {
        int64_t token = tokens[blockIdx.x];
        assert(token >= 0 && token < vocabulary && "gate: a token id is outside tid2eid");
        if (lane < k) {
            picked[lane] = tid2eid[token * k + lane];
            assert(picked[lane] >= 0 && picked[lane] < count && "gate: tid2eid names no expert");
        }
    } else {
        uint32_t taken = 0;  // of this lane's experts lane, lane + 32, ...
        for (int i = 0; i < k; i++) {
            float best = -INFINITY;
            int at = INT32_MAX;
            for (int e = lane, j = 0; e < count; e += 32, j++)
                if (!(taken >> j & 1) && (at == INT32_MAX || before(biased[e], e, best, at)))
                    best = biased[e], at = e;
            warp_best(best, at);
            if (at % 32 == lane) taken |= 1u << at / 32;
            if (lane == 0) picked[i] = at;
        }
    }
    __syncwarp();
    float mine = lane < k ? plain[picked[lane]] : 0;
    float sum = 0;
    for (int i = 0; i < k; i++) sum += __shfl_sync(~0u, mine, i);
    if (lane < k) {
        routing[blockIdx.x * (int64_t)k + lane] = mine / sum * scale;
        chosen[blockIdx.x * (int64_t)k + lane] = picked[lane];
    }
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
    if (count > kMostExperts || k > kMostChosen) return kUnsupported;
    if (tid2eid_bytes == 8)
        return launch(gate_kernel<int64_t>, dim3(n), kThreads, 0, stream, scores, (int)count, bias,
                      (const int64_t*)tid2eid, vocabulary, tokens, (int)k, scale, routing, chosen);
    return launch(gate_kernel<int32_t>, dim3(n), kThreads, 0, stream, scores, (int)count, bias,
                  (const int32_t*)tid2eid, vocabulary, tokens, (int)k, scale, routing, chosen);
}
