// Activation rows as the tiles of many pairs take them: columns in places, and fp16 where weights are.
//
// Weights of NVFP4 are multiplied in fp16, which takes fewer instructions to decode than bf16: halves.cuh.
// Each row is then times a power of two, and `undo` [rows] takes it back.
#pragma once

#include "experts.cuh"
#include "halves.cuh"

namespace dsv4 {

constexpr int kManyColumns = 128;
constexpr int kRowsOfBlock = 32;  // a warp each

// Where column c of every 128 lies: beside the column whose code is decoded into the same register.
__host__ __device__ inline int place_of(int c) {
    int member = c / 32, word = c / 8 % 4, pair = c % 4, second = c / 4 % 2;
    return (2 * word + pair / 2) * 16 + pair % 2 * 8 + 2 * member + second;
}

// Eight neighbouring values from `column` on to their places among those of their 128.
__device__ inline void place_vector(const uint4& v, int column, bf16* group) {
    const uint32_t pairs[4] = {select_bytes(v.x, v.z, 0x5410), select_bytes(v.x, v.z, 0x7632),
                               select_bytes(v.y, v.w, 0x5410), select_bytes(v.y, v.w, 0x7632)};
#pragma unroll
    for (int j = 0; j < 4; j++) *(uint32_t*)(group + place_of(column + j)) = pairs[j];
}

// One warp: to = the row `from`, its columns in places if kPlaced, in fp16 if kHalves. May be in place.
// columns: a multiple of 128.
template <bool kPlaced, bool kHalves>
__device__ inline void convert_row(const bf16* from, bf16* to, int columns, float* undo) {
    __shared__ uint4 placed[kPlaced ? kRowsOfBlock : 1][32];
    const int lane = threadIdx.x % 32, vectors = columns / 8;
    uint4* const mine = placed[kPlaced ? threadIdx.x / 32 : 0];
    int exponent = 0;
    if constexpr (kHalves) {
        uint32_t peak = 0;
#pragma unroll 4
        for (int i = lane; i < vectors; i += 32) peak = max(peak, largest_of(((const uint4*)from)[i]));
        exponent = RowScale::exponent_of(__reduce_max_sync(~0u, peak));
        if (lane == 0) *undo = RowScale::undo(1, exponent);
    }
#pragma unroll 4
    for (int first = 0; first < vectors; first += 32) {
        const int i = first + lane;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (i < vectors) v = ((const uint4*)from)[i];
        if constexpr (kHalves) v = to_halves<false>(v, exponent);
        if constexpr (kPlaced) {
            __syncwarp();
            place_vector(v, lane % 16 * 8, (bf16*)(mine + lane / 16 * 16));
            __syncwarp();
            v = mine[lane];
        }
        if (i < vectors) ((uint4*)to)[i] = v;
    }
}

// Rows of [rows, columns] to fp16, in place.
static __global__ void __launch_bounds__(32 * kRowsOfBlock)
    halve_kernel(bf16* x, float* undo, int64_t rows, int columns) {
    let_next_start();
    wait_for_previous();
    const int64_t row = blockIdx.x * (int64_t)kRowsOfBlock + threadIdx.x / 32;
    if (row < rows) convert_row<false, true>(x + row * columns, x + row * columns, columns, undo + row);
}

// ---------------------------------------------------------------- weights, in the same order

// Eight e2m1 codes -> the pairs of e2m1_pairs in fp16, times 2^-14.
__host__ __device__ inline void e2m1_half_pairs(uint32_t codes, uint32_t (&pair)[4]) {
    constexpr uint32_t kSigns = 0x80808080u, kMagnitudes = 0x0E0E0E0Eu;
    const uint32_t even = ((codes << 4) & kSigns) | ((codes << 1) & kMagnitudes);
    const uint32_t odd = (codes & kSigns) | ((codes >> 3) & kMagnitudes);
    pair[0] = select_bytes(even, 0, 0x2404);
    pair[1] = select_bytes(odd, 0, 0x2404);
    pair[2] = select_bytes(even, 0, 0x3414);
    pair[3] = select_bytes(odd, 0, 0x3414);
}

__device__ inline uint32_t multiply_halves(uint32_t a, uint32_t b) {  // two fp16 each
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// What a weight is multiplied as, and the operands of the two products that eight codes take part in.
template <class Policy, bool kHalves> struct ManyOperand {
    static constexpr float kFactor = Policy::kFactor;
    __device__ static uint32_t factor(typename Policy::Scale scale, int half) {
        return Policy::factor(scale, half);
    }
    __device__ static void decode(uint32_t codes, uint32_t factor, uint32_t (&a)[2][2]) {
        Policy::template scaled_pairs<Policy>(codes, factor, a);
    }
};

template <> struct ManyOperand<Nvfp4, true> {
    static constexpr float kFactor = HalfFp4::kFactor;
    __device__ static uint32_t factor(uint16_t scales, int half) {
        const uint32_t both = e4m3_halves(scales);
        return select_bytes(both, both, half == 0 ? 0x1010 : 0x3232);
    }
    __device__ static void decode(uint32_t codes, uint32_t factor, uint32_t (&a)[2][2]) {
        uint32_t pair[4];
        e2m1_half_pairs(codes, pair);
#pragma unroll
        for (int j = 0; j < 4; j++) a[j / 2][j % 2] = multiply_halves(pair[j], factor);
    }
};

}  // namespace dsv4
