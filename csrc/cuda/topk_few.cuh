// Top-k of a short row by several CTAs: all scores compared with all, without a bound.
#pragma once

#include "topk_bound.cuh"

namespace dsv4 {

constexpr int kMostFew = 4096;  // scores of a row at most

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

// A part of a row of few a CTA; grid rows * parts.
__global__ void __launch_bounds__(kThreads, 1)
    few_topk_kernel(const float* score, const int64_t* visible, int total, int k, int parts, int* index) {
    __shared__ __align__(16) uint32_t key[kMostFew];
    const int64_t row = blockIdx.x / parts;
    const int part = blockIdx.x % parts;
    let_next_start();
    Share<2> share(score + row * total);
    static_assert(2 * 4 * kThreads == kMostFew);
    index += row * k;
    wait_for_previous();
    share.read(total, visible + row);
    const int count = share.count;
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const int at = share.at(4 * q);
        uint32_t four[4];
#pragma unroll
        for (int j = 0; j < 4; j++) four[j] = at + j < count ? key_of(share.value[4 * q + j]) : 0;
        *(uint4*)(key + at) = {four[0], four[1], four[2], four[3]};
    }
    __syncthreads();
    const int each = (count + parts - 1) / parts, begin = min(each * part, count), end = min(begin + each, count);
    const uint32_t wanted = min(count, k);
    if (each <= kWarps) rank_few<1>(key, count, begin, end, wanted, index);
    else rank_few<2>(key, count, begin, end, wanted, index);
    if (part == 0)
        for (int i = threadIdx.x + wanted; i < k; i += kThreads) index[i] = -1;
}

inline int launch_few(int parts, const float* score, const int64_t* visible, int64_t n, int64_t total, int64_t k,
                      int* index, void* stream) {
    static const int allowed = allow_shared(few_topk_kernel, kAlone);
    if (allowed) return allowed;
    return launch(few_topk_kernel, dim3(n * parts), kThreads, kAlone, stream, score, visible, total, k, parts,
                  index);
}

// CTAs of each of n rows of few, so that all fit on the device at once; 1 where another way is faster.
inline int parts_of_few(int64_t n, int64_t total, int64_t processors) {
    int parts = 1;
    while (parts < 128 && 2 * parts * n <= processors) parts *= 2;
    const int64_t pairs = total <= kCandidates ? 32768 : 65536;  // that a CTA compares
    return total <= kMostFew && total * total <= pairs * parts ? parts : 1;
}

}  // namespace dsv4
