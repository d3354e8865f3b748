// fp16 operands for products of few activation rows: fewer instructions a weight than bf16, so that the
// stream from memory and not the decoding sets the pace.
//
// Each activation row is multiplied by a power of two that brings its largest element near 2^14:
// bf16's eight bits stay exact down to 2^-31 of the largest, and what is smaller is off by no more than
// 2^-39 of it. In fp16 an e2m1 code is one byte (e5m2, times 2^-14) and e4m3 converts in one
// instruction.
#pragma once

#include "stream.cuh"

namespace dsv4 {

__device__ inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline uint32_t multiply_fp16(uint32_t a, uint32_t b) {  // two fp16 each
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// What a policy needs here: its element factor, and the scales of the two halves of a chunk.
template <class Policy> struct Half;

// Eight e2m1 codes -> pairs of fp16 times 2^-14: (0, 2), (4, 6), (1, 3), (5, 7).
struct HalfFp4 {
    static constexpr bool kPermuted = true;
    static constexpr float kFactor = 16384;

    __host__ __device__ static void operand(uint32_t codes, uint32_t (&a)[4]) {
        constexpr uint32_t kSigns = 0x80808080u, kMagnitudes = 0x0E0E0E0Eu;
        uint32_t even = ((codes << 4) & kSigns) | ((codes << 1) & kMagnitudes);
        uint32_t odd = (codes & kSigns) | ((codes >> 3) & kMagnitudes);
        a[0] = select_bytes(even, 0, 0x1404);
        a[1] = select_bytes(even, 0, 0x3424);
        a[2] = select_bytes(odd, 0, 0x1404);
        a[3] = select_bytes(odd, 0, 0x3424);
    }
};
template <> struct Half<Nvfp4> : HalfFp4 {
    static constexpr float kScaleUp = 128;  // of scale_halves, so that no product with a code is inexact

    __device__ static float2 scales(uint16_t codes) { return e4m3_pair(codes); }
    __device__ static uint32_t scale_halves(uint16_t codes) {
        constexpr uint32_t kUp = 0x58005800u;  // kScaleUp, twice
        return multiply_fp16(e4m3_halves(codes), kUp);
    }
};
template <> struct Half<Mxfp4> : HalfFp4 {
    __device__ static float2 scales(uint8_t code) {
        float scale = __uint_as_float(e8m0_bits(code));
        return make_float2(scale, scale);
    }
};
template <class Stored> struct Half<Fp8<Stored>> {
    static constexpr bool kPermuted = false;
    static constexpr float kFactor = 1;

    __device__ static void operand(uint32_t codes, uint32_t (&a)[2]) {
        // The instruction takes either half of a register: no shift.
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
            "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
            : "=r"(a[0]), "=r"(a[1])
            : "r"(codes));
    }
};

// ---------------------------------------------------------------- activations

// The power of two that a row of activations is multiplied by, from its largest finite magnitude.
struct RowScale {
    // `peak`: the bits of that magnitude as a float. No more than 126, so that one factor undoes it: below
    // 2^-112 even a subnormal bf16 times 2^126 is a normal fp16.
    __device__ static int exponent_of(uint32_t peak) { return min(141 - (int)(peak >> 23), 126); }
    __device__ static float power(int e) { return __uint_as_float((uint32_t)(127 + e) << 23); }
    __device__ static float undo(float x, int e) { return x * power(-e); }
};

// The largest finite magnitude among eight bf16, as float bits.
__device__ inline uint32_t largest_of(const uint4& x) {
    // In 16 signed bits what is not finite becomes less than zero is.
    constexpr uint32_t kOne = 0x0080, kPair = kOne << 16 | kOne, kMagnitudes = 0x7FFF7FFF;
    uint32_t most = kPair;
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; j++) most = __viaddmax_s16x2(words[j] & kMagnitudes, kPair, most);
    return (max(most >> 16, most & 0xFFFF) - kOne) << 16;
}

// Eight bf16 -> fp16 of them times 2^exponent, permuted as HalfFp4's operands or as they are.
template <bool kPermuted> __device__ inline uint4 to_halves(const uint4& x, int exponent) {
    const float factor = RowScale::power(exponent);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
    float f[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint32_t bits = j % 2 ? words[j / 2] & 0xFFFF0000u : words[j / 2] << 16;
        f[j] = __uint_as_float(bits) * factor;
    }
    auto both = [](float low, float high) {
        __half2 h = __floats2half2_rn(low, high);
        return *reinterpret_cast<uint32_t*>(&h);
    };
    if (kPermuted)
        return make_uint4(both(f[0], f[2]), both(f[4], f[6]), both(f[1], f[3]), both(f[5], f[7]));
    return make_uint4(both(f[0], f[1]), both(f[2], f[3]), both(f[4], f[5]), both(f[6], f[7]));
}

}  // namespace dsv4
