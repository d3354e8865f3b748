// Top-k of a short row by several CTAs: all scores compared with all, without a bound.
#pragma once

#include "topk_bound.cuh"

namespace dsv4 {

constexpr int kMostFew = 4096;  // scores of a row that may all be ranked

// Whether all scores of a row are compared with all, without a bound: where no CTA compares so many pairs
// that another way is faster, of kCandidates scores a CTA by itself.
__host__ __device__ inline bool is_few(int64_t count, int64_t parts) {
    return count <= kMostFew && count * count <= (count <= kCandidates ? 32768 : 65536) * parts;
}

// Writes the indices of scores [begin, end) of a row of `count` that are among its first `wanted`. key: of all, in
// order, 0 behind the last up to a multiple of four. A warp ranks Together of them at once.
template <int Together>
__device__ void rank_few(const uint32_t* key, int count, int begin, int end, uint32_t wanted, int* index) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int first = begin + Together * warp; first < end; first += Together * kWarps) {
        const int base = first / 4 * 4;  // of equal scores, all before this come first
        uint32_t mine[Together], rank[Together];
#pragma unroll
        for (int j = 0; j < Together; j++) {
            mine[j] = first + j < end ? key[first + j] : ~0u;
            rank[j] = lane < first + j - base && key[base + lane] == mine[j];
        }
#pragma unroll 4
        for (int i = 4 * lane; i < count; i += 128) {
            const uint4 four = *(const uint4*)(key + i);
#pragma unroll
            for (int j = 0; j < Together; j++) {
                const uint32_t least = mine[j] - (i < base);
                rank[j] += (four.x > least) + (four.y > least) + (four.z > least) + (four.w > least);
            }
        }
#pragma unroll
        for (int j = 0; j < Together; j++) {
            rank[j] = __reduce_add_sync(kAll, rank[j]);
            if (lane == 0 && first + j < end && rank[j] < wanted) index[rank[j]] = first + j;
        }
    }
}

// The part that CTA `part` of `parts` has of a row of few.
template <int Quads>
__device__ void few_topk(Shared& s, const Share<Quads>& share, int k, int part, int parts, int* index) {
    uint32_t* key = (uint32_t*)s.ranking.candidates;
    static_assert(kMostFew * sizeof(*key) <= sizeof(s.ranking.candidates));
    const int count = share.count;
#pragma unroll
    for (int q = 0; q < Quads; q++) {
        const int at = share.at(4 * q);
        uint32_t four[4];
#pragma unroll
        for (int j = 0; j < 4; j++) four[j] = at + j < count ? key_of(share.value[4 * q + j]) : 0;
        if (at < kMostFew) *(uint4*)(key + at) = {four[0], four[1], four[2], four[3]};
    }
    __syncthreads();
    const int each = (count + parts - 1) / parts, begin = min(each * part, count), end = min(begin + each, count);
    const uint32_t wanted = min(count, k);
    if (each <= kWarps) rank_few<1>(key, count, begin, end, wanted, index);
    else rank_few<2>(key, count, begin, end, wanted, index);
}

}  // namespace dsv4
