// Around the products of the experts: the list of pairs by expert before them, the sum over a token's experts
// after them.
#pragma once

#include <assert.h>

#include "experts.cuh"

namespace dsv4 {

constexpr int kMostExperts = 1024, kCombineThreads = 256;

// ---------------------------------------------------------------- before: pairs by expert

// body(pair, expert) for every pair of the block's, with the loads of eight at a time under way.
template <class Body> __device__ void for_each_pair(const Moe& m, Body body) {
    constexpr int kAtOnce = 8;
    const int pairs = m.n * m.k;
    for (int first = threadIdx.x; first < pairs; first += kAtOnce * kMostExperts) {
        int expert[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            int pair = first + i * kMostExperts;
            expert[i] = pair < pairs ? m.ids[pair] : 0;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
            if (first + i * kMostExperts < pairs) body(first + i * kMostExperts, expert[i]);
    }
}

// Lists the pairs of each expert, in pieces of at most m.most. One block of kMostExperts threads; the
// order of an expert's pairs does not matter to any result.
__device__ inline void list_pairs(const Moe& m) {
    __shared__ int counts[kMostExperts], pairs_to[kMostExperts], pieces_to[kMostExperts];
    const int e = threadIdx.x;
    counts[e] = 0;
    __syncthreads();
    for_each_pair(m, [&](int, int expert) {
        assert(expert >= 0 && expert < m.count && "experts: an expert id is out of range");
        atomicAdd(&counts[expert], 1);
    });
    __syncthreads();
    int mine = counts[e], pieces = (mine + m.most - 1) / m.most;
    pairs_to[e] = mine;
    pieces_to[e] = pieces;
    for (int step = 1; step < kMostExperts; step *= 2) {  // sums of all up to and with e
        __syncthreads();
        int a = e >= step ? pairs_to[e - step] : 0, b = e >= step ? pieces_to[e - step] : 0;
        __syncthreads();
        pairs_to[e] += a;
        pieces_to[e] += b;
    }
    int first = pairs_to[e] - mine;
    for (int i = 0; i < pieces; i++)
        m.work[pieces_to[e] - pieces + i] = {e, first + i * m.most, min(m.most, mine - i * m.most)};
    if (e == kMostExperts - 1) *m.pieces = pieces_to[e];
    counts[e] = first;
    __syncthreads();
    for_each_pair(m, [&](int pair, int expert) { m.order[atomicAdd(&counts[expert], 1)] = pair; });
}

// ---------------------------------------------------------------- after: sums over experts

// The sum of a token's partial results, in slot order; four columns a thread.
static __global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Moe m) {
    let_next_start();
    wait_for_previous();
    const int64_t column = (blockIdx.x * (int64_t)kCombineThreads + threadIdx.x) * 4;
    if (column >= m.d) return;
    const int64_t token = blockIdx.y;
    float4 total = {0, 0, 0, 0};
#pragma unroll 4
    for (int s = 0; s < m.k; s++) {
        const float4 part = *(const float4*)(m.partial + (token * m.k + s) * m.d + column);
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    *(float4*)(m.y + token * m.d + column) = total;
}

inline int combine(const Moe& m, void* stream) {
    if (m.partial == m.y) return cudaSuccess;  // k = 1
    return launch(combine_kernel, dim3(ceil_div(m.d, 4 * kCombineThreads), m.n), kCombineThreads, 0,
                  stream, m);
}

}  // namespace dsv4
