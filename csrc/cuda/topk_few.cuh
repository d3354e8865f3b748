// Keys of scores, and ranking scores by comparing all with all, where they are few.
#pragma once

#include <stdint.h>

namespace dsv4 {

// A larger score has a larger key; 0 and -0 are equal, NaN is the largest, and no key is 0.
__device__ inline uint32_t key_of(float score) {
    uint32_t bits = __float_as_uint(score + 0.0f);
    if (score != score) return ~0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Writes the indices of scores [begin, end) of a row of `count` that are among its first `wanted`. key: of all, in
// order, 0 behind the last up to a multiple of four. A warp ranks Together of them at once.
template <int Together, int Warps>
__device__ void rank_few(const uint32_t* key, int count, int begin, int end, uint32_t wanted, int* index) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int first = begin + Together * warp; first < end; first += Together * Warps) {
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
            rank[j] = __reduce_add_sync(~0u, rank[j]);
            if (lane == 0 && first + j < end && rank[j] < wanted) index[rank[j]] = first + j;
        }
    }
}

}  // namespace dsv4
