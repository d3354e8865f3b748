// Top-k of a short row by one CTA: all its scores are candidates, held in registers.
#pragma once

#include "topk_rank.cuh"

namespace dsv4 {

// A CTA a row of at most Each * kThreads scores.
template <int Each>
__global__ void __launch_bounds__(kThreads, 2)
    short_topk_kernel(const float* score, const int64_t* visible, int total, int k, int* index) {
    __shared__ Ranking s;
    __shared__ KeyRange range;
    const int64_t row = blockIdx.x;
    let_next_start();
    s.clear_bins();
    score += row * total;
    index += row * k;
    wait_for_previous();
    float value[Each];
#pragma unroll
    for (int j = 0; j < Each; j++) {
        const int at = j * kThreads + threadIdx.x;
        value[j] = at < total ? score[at] : 0;
    }
    const int count = visible[row] < total ? (int)visible[row] : total, wanted = min(count, k);
    Candidates<Each> mine;
    uint32_t least = ~0u, largest = 0;
#pragma unroll
    for (int j = 0; j < Each; j++) {
        const int at = j * kThreads + threadIdx.x;
        const uint32_t key = key_of(value[j]);
        mine[j] = at < count ? (uint64_t)key << 32 | ~(uint32_t)at : 0;
        if (at < count) least = min(least, key), largest = max(largest, key);
    }
    const uint2 keys = range.find(least, largest);
    if (keys.x == keys.y)
        for (int i = threadIdx.x; i < wanted; i += kThreads) index[i] = i;
    else
        rank_candidates(s, mine, keys.x, keys.y, wanted, index);
    for (int i = threadIdx.x + wanted; i < k; i += kThreads) index[i] = -1;
}

template <int Each>
int launch_short(const float* score, const int64_t* visible, int64_t n, int64_t total, int64_t k, bool alone,
                 int* index, void* stream) {
    static const int allowed = allow_shared(short_topk_kernel<Each>, kAlone);
    if (allowed) return allowed;
    return launch(short_topk_kernel<Each>, dim3(n), kThreads, alone ? kAlone : 0, stream, score, visible, total, k,
                  index);
}

}  // namespace dsv4
