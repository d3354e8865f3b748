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

// Dynamic shared memory of a CTA that wants a processor to itself. Launches begin while others drain: where
// two CTAs fit on a processor, one that is free too soon gets two of a launch, and all wait for these.
constexpr int kAlone = 116 << 10;

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
    uint64_t candidates[kCandidates], binned[kCandidates];  // key and complement of the index
    uint32_t count[kMostCluster];  // candidates in the region of each CTA, kCandidates / regions long
    alignas(16) uint32_t bins[kRankBins];  // 0 at first
    uint32_t scan[kWarps];

    // That candidate, 0 if its region ends before it.
    __device__ uint64_t get(int regions, int i) const {
        const int size = kCandidates / regions;
        return i % size < count[i / size] ? candidates[i] : 0;
    }
    __device__ void clear_bins() {
        for (int i = threadIdx.x; i < kRankBins; i += kThreads) bins[i] = 0;
    }
};

// Extremes of keys by warp.
struct KeyRange {
    uint2 warps[kWarps];

    // The least and the largest of all threads' keys, least <= largest unless there are none.
    __device__ uint2 find(uint32_t least, uint32_t largest) {
        least = __reduce_min_sync(kAll, least);
        largest = __reduce_max_sync(kAll, largest);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {least, largest};
        __syncthreads();
        const uint2 both = warps[threadIdx.x % kWarps];
        return {__reduce_min_sync(kAll, both.x), __reduce_max_sync(kAll, both.y)};
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
template <int Each> using Candidates = uint64_t[Each];
constexpr int kEach = kCandidates / kThreads;  // of those that Ranking holds

// Writes the indices of the first `wanted` candidates by sorting all.
template <int Each>
__device__ void rank_by_sorting(Ranking& s, const Candidates<Each>& mine, uint32_t wanted, int* index) {
    constexpr int kSlots = Each == 3 ? 4 : Each;  // a power of two
    static_assert((kSlots & kSlots - 1) == 0 && kSlots * kThreads <= kCandidates);
#pragma unroll
    for (int j = 0; j < kSlots; j++) s.candidates[j * kThreads + threadIdx.x] = j < Each ? mine[j % Each] : 0;
    __syncthreads();
    sort(s.candidates, kSlots * kThreads);
    for (uint32_t i = threadIdx.x; i < wanted; i += kThreads)
        index[i] = (int)~(uint32_t)s.candidates[i];
}

// Bins of keys from `low` to `most`, the largest first: of equal width in the scores if those are on
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
    __device__ uint32_t of(uint32_t key) const {
        const uint32_t bin = linear ? (uint32_t)((top - score_of(key)) * scale) : (most - key) >> shift;
        return min(bin, kRankBins - 1);
    }
};

// s.bins, from the number of candidates in each to their number << 16 | that of those before them; false,
// and nothing is changed, where a bin has too many.
__device__ inline bool find_starts(Ranking& s) {
    static_assert(kRankBins == 4 * kThreads && kCandidates < 1 << 16);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint4 count = ((const uint4*)s.bins)[threadIdx.x];
    const uint32_t sum = count.x + count.y + count.z + count.w, upto = warp_inclusive_sum(sum);
    if (lane == 31) s.scan[warp] = upto;
    const bool crowded = max(max(count.x, count.y), max(count.z, count.w)) > kCrowd;
    if (__syncthreads_or(crowded)) return false;
    const uint32_t first = __reduce_add_sync(kAll, lane < warp ? s.scan[lane] : 0) + upto - sum;
    const uint32_t second = first + count.x, third = second + count.y, fourth = third + count.z;
    ((uint4*)s.bins)[threadIdx.x] = {count.x << 16 | first, count.y << 16 | second, count.z << 16 | third,
                                     count.w << 16 | fourth};
    __syncthreads();
    return true;
}

// Writes the indices of the first `wanted` of all threads' candidates, whose keys are from `low` to `most`.
template <int Each>
__device__ void rank_candidates(Ranking& s, const Candidates<Each>& mine, uint32_t low, uint32_t most,
                                uint32_t wanted, int* index) {
    static_assert(kMost + kCrowd <= kCandidates);  // so many are compared
    constexpr int kAtOnce = 4;  // candidates of a bin that are loaded together
    const Bins bins(low, most);
    uint32_t bin[Each], place[Each];  // place: in the bin
#pragma unroll
    for (int j = 0; j < Each; j++)
        if (mine[j]) place[j] = atomicAdd(&s.bins[bin[j] = bins.of(mine[j] >> 32)], 1);
    __syncthreads();
    if (!find_starts(s)) return rank_by_sorting(s, mine, wanted, index);
    uint32_t with[Each];  // of the bin, 0 where it is too late
#pragma unroll
    for (int j = 0; j < Each; j++) {
        with[j] = 0;
        if (!mine[j]) continue;
        const uint32_t its = s.bins[bin[j]], begin = its & 0xffff;
        if (begin < wanted) s.binned[begin + place[j]] = mine[j], with[j] = its;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Each; j++) {
        if (!with[j]) continue;
        uint32_t rank = with[j] & 0xffff;
        const uint32_t begin = rank, end = begin + (with[j] >> 16);
#pragma unroll 1
        for (uint32_t first = begin; first < end; first += kAtOnce)
#pragma unroll
            for (uint32_t other = first; other < first + kAtOnce; other++)
                if (other < end) rank += s.binned[other] > mine[j];
        if (rank < wanted) index[rank] = (int)~(uint32_t)mine[j];
    }
}

}  // namespace dsv4
