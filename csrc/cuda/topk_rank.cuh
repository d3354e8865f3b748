// Keys of scores, and ranking the candidates of a row: what both ways of top-k share.
#pragma once

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMost = 1024;        // k
constexpr int kCandidates = 2048;  // that CTA 0 ranks
constexpr int kMostCluster = 16;   // more than 8 needs the device's consent
constexpr int kRankBins = 2048;
constexpr uint32_t kCrowd = 64;    // candidates in a bin, from which sorting is faster
constexpr unsigned kAll = ~0u;

// A larger score has a larger key; 0 and -0 are equal, NaN is the largest, and no key is 0.
__device__ inline uint32_t key_of(float score) {
    uint32_t bits = __float_as_uint(score + 0.0f);
    if (score != score) return ~0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The score of a key; NaN's is NaN, and 0 that of -0.
__device__ inline float score_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ inline uint32_t warp_inclusive_sum(uint32_t x) {
    for (int offset = 1; offset < 32; offset *= 2) {
        uint32_t other = __shfl_up_sync(kAll, x, offset);
        if (threadIdx.x % 32 >= offset) x += other;
    }
    return x;
}

__device__ inline void sync(uint32_t ctas) {
    if (ctas == 1) __syncthreads();
    else cluster_sync();
}

// What CTA 0 ranks. Every CTA has a region of the candidates, kCandidates / regions long.
struct Ranking {
    uint64_t candidates[kCandidates], ranked[kCandidates];  // key and complement of the index
    uint32_t count[kMostCluster];  // candidates in each region
    alignas(16) uint32_t start[kRankBins];  // 0 at first
    uint32_t scan[kWarps];

    __device__ bool has(int regions, int i) const {
        const int size = kCandidates / regions;
        return i % size < count[i / size];
    }
};

// Bitonic sort, largest first, of a power of two of candidates.
__device__ inline void sort(uint64_t* candidates, uint32_t size) {
#pragma unroll 1
    for (uint32_t block = 2; block <= size; block *= 2)
#pragma unroll 1
        for (uint32_t stride = block / 2; stride > 0; stride /= 2) {
            for (uint32_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
                uint32_t i = 2 * pair - (pair & (stride - 1));
                uint64_t a = candidates[i], b = candidates[i + stride];
                if ((a < b) == ((i & block) == 0)) {
                    candidates[i] = b;
                    candidates[i + stride] = a;
                }
            }
            __syncthreads();
        }
}

// Writes the indices of the first `wanted` candidates by sorting all.
__device__ inline void rank_by_sorting(Ranking& s, int regions, uint32_t wanted, int* index) {
    uint32_t size = kCandidates;
    while (regions == 1 && size / 2 >= s.count[0]) size /= 2;
    for (int i = threadIdx.x; i < size; i += kThreads)
        if (!s.has(regions, i)) s.candidates[i] = 0;
    __syncthreads();
    sort(s.candidates, size);
    for (uint32_t i = threadIdx.x; i < wanted; i += kThreads)
        index[i] = (int)~(uint32_t)s.candidates[i];
}

// Writes the indices of the first `wanted` of the candidates, whose keys are from `low` to `most`.
__device__ inline void rank_candidates(Ranking& s, int regions, uint32_t low, uint32_t most, uint32_t wanted,
                                int* index) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int kLog = 11, kEach = kCandidates / kThreads;
    static_assert(1 << kLog == kRankBins && kRankBins == 4 * kThreads);
    // Bins of equal width in the scores where those are on both sides of 0, where keys are far apart.
    const int shift = max(0, 32 - __clz(most - low) - kLog);
    const float top = score_of(most), bottom = score_of(low), scale = (kRankBins - 1) / (top - bottom);
    const bool linear = bottom < 0 && top > 0 && scale > 0;  // and finite
    auto bin_of = [&](uint64_t candidate) -> uint32_t {
        const uint32_t key = candidate >> 32;
        return linear ? min((int)((top - score_of(key)) * scale), kRankBins - 1) : (most - key) >> shift;
    };
    uint32_t place[kEach];  // in its bin
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int i = j * kThreads + threadIdx.x;
        if (s.has(regions, i)) place[j] = atomicAdd(&s.start[bin_of(s.candidates[i])], 1);
    }
    __syncthreads();
    uint4 counts = ((const uint4*)s.start)[threadIdx.x];
    uint32_t sum = counts.x + counts.y + counts.z + counts.w, upto = warp_inclusive_sum(sum);
    if (lane == 31) s.scan[warp] = upto;
    bool crowded = max(max(counts.x, counts.y), max(counts.z, counts.w)) > kCrowd;
    if (__syncthreads_or(crowded)) return rank_by_sorting(s, regions, wanted, index);
    uint32_t first = __reduce_add_sync(kAll, lane < warp ? s.scan[lane] : 0) + upto - sum;
    ((uint4*)s.start)[threadIdx.x] = {first, first + counts.x, first + counts.x + counts.y,
                                      first + sum - counts.w};
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const int i = j * kThreads + threadIdx.x;
        if (!s.has(regions, i)) continue;
        const uint64_t candidate = s.candidates[i];
        s.ranked[s.start[bin_of(candidate)] + place[j]] = candidate;
    }
    uint32_t total = 0;
    for (int region = 0; region < regions; region++) total += s.count[region];
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < total; i += kThreads) {
        const uint64_t candidate = s.ranked[i];
        const uint32_t bin = bin_of(candidate), begin = s.start[bin];
        const uint32_t end = bin + 1 < kRankBins ? s.start[bin + 1] : total;
        uint32_t rank = begin;
        for (uint32_t other = begin; other < end; other++) rank += s.ranked[other] > candidate;
        if (rank < wanted) index[rank] = (int)~(uint32_t)candidate;
    }
}

}  // namespace dsv4
