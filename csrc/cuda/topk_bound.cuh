// A lower bound of the k-th best score of a share of a row: from the maxima of small groups of its scores.
#pragma once

#include <type_traits>

#include "topk_exact.cuh"
#include "topk_rank.cuh"

namespace dsv4 {

constexpr int kRough = 512;     // bins of the groups' maxima
constexpr int kGroupsEach = 4;  // groups of a thread
constexpr int kRun = 128;       // scores that a warp has in a row

struct Shared {
    Ranking ranking;
    Exact exact;
    alignas(16) uint32_t rough[kRough];
    float4 summary[kMostCluster];  // bound, most, whether all are equal, of every CTA
    uint64_t summarised, collected;
    KeyRange range;
    uint32_t taken;
    float bound;

    __device__ void clear() {
        rough[threadIdx.x] = 0;
        if (threadIdx.x == 0) taken = 0;
        ranking.clear_bins();
    }
};

// max(a, b), NaN if either is.
__device__ inline float max_nan(float a, float b) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}

__device__ inline uint32_t bits(uint32_t mask) { return __popc(mask); }
__device__ inline uint32_t bits(uint64_t mask) { return __popcll(mask); }
__device__ inline int lowest(uint32_t mask) { return __ffs(mask) - 1; }
__device__ inline int lowest(uint64_t mask) { return __ffsll(mask) - 1; }

// A share of a row in registers: every warp has whole runs of scores, which go round the CTAs of a
// cluster, so that no CTA gets all of the best from one place of the row.
template <int Quads> struct Share {
    const float* score;  // the row
    const uint32_t rank = cluster_rank(), ctas = cluster_size();
    const int first = kRun * (threadIdx.x / 32 * ctas + rank) + threadIdx.x % 32 * 4;
    const int stride = kRun * kWarps * (int)ctas;
    int count = 0;           // visible scores of the row
    float value[4 * Quads];  // -inf where not visible

    __device__ explicit Share(const float* score) : score(score) {}

    __device__ void read(int total, const int64_t* visible) {
        if (total % 4 == 0) {
#pragma unroll
            for (int q = 0; q < Quads; q++) {
                float4 four = {};
                if (first + q * stride < total) four = *(const float4*)(score + first + q * stride);
                value[4 * q] = four.x, value[4 * q + 1] = four.y;
                value[4 * q + 2] = four.z, value[4 * q + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int j = 0; j < 4 * Quads; j++) value[j] = at(j) < total ? score[at(j)] : 0;
        }
        // Known only after the loads are on their way.
        count = *visible < total ? (int)*visible : total;
#pragma unroll
        for (int q = 0; q < Quads; q++)
            if (first + q * stride + 4 > count) {
#pragma unroll
                for (int j = 4 * q; j < 4 * q + 4; j++)
                    if (at(j) >= count) value[j] = -INFINITY;
            }
    }
    // Where in the row value[j] is.
    __device__ int at(int j) const { return first + j / 4 * stride + j % 4; }

    // Bit j says that value[j] is visible, and not below `bound` if that is finite.
    using Mask = std::conditional_t<Quads <= 8, uint32_t, uint64_t>;
    __device__ Mask from(float bound) const {
        Mask mask = 0;
        if (bound > -INFINITY) {
#pragma unroll
            for (int j = 0; j < 4 * Quads; j++) mask |= value[j] >= bound ? (Mask)1 << j : 0;
        } else {
#pragma unroll
            for (int j = 0; j < 4 * Quads; j++) mask |= at(j) < count ? (Mask)1 << j : 0;
        }
        return mask;
    }
    // Whether all that this thread sees are `most`.
    __device__ bool all_are(float most) const {
        bool equal = true;
#pragma unroll
        for (int j = 0; j < 4 * Quads; j++) equal = equal && (value[j] == most || at(j) >= count);
        return equal;
    }
    // Key and complement of the index of a score.
    __device__ uint64_t candidate(uint32_t index) const {
        return (uint64_t)key_of(score[index]) << 32 | ~index;  // registers have no index
    }
    // f(slot, index) for the bits of `mask`, in slots of their own from 0 on; *taken counts them.
    template <class F> __device__ void take(Mask mask, uint32_t* taken, F f) const {
        const uint32_t mine = bits(mask), upto = warp_inclusive_sum(mine);
        uint32_t slot = 0;
        if (threadIdx.x % 32 == 31) slot = atomicAdd(taken, upto);
        slot = __shfl_sync(kAll, slot, 31) + upto - mine;
#pragma unroll 1
        for (; mask != 0; mask &= mask - 1) {
            f(slot++, at(lowest(mask)));
        }
    }
};

// Of the maxima of a share's groups, in all threads; `most` is NaN if any score is.
struct Extremes {
    float low, most;
    __device__ bool finite() const { return low <= most && most < INFINITY; }
};

template <int Quads>
__device__ Extremes find_extremes(Shared& s, const Share<Quads>& share, float (&group)[kGroupsEach]) {
    float low = INFINITY, most = -INFINITY;
#pragma unroll
    for (int g = 0; g < kGroupsEach; g++) {
        group[g] = share.value[g * Quads];
#pragma unroll
        for (int j = 1; j < Quads; j++) group[g] = max_nan(group[g], share.value[g * Quads + j]);
        most = max_nan(most, group[g]);
        if (group[g] > -INFINITY) low = fminf(low, group[g]);
    }
    const uint2 keys = s.range.find(key_of(low), key_of(most));
    return {score_of(keys.x), score_of(keys.y)};
}

// A lower bound, up to rounding, of the need-th best score of this share, or -inf; right in warp 0.
__device__ inline float find_bound(Shared& s, const float (&group)[kGroupsEach], Extremes of, uint32_t need) {
    const float width = (of.most - of.low) * (1.0f / (kRough - 1)), scale = __fdividef(1, width);
#pragma unroll
    for (int g = 0; g < kGroupsEach; g++)
        if (group[g] > -INFINITY) {
            int bin = (int)((of.most - group[g]) * scale);
            atomicAdd(&s.rough[min(max(bin, 0), kRough - 1)], 1);
        }
    __syncthreads();
    if (threadIdx.x >= 32) return 0;
    constexpr int kEach = kRough / 32;
    const uint4* mine = (const uint4*)(s.rough + kEach * threadIdx.x);
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kEach / 4; i++) sum += mine[i].x + mine[i].y + mine[i].z + mine[i].w;
    const uint32_t upto = warp_inclusive_sum(sum);
    uint32_t before = upto - sum;
    int bins = kEach * threadIdx.x;  // that hold less than need
#pragma unroll
    for (int i = 0; i < kEach / 4; i++) {
        const uint4 four = mine[i];
        bins += (before += four.x) < need;
        bins += (before += four.y) < need;
        bins += (before += four.z) < need;
        bins += (before += four.w) < need;
    }
    const unsigned reached = __ballot_sync(kAll, need <= upto);
    if (reached == 0) return -INFINITY;
    bins = __shfl_sync(kAll, bins, __ffs(reached) - 1);
    return fmaxf(of.low, of.most - (bins + 1.01f) * width);
}

}  // namespace dsv4
