// Keys of scores, and ranking the candidates of a row: what both ways of top-k share.
#pragma once

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMost = 1024;        // k
constexpr int kCandidates = 2048;  // that a CTA ranks
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

struct Ranking {
    uint64_t candidates[kCandidates], ranked[kCandidates];  // key and complement of the index
    uint32_t count[kMostCluster];  // candidates in the region of each CTA, kCandidates / regions long
    alignas(16) uint32_t start[kRankBins + 1];  // 0 at first
    uint32_t scan[kWarps];

    // That candidate, 0 if its region ends before it.
    __device__ uint64_t get(int regions, int i) const {
        const int size = kCandidates / regions;
        return i % size < count[i / size] ? candidates[i] : 0;
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

// Candidates of a thread; 0 is none.
constexpr int kEach = kCandidates / kThreads;
using Candidates = uint64_t[kEach];

// Writes the indices of the first `wanted` candidates by sorting all.
__device__ inline void rank_by_sorting(Ranking& s, const Candidates& mine, uint32_t wanted, int* index) {
#pragma unroll
    for (int j = 0; j < kEach; j++) s.candidates[j * kThreads + threadIdx.x] = mine[j];
    __syncthreads();
    sort(s.candidates, kCandidates);
    for (uint32_t i = threadIdx.x; i < wanted; i += kThreads)
        index[i] = (int)~(uint32_t)s.candidates[i];
}

// Bins of keys from `low` to `most`, the largest first: of equal width in the scores where those are on
// both sides of 0, where keys are far apart.
struct Bins {
    uint32_t most;
    int shift;
    float top, scale;
    bool linear;

    __device__ Bins(uint32_t low, uint32_t most) : most(most) {
        constexpr int kLog = 11;
        static_assert(1 << kLog == kRankBins);
        const float bottom = score_of(low);
        shift = max(0, 32 - __clz(most - low) - kLog);
        top = score_of(most), scale = (kRankBins - 1) / (top - bottom);
        linear = bottom < 0 && top > 0 && scale > 0;  // and finite
    }
    __device__ uint32_t of(uint64_t candidate) const {
        const uint32_t key = candidate >> 32;
        return linear ? min((int)((top - score_of(key)) * scale), kRankBins - 1) : (most - key) >> shift;
    }
};

// s.start, from the number of candidates in each bin to that in those before it; false, and nothing
// is changed, where a bin has too many.
__device__ inline bool find_starts(Ranking& s) {
    static_assert(kRankBins == 4 * kThreads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint4 counts = ((const uint4*)s.start)[threadIdx.x];
    const uint32_t sum = counts.x + counts.y + counts.z + counts.w, upto = warp_inclusive_sum(sum);
    if (lane == 31) s.scan[warp] = upto;
    const bool crowded = max(max(counts.x, counts.y), max(counts.z, counts.w)) > kCrowd;
    if (__syncthreads_or(crowded)) return false;
    const uint32_t first = __reduce_add_sync(kAll, lane < warp ? s.scan[lane] : 0) + upto - sum;
    ((uint4*)s.start)[threadIdx.x] = {first, first + counts.x, first + counts.x + counts.y,
                                      first + sum - counts.w};
    if (threadIdx.x == kThreads - 1) s.start[kRankBins] = first + sum;
    __syncthreads();
    return true;
}

// Writes the indices of the first `wanted` of all threads' candidates, whose keys are from `low` to `most`.
__device__ inline void rank_candidates(Ranking& s, const Candidates& mine, uint32_t low, uint32_t most,
                                       uint32_t wanted, int* index) {
    const Bins bins(low, most);
    uint32_t begin[kEach], place[kEach];  // of its bin, in its bin
#pragma unroll
    for (int j = 0; j < kEach; j++)
        if (mine[j]) place[j] = atomicAdd(&s.start[begin[j] = bins.of(mine[j])], 1);
    __syncthreads();
    if (!find_starts(s)) return rank_by_sorting(s, mine, wanted, index);
    uint32_t end[kEach] = {};  // of its bin, 0 where nothing is left to be compared
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        if (!mine[j]) continue;
        const uint32_t bin = begin[j], after = s.start[bin + 1];
        begin[j] = s.start[bin];
        if (begin[j] >= wanted) continue;
        if (after - begin[j] == 1) index[begin[j]] = (int)~(uint32_t)mine[j];
        else s.ranked[begin[j] + place[j]] = mine[j], end[j] = after;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        if (end[j] == 0) continue;
        uint32_t rank = begin[j];
        for (uint32_t other = begin[j]; other < end[j]; other++) rank += s.ranked[other] > mine[j];
        if (rank < wanted) index[rank] = (int)~(uint32_t)mine[j];
    }
}

}  // namespace dsv4
