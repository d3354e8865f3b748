// Vectors of W floats, on the compiler's generic vectors: the same source serves every ISA.
// Comparisons are written so that NaN survives: `x < lo ? lo : x` keeps a NaN x.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dsv4 {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * W)));
typedef int32_t i32v __attribute__((vector_size(4 * W)));
typedef uint32_t u32v __attribute__((vector_size(4 * W)));
typedef uint16_t u16v __attribute__((vector_size(2 * W)));
typedef uint8_t bytes16 __attribute__((vector_size(16)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V> inline V load_raw(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline f32v splat(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#else
    return f32v{x, x, x, x};
#endif
}

// ---------------------------------------------------------------- loads and stores

inline f32v load(const float* p) { return load_raw<f32v>(p); }

inline f32v load(const bf16* p) {
    return bits_as<f32v>(__builtin_convertvector(load_raw<u16v>(p), u32v) << 16);
}

// Half precision by bits where there is no instruction: the exponent is rebased by a product,
// which also normalises subnormals; infinities and NaN get the largest exponent by hand.
inline f32v load(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load_raw<__m256i>(p));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(load_raw<__m128i>(p));
#else
    u32v h = __builtin_convertvector(load_raw<u16v>(p), u32v);
    u32v magnitude = (h & 0x7fff) << 13;
    f32v finite = bits_as<f32v>(magnitude) * 0x1p112f;
    u32v special = magnitude | 0x7f800000;
    i32v is_special = (h & 0x7c00) == 0x7c00;
    u32v bits = is_special ? special : bits_as<u32v>(finite);
    return bits_as<f32v>(bits | ((h & 0x8000) << 16));
#endif
}

// `Count` <= 16 bytes, zeros behind them. Short ones go through a register: building the vector in
// memory would stall its load.
template <int Count> inline bytes16 load_bytes(const void* p) {
    typedef uint64_t words __attribute__((vector_size(16)));
    if constexpr (Count == 16) return load_raw<bytes16>(p);
    uint64_t low = 0;
    std::memcpy(&low, p, Count < 8 ? Count : 8);
    return bits_as<bytes16>(words{low, 0});
}

inline void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even; NaN stays NaN (adding to its bits could turn it into infinity).
inline void store(bf16* p, f32v v) {
    u32v bits = bits_as<u32v>(v);
    u32v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    i32v is_nan = v != v;
    u32v quiet = u32v{} + 0x7fc0;
    u16v half = __builtin_convertvector(is_nan ? quiet : rounded, u16v);
    std::memcpy(p, &half, sizeof half);
}

// The first `count` < W elements, the rest zero: what lies behind them is not touched.
template <class T> inline f32v load_part(const T* p, int64_t count) {
    T padded[W] = {};
    std::memcpy(padded, p, count * sizeof(T));
    return load(padded);
}

template <class T> inline void store_part(T* p, f32v v, int64_t count) {
    T padded[W];
    store(padded, v);
    std::memcpy(p, padded, count * sizeof(T));
}

template <class T> inline f32v load_upto(const T* p, int64_t count) {
    return count >= W ? load(p) : load_part(p, count);
}

template <class T> inline void store_upto(T* p, f32v v, int64_t count) {
    if (count >= W) store(p, v);
    else store_part(p, v, count);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) {
    uint32_t bits = bits_as<uint32_t>(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    p->bits = x != x ? 0x7fc0 : uint16_t(rounded);
}

// `count` elements from one type to another.
template <class To, class From> inline void convert(To* to, const From* from, int64_t count) {
    for (int64_t i = 0; i < count; i += W)
        store_upto(to + i, load_upto(from + i, count - i), count - i);
}

// ---------------------------------------------------------------- arithmetic

template <int S> inline f32v swap_lanes(f32v v) {
    i32v lane;
    for (int i = 0; i < W; i++) lane[i] = i ^ S;
    return __builtin_shuffle(v, lane);
}

inline float sum(f32v v) {
#if defined(__AVX512F__)
    v += swap_lanes<8>(v);
#endif
#if defined(__AVX2__)
    v += swap_lanes<4>(v);
#endif
    v += swap_lanes<2>(v);
    v += swap_lanes<1>(v);
    return v[0];
}

// e^x to about 1 ulp: x = n ln2 + r, a polynomial in r, and 2^n in two factors so that results
// below 2^-126 come out denormal instead of zero. -inf gives 0, NaN stays NaN.
inline f32v exp(f32v x) {
    const f32v low = splat(-104.0f), high = splat(89.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const f32v magic = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits
    f32v shifted = x * 1.44269504088896341f + magic;
    f32v n = shifted - magic;
    i32v whole = bits_as<i32v>(shifted) - bits_as<i32v>(magic);
    f32v r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    f32v p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i32v half = whole >> 1, rest = whole - half;
    return p * bits_as<f32v>((half + 127) << 23) * bits_as<f32v>((rest + 127) << 23);
}

// ---------------------------------------------------------------- small floats

// The first W of 16 e4m3 codes, divided by 256, and NaN taken for 480. Shifted into place, a code
// is a half-precision number 2^8 too small, subnormals included. Without a conversion from half,
// the same with floats, through denormals.
inline f32v e4m3_finite(bytes16 code) {
#if defined(__AVX512F__)
    __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16((__m128i)code), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(int16_t(0xbf80))));
#elif defined(__AVX2__)
    __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16((__m128i)code), 7);
    return _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(int16_t(0xbf80))));
#else
    u32v byte = {code[0], code[1], code[2], code[3]};
    return bits_as<f32v>(((byte & 0x7f) << 20) | ((byte & 0x80) << 24)) * 0x1p112f;
#endif
}

// The first W of 16 e4m3 codes; 0x7f and 0xff are NaN.
inline f32v e4m3(bytes16 code) {
    f32v value = e4m3_finite(code) * 256.0f;
    i32v is_nan = (bits_as<i32v>(value) & 0x7fffffff) == bits_as<int32_t>(480.0f);
    return is_nan ? bits_as<f32v>(i32v{} + 0x7fc00000) : value;
}

// 2^(code - 127); 0 is a denormal, 255 is NaN.
inline float e8m0(uint8_t code) {
    uint32_t bits = code == 0 ? 0x00400000u : code == 255 ? 0x7fc00000u : uint32_t(code) << 23;
    return bits_as<float>(bits);
}

// The first W of 16 e8m0 codes.
inline f32v e8m0(bytes16 code) {
#if defined(__AVX512F__)
    u32v byte = (u32v)_mm512_cvtepu8_epi32((__m128i)code);
#elif defined(__AVX2__)
    u32v byte = (u32v)_mm256_cvtepu8_epi32((__m128i)code);
#else
    u32v byte = {code[0], code[1], code[2], code[3]};
#endif
    u32v bits = byte == 0 ? u32v{} + 0x00400000 : byte << 23;
    return bits_as<f32v>(byte == 255 ? u32v{} + 0x7fc00000 : bits);
}

// e2m1 in the low four bits of each lane; the bits above are ignored.
inline f32v e2m1(u32v code) {
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3,
                                        -4, -6);
    return _mm512_permutexvar_ps((__m512i)code, table);
#elif defined(__AVX2__)
    const __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
    f32v magnitude = _mm256_permutevar8x32_ps(table, (__m256i)code);  // looks at three bits only
    return bits_as<f32v>(bits_as<u32v>(magnitude) ^ ((code << 28) & 0x80000000u));
#else
    u32v bits = ((code & 7) << 22) | ((code & 8) << 28);
    return bits_as<f32v>(bits) * 0x1p126f;
#endif
}

// Codes j and j + 4 of words of eight e2m1 codes, j < 4, are the low nibbles of the two halves of
// a lane once these are shifted: one shift serves both.
#if defined(__AVX512F__)
// Both as bfloat16, in their halves; of the halves masked out, 0. The table of sixteen values is
// there twice because five index bits count.
inline __m512i e2m1_pairs(u32v words, int j, __mmask32 halves = 0xffffffff) {
    const uint64_t t0 = 0x3fc03f803f000000, t1 = 0x40c0408040404000, sign = 0x8000800080008000;
    const __m512i table =
        _mm512_setr_epi64(t0, t1, t0 | sign, t1 | sign, t0, t1, t0 | sign, t1 | sign);
    __m512i shifted = _mm512_srli_epi16((__m512i)words, 4 * j);
    return _mm512_maskz_permutexvar_epi16(halves, shifted, table);
}
#endif

// Both as floats. A bfloat16 with zeros below it is a float.
inline void e2m1_two(u32v words, int j, f32v& low, f32v& high) {
#if defined(__AVX512F__)
    low = e2m1((u32v)_mm512_srli_epi16((__m512i)words, 4 * j));
    high = (f32v)e2m1_pairs(words, j, 0xaaaaaaaa);
#else
    low = e2m1(words >> (4 * j));
    high = e2m1(words >> (4 * j + 16));
#endif
}

}  // namespace dsv4
