// Rows of 4-bit codes times few activation rows: the decode step's inner loop.
//
// A vector of 32-bit words holds eight codes a lane: the low half of lane i has elements
// 8i ... 8i + 3 of a group of 8 * W, the high half 8i + 4 ... 8i + 7. Shifting the halves by 4j
// brings up elements 8i + j and 8i + 4 + j, so activations are laid out in that order once
// (`prepare`). All codes of a lane share one block scale, which multiplies the lane's sum.
//
// Products are float32 FMAs; bfloat16 activations, where AVX512_BF16 is there, are multiplied in
// pairs, since e2m1 is exact in bfloat16 (the instruction takes denormal activations for 0).
#pragma once

#include "weights.h"

namespace dsv4 {

constexpr int64_t kGroup = 8 * W;       // elements of one vector of words
constexpr int64_t kCodes = 2 * kGroup;  // two groups have up to W scales, decoded together
constexpr int64_t kAhead = 8192;        // bytes of codes to prefetch ahead

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// 32-bit words that `count` prepared activations take, as pairs of bfloat16 or as float32.
constexpr int64_t prepared_size(int64_t count, bool pairs) { return pairs ? count / 2 : count; }

// x [padded] (a multiple of kCodes) -> for each group: vector j < 8 of elements 8i + j, or, as
// pairs, vector j < 4 of elements 8i + j (low) and 8i + 4 + j (high). x is bfloat16-valued then.
inline void prepare(const float* x, int64_t padded, bool pairs, uint32_t* out) {
    for (int64_t first = 0; first < padded; first += kGroup) {
        uint32_t order[8][W];
        for (int i = 0; i < W; i++)
            for (int j = 0; j < 8; j++) order[j][i] = bits_as<uint32_t>(x[first + 8 * i + j]);
        for (int j = 0; pairs && j < 4; j++, out += W) {
            u32v word = load_raw<u32v>(order[j]) >> 16 | load_raw<u32v>(order[j + 4]);
            std::memcpy(out, &word, sizeof word);
        }
        if (pairs) continue;
        std::memcpy(out, order, sizeof order);
        out += kGroup;
    }
}

// sums[r][m] += one group of codes of R rows times M activation rows, lane by lane.
template <int R, int M>
inline void multiply_floats(const u32v (&words)[R], const uint32_t* x, int64_t stride,
                            f32v (&sums)[R][M]) {
    f32v low[R][M] = {}, high[R][M] = {};  // two sums hide the FMA's latency
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        f32v a[R], b[R];
        for (int r = 0; r < R; r++) e2m1_two(words[r], j, a[r], b[r]);
        for (int m = 0; m < M; m++) {
            f32v x_low = load_raw<f32v>(x + m * stride + j * W);
            f32v x_high = load_raw<f32v>(x + m * stride + (j + 4) * W);
            for (int r = 0; r < R; r++) {
                low[r][m] += a[r] * x_low;
                high[r][m] += b[r] * x_high;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = low[r][m] + high[r][m];
}

#if defined(__AVX512BF16__)
template <int R, int M>
inline void multiply_pairs(const u32v (&words)[R], const uint32_t* x, int64_t stride,
                           f32v (&sums)[R][M]) {
    __m512 totals[R][M] = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        for (int r = 0; r < R; r++) {
            auto value = (__m512bh)e2m1_pairs(words[r], j);
            for (int m = 0; m < M; m++) {
                auto pairs = load_raw<__m512bh>(x + m * stride + j * W);
                totals[r][m] = _mm512_dpbf16_ps(totals[r][m], value, pairs);
            }
        }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = (f32v)totals[r][m];
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

// totals[r][m] += two groups of R rows, scaled. The rows' codes and scales are `k` elements apart.
template <int R, int M, bool Pairs, int Block>
inline void two_groups(const uint8_t* codes, const uint8_t* scales, int64_t k, const uint32_t* x,
                       int64_t stride, bytes16 (&worst)[R], f32v (&totals)[R][M]) {
    f32v both[R];
    for (int r = 0; r < R; r++)
        both[r] = two_groups_scales<Block>(scales + r * (k / Block), worst[r]);
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
        u32v words[R];
        for (int r = 0; r < R; r++)
            words[r] = load_raw<u32v>(codes + r * (k / 2) + g * kGroup / 2);
        f32v sums[R][M];
        const uint32_t* xg = x + g * prepared_size(kGroup, Pairs);
#if defined(__AVX512BF16__)
        if constexpr (Pairs) multiply_pairs(words, xg, stride, sums);
        else multiply_floats(words, xg, stride, sums);
#else
        multiply_floats(words, xg, stride, sums);
#endif
        i32v own;  // lane i's scale
        for (int i = 0; i < W; i++) own[i] = g * (kGroup / Block) + 8 * i / Block;
        for (int r = 0; r < R; r++) {
            f32v scale = __builtin_shuffle(both[r], own);
            for (int m = 0; m < M; m++) totals[r][m] += sums[r][m] * scale;
        }
    }
}

// out[r][m] = row r of R consecutive weight rows times prepared activation row m. Prefetching
// follows the order of memory even where two rows are read in turn, so that pages come one by one.
template <int R, int M, bool Pairs, int Block>
void dot_rows(const E2m1Row<Block>& row, int64_t k, const uint32_t* x, int64_t stride,
              float (&out)[R][M]) {
    f32v totals[R][M] = {};
    bytes16 worst[R] = {};
    int64_t i = 0;
    for (; i + kCodes <= k; i += kCodes) {
        for (int64_t line = 0; line < R * kCodes / 2; line += 64)
            __builtin_prefetch(row.codes + kAhead + i / 2 * R + line);
        two_groups<R, M, Pairs, Block>(row.codes + i / 2, row.scales + i / Block, k,
                                       x + prepared_size(i, Pairs), stride, worst, totals);
    }
    if (i < k) {  // the last codes and scales, with zeros behind them
        uint8_t codes[R][kCodes / 2] = {}, scales[R][kCodes / Block] = {};
        for (int r = 0; r < R; r++) {
            std::memcpy(codes[r], row.codes + r * (k / 2) + i / 2, (k - i) / 2);
            std::memcpy(scales[r], row.scales + (r * k + i) / Block, (k - i) / Block);
        }
        two_groups<R, M, Pairs, Block>(codes[0], scales[0], kCodes, x + prepared_size(i, Pairs),
                                       stride, worst, totals);
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) out[r][m] = sum(totals[r][m]) * scale_factor<Block>(worst[r]);
}

}  // namespace dsv4
