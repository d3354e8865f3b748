// Rows of 4-bit codes times few activation rows: the decode step's inner loop.
//
// A vector of 32-bit words holds eight codes a lane: the low half of lane i has elements
// 8i ... 8i + 3 of a group of 8 * W, the high half 8i + 4 ... 8i + 7. Shifting the halves by 4j
// brings up elements 8i + j and 8i + 4 + j, so activations are laid out in that order once
// (`prepare`). All codes of a lane share one block scale, which multiplies the lane's sum.
//
// With AVX512_BF16 the products are made in pairs: e2m1 is exact in bfloat16, and a float32
// activation is the exact sum of three bfloat16 parts (magnitudes below 2^-110 lose their last
// bits: the instruction takes denormal parts for 0). Elsewhere they are float32 FMAs.
#pragma once

#include "weights.h"

namespace dsv4 {

constexpr int64_t kGroup = 8 * W;       // elements of one vector of words
constexpr int64_t kCodes = 2 * kGroup;  // two groups have up to W scales, decoded together
constexpr int64_t kAhead = 8192;        // bytes of codes to prefetch ahead

#if defined(__AVX512BF16__)

// Words that `padded` activations of `parts` parts take when prepared.
constexpr int64_t prepared_size(int64_t padded, int parts) { return padded / 2 * parts; }

// The next bfloat16 part of `rest`, in the upper half of each lane, which is left with what remains.
// Cutting off the lower half is exact to undo and keeps infinity, which like NaN is one part.
inline u32v next_part(f32v& rest) {
    const u32v infinity = u32v{} + 0x7f800000, zero = {};
    u32v bits = rest != rest ? u32v{} + 0x7fc00000 : bits_as<u32v>(rest) & 0xffff0000;
    u32v left = bits_as<u32v>(rest - bits_as<f32v>(bits));
    rest = bits_as<f32v>((bits & infinity) == infinity ? zero : left);
    return bits;
}

// x [padded] (a multiple of kCodes) -> for each group and j: `parts` vectors of pairs.
inline void prepare(const float* x, int64_t padded, int parts, uint32_t* out) {
    float order[8 * W];  // lane i of vector j is element 8i + j
    for (int64_t first = 0; first < padded; first += kGroup) {
        for (int i = 0; i < W; i++)
            for (int j = 0; j < 8; j++) order[j * W + i] = x[first + 8 * i + j];
        for (int j = 0; j < 4; j++) {
            f32v low = load(order + j * W), high = load(order + (j + 4) * W);
            for (int part = 0; part < parts; part++, out += W) {
                u32v pairs = next_part(high) | (next_part(low) >> 16);
                std::memcpy(out, &pairs, sizeof pairs);
            }
        }
    }
}

// sums[m] += one group's codes times M activation rows, lane by lane.
template <int M, int Parts>
inline void multiply_group(u32v words, const uint32_t* x, int64_t stride, f32v (&sums)[M]) {
    // e2m1 as bfloat16, twice over because five index bits count.
    const uint64_t t0 = 0x3fc03f803f000000, t1 = 0x40c0408040404000, sign = 0x8000800080008000;
    const __m512i table =
        _mm512_setr_epi64(t0, t1, t0 | sign, t1 | sign, t0, t1, t0 | sign, t1 | sign);
    __m512 part[M][Parts] = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i shifted = _mm512_srli_epi16((__m512i)words, 4 * j);
        __m512bh value = (__m512bh)_mm512_permutexvar_epi16(shifted, table);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 3
            for (int p = 0; p < Parts; p++) {
                auto pairs = load_raw<__m512bh>(x + m * stride + (j * Parts + p) * W);
                part[m][p] = _mm512_dpbf16_ps(part[m][p], value, pairs);
            }
    }
    for (int m = 0; m < M; m++)
        for (int p = 0; p < Parts; p++) sums[m] += (f32v)part[m][p];
}

#else

constexpr int64_t prepared_size(int64_t padded, int) { return padded; }

// x [padded] (a multiple of kCodes) -> for each group and j < 8: elements 8i + j, float32.
inline void prepare(const float* x, int64_t padded, int, uint32_t* out) {
    for (int64_t first = 0; first < padded; first += kGroup)
        for (int j = 0; j < 8; j++)
            for (int i = 0; i < W; i++)
                out[first + j * W + i] = bits_as<uint32_t>(x[first + 8 * i + j]);
}

template <int M, int Parts>
inline void multiply_group(u32v words, const uint32_t* x, int64_t stride, f32v (&sums)[M]) {
    f32v low[M] = {}, high[M] = {};  // two sums hide the FMA's latency
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        f32v a, b;
        e2m1_two(words, j, a, b);
        for (int m = 0; m < M; m++) {
            low[m] += a * load_raw<f32v>(x + m * stride + j * W);
            high[m] += b * load_raw<f32v>(x + m * stride + (j + 4) * W);
        }
    }
    for (int m = 0; m < M; m++) sums[m] += low[m] + high[m];
}

#endif

// Scales of two groups, in order. `worst` gathers the largest e4m3 code, to find NaN afterwards:
// the fast decoding does not know it.
template <int Block> inline f32v two_groups_scales(const uint8_t* scales, bytes16& worst) {
    bytes16 code = load_bytes<kCodes / Block>(scales);
    if constexpr (Block == 32) {
        return e8m0(code);
    } else {
        bytes16 magnitude = code & 0x7f;
        worst = magnitude > worst ? magnitude : worst;
        return e4m3_finite(code);
    }
}

// What e4m3_finite leaves to be done to a row's sum: its factor, and NaN if a scale was.
template <int Block> inline float scale_factor(bytes16 worst) {
    typedef int64_t halves __attribute__((vector_size(16)));
    if constexpr (Block == 32) return 1.0f;
    halves nan = bits_as<halves>(worst == 0x7f);
    return nan[0] | nan[1] ? __builtin_nanf("") : 256.0f;
}

// totals[m] += two groups of one row, scaled.
template <int M, int Parts, int Block>
inline void two_groups(const uint8_t* codes, const uint8_t* scales, const uint32_t* x,
                       int64_t stride, bytes16& worst, f32v (&totals)[M]) {
    f32v both = two_groups_scales<Block>(scales, worst);
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
        f32v sums[M] = {};
        const uint32_t* xg = x + g * prepared_size(kGroup, Parts);
        multiply_group<M, Parts>(load_raw<u32v>(codes + g * kGroup / 2), xg, stride, sums);
        i32v own;  // lane i's scale
        for (int i = 0; i < W; i++) own[i] = g * (kGroup / Block) + 8 * i / Block;
        f32v scale = __builtin_shuffle(both, own);
        for (int m = 0; m < M; m++) totals[m] += sums[m] * scale;
    }
}

// out[r][m] = row r of R consecutive weight rows times prepared activation row m. Prefetching
// follows the order of memory even where two rows are read in turn: the pages come one by one.
template <int R, int M, int Parts, int Block>
void dot_rows(const E2m1Row<Block>& row, int64_t k, const uint32_t* x, int64_t stride,
              float (&out)[R][M]) {
    f32v totals[R][M] = {};
    bytes16 worst[R] = {};
    int64_t i = 0;
    for (; i + kCodes <= k; i += kCodes)
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            const uint8_t* ahead = row.codes + kAhead + i / 2 * R + r * (kCodes / 2);
            for (int64_t line = 0; line < kCodes / 2; line += 64) __builtin_prefetch(ahead + line);
            two_groups<M, Parts, Block>(row.codes + r * (k / 2) + i / 2,
                                        row.scales + (r * k + i) / Block,
                                        x + prepared_size(i, Parts), stride, worst[r], totals[r]);
        }
    for (int r = 0; r < R && i < k; r++) {  // the last codes and scales, with zeros behind them
        uint8_t codes[kCodes / 2] = {}, scales[kCodes / Block] = {};
        std::memcpy(codes, row.codes + r * (k / 2) + i / 2, (k - i) / 2);
        std::memcpy(scales, row.scales + (r * k + i) / Block, (k - i) / Block);
        two_groups<M, Parts, Block>(codes, scales, x + prepared_size(i, Parts), stride, worst[r],
                                    totals[r]);
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) out[r][m] = sum(totals[r][m]) * scale_factor<Block>(worst[r]);
}

}  // namespace dsv4
