// Top-k of a short row by one CTA: all its scores are candidates, held in registers.
#pragma once

#include "topk_rank.cuh"

namespace dsv4 {

// The least and the largest key of all threads' candidates; ~0 and 0 if there are none.
struct KeyRange {
    uint32_t low[kWarps], most[kWarps];

    __device__ uint2 find(const Candidates& mine) {
        uint32_t least = ~0u, largest = 0;
#pragma unroll
        for (int j = 0; j < kEach; j++) {
            const uint32_t key = mine[j] >> 32;
            if (key) least = min(least, key);
            largest = max(largest, key);
        }
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        least = __reduce_min_sync(kAll, least);
        largest = __reduce_max_sync(kAll, largest);
        if (lane == 0) low[warp] = least, most[warp] = largest;
        __syncthreads();
        return {__reduce_min_sync(kAll, low[lane % kWarps]), __reduce_max_sync(kAll, most[lane % kWarps])};
    }
};

// A CTA a row of at most kCandidates scores.
__global__ void __launch_bounds__(kThreads, 2)
    short_topk_kernel(const float* score, const int64_t* visible, int total, int k, int* index) {
    __shared__ Ranking s;
    __shared__ KeyRange range;
    const int64_t row = blockIdx.x;
    let_next_start();
    for (int i = threadIdx.x; i < kRankBins; i += kThreads) s.start[i] = 0;
    score += row * total;
    index += row * k;
    wait_for_previous();
    float value[kEach];
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int at = j * kThreads + threadIdx.x;
        value[j] = at < total ? score[at] : 0;
    }
    const int count = visible[row] < total ? (int)visible[row] : total, wanted = min(count, k);
    Candidates mine;
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int at = j * kThreads + threadIdx.x;
        mine[j] = at < count ? (uint64_t)key_of(value[j]) << 32 | ~(uint32_t)at : 0;
    }
    const uint2 keys = range.find(mine);
    if (keys.x == keys.y)
        for (int i = threadIdx.x; i < wanted; i += kThreads) index[i] = i;
    else
        rank_candidates(s, mine, keys.x, keys.y, wanted, index);
    for (int i = threadIdx.x + wanted; i < k; i += kThreads) index[i] = -1;
}

}  // namespace dsv4
