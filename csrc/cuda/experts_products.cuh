// One warp's products for experts of few pairs: 16 weight rows times up to eight pairs, a chunk of
// columns for each member of a quad (decode.cuh), in fp16 (halves.cuh) or bf16.
#pragma once

#include <type_traits>

#include "experts.cuh"
#include "halves.cuh"

namespace dsv4 {

template <class Policy> constexpr bool kRowScales = std::is_base_of_v<Fp4Chunk, Policy>;

// NVFP4 is always multiplied in fp16, which takes fewer instructions: e2m1 * 2^-14 * e4m3 is exact there,
// and activations are as halves.cuh says. The scales of MXFP4 have too wide a range for that.
template <class Policy> constexpr bool kInHalves = std::is_same_v<Policy, Nvfp4>;

// Up to two pairs leave columns of the second operand free: column 2 m + t has pair t's activations for
// the chunk of member m of a quad, and zeros for the others. The sums of a thread are then those of its
// own chunk, and the scales multiply these and not the weights. 0: never done.
template <class Policy> constexpr int kMostSplit = kRowScales<Policy> ? 2 : 0;

template <class Policy> struct FewProducts {
    using Scale = typename Policy::Scale;
    static constexpr int kVectors = Policy::kChunk / 8;  // 16 bytes of activations, a chunk

    // Eight columns of a pair in the order of the products.
    __device__ static uint4 operand_order(bool halves, const uint4& v, uint32_t peak) {
        if constexpr (kRowScales<Policy>)
            if (halves) return to_halves<true>(v, RowScale::exponent_of(peak));
        if constexpr (kRowScales<Policy> && !kInHalves<Policy>) {
            const uint4 twice[2] = {v, v};
            uint32_t b[Policy::kProducts][2];
            Policy::column(twice, b);
            return make_uint4(b[0][0], b[0][1], b[1][0], b[1][1]);
        }
        return v;
    }

    // sum += two rows' codes times b, by column.
    template <bool kSplit>
    __device__ static void multiply(const uint4 (&codes)[2], const Scale (&scales)[2],
                                    const uint4 (&b)[kVectors], float (&sum)[4]) {
        if constexpr (kSplit) multiply_split(codes, scales, b, sum);
        else if constexpr (kInHalves<Policy>) multiply_halves(codes, scales, b, sum);
        else multiply_codes(codes, scales, b, sum);
    }

  private:
    __device__ static void multiply_split(const uint4 (&codes)[2], const Scale (&scales)[2],
                                          const uint4 (&b)[kVectors], float (&sum)[4]) {
        constexpr int kBlocks = std::is_same_v<Policy, Nvfp4> ? 2 : 1;  // of a scale, in a chunk
        const uint32_t words[2][4] = {{codes[0].x, codes[0].y, codes[0].z, codes[0].w},
                                      {codes[1].x, codes[1].y, codes[1].z, codes[1].w}};
        const float2 both[2] = {Half<Policy>::scales(scales[0]), Half<Policy>::scales(scales[1])};
#pragma unroll
        for (int block = 0; block < kBlocks; block++) {
            float part[4] = {};
#pragma unroll
            for (int i = 4 / kBlocks * block; i < 4 / kBlocks * (block + 1); i++) {
                uint32_t a[2][4];
                HalfFp4::operand(words[0][i], a[0]);
                HalfFp4::operand(words[1][i], a[1]);
                mma_half(part, a[0][0], a[1][0], a[0][1], a[1][1], b[i].x, b[i].y);
                mma_half(part, a[0][2], a[1][2], a[0][3], a[1][3], b[i].z, b[i].w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[i] += part[i] * (block == 0 ? both[i / 2].x : both[i / 2].y);
        }
    }

    __device__ static void multiply_halves(const uint4 (&codes)[2], const uint16_t (&scales)[2],
                                           const uint4 (&b)[kVectors], float (&sum)[4]) {
        uint32_t factors[2][2];  // [row][half of the chunk]
        const uint32_t words[2][4] = {{codes[0].x, codes[0].y, codes[0].z, codes[0].w},
                                      {codes[1].x, codes[1].y, codes[1].z, codes[1].w}};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t both = e4m3_halves(scales[h]);
            factors[h][0] = select_bytes(both, both, 0x1010);
            factors[h][1] = select_bytes(both, both, 0x3232);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                HalfFp4::operand(words[h][i], a[h]);
#pragma unroll
                for (int j = 0; j < 4; j++) a[h][j] = times(a[h][j], factors[h][i / 2]);
            }
            mma_half(sum, a[0][0], a[1][0], a[0][1], a[1][1], b[i].x, b[i].y);
            mma_half(sum, a[0][2], a[1][2], a[0][3], a[1][3], b[i].z, b[i].w);
        }
    }
    __device__ static uint32_t times(uint32_t a, uint32_t b) {  // two fp16 each
        uint32_t r;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }

    __device__ static void multiply_codes(const uint4 (&codes)[2], const Scale (&scales)[2],
                                          const uint4 (&b)[kVectors], float (&sum)[4]) {
        float part[4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[2][Policy::kProducts][2];
#pragma unroll
            for (int h = 0; h < 2; h++)
                Policy::operand(half == 0 ? make_uint2(codes[h].x, codes[h].y)
                                          : make_uint2(codes[h].z, codes[h].w),
                                scales[h], half, a[h]);
#pragma unroll
            for (int j = 0; j < Policy::kProducts; j++) {
                int p = half * Policy::kProducts + j;
                const uint4& v = b[p / 2];
                mma(Policy::kBlockScale ? part : sum, a[0][j][0], a[1][j][0], a[0][j][1],
                    a[1][j][1], p % 2 ? v.z : v.x, p % 2 ? v.w : v.y);
            }
        }
        if constexpr (Policy::kBlockScale)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += part[i] * scales[i / 2];
    }
};

}  // namespace dsv4
