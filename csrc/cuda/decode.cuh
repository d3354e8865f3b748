// Weights from 16 bytes as stored to bf16 operands of the matrix unit, one policy per format.
//
// A thread holds 16 consecutive bytes of one weight row: kChunk columns. mma.m16n8k16 sums over k,
// so any order of columns serves as long as both operands use it. Here each of the four threads of a
// quad brings its own chunk: in product j of a chunk the quad multiplies four columns of each of four
// chunks. `operand` gives the thread's columns of a weight row for the products of half a chunk (8
// bytes), and `column` the same columns of an activation row.
#pragma once

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {

__device__ inline uint32_t multiply(uint32_t a, uint32_t b) {  // two bf16 each
    uint32_t r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

__device__ inline uint32_t pair_of(float low, float high) {  // two bf16
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Two e4m3 -> two fp16, exactly, NaN included.
__device__ inline uint32_t e4m3_halves(uint16_t codes) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
    return halves;
}
__device__ inline float2 e4m3_pair(uint16_t codes) {
    uint32_t halves = e4m3_halves(codes);
    return __half22float2(*reinterpret_cast<__half2*>(&halves));
}

// e8m0 -> float: 2^(code - 127); code 0 is a subnormal, 255 is NaN.
__host__ __device__ inline uint32_t e8m0_bits(uint32_t code) {
    return code == 255 ? 0x7FC00000u : code == 0 ? 0x00400000u : code << 23;
}

// Eight e2m1 codes -> four pairs of bf16, each code i beside code i + 4, times 2^-126. The two
// exponent bits and the mantissa bit keep their meaning at the bottom of bf16's fields, where 0.5
// is a subnormal.
constexpr uint32_t kSign = 0x80008000u, kMagnitude = 0x01C001C0u;
__host__ __device__ inline void e2m1_pairs(uint32_t x, uint32_t (&pair)[4]) {
    pair[0] = ((x << 12) & kSign) | ((x << 6) & kMagnitude);
    pair[1] = ((x << 8) & kSign) | ((x << 2) & kMagnitude);
    pair[2] = ((x << 4) & kSign) | ((x >> 2) & kMagnitude);
    pair[3] = (x & kSign) | ((x >> 6) & kMagnitude);
}

constexpr float kUp119 = 6.64613997892457936e35f;  // 2^119
constexpr uint32_t kUp126Pair = 0x7E807E80u;       // 2^126, twice

// The part that both 4-bit formats share.
struct Fp4Chunk {
    static constexpr int kChunk = 32;   // columns of 16 bytes
    static constexpr int kProducts = 4;  // matrix products of half a chunk
    static constexpr int kDepth = 3;     // steps that loads run ahead: what registers allow
    static constexpr bool kBlockScale = false;

    // x in the order of e2m1_pairs: columns (0, 4), (1, 5) and (2, 6), (3, 7) of every eight.
    __host__ __device__ static void column(const uint4 (&x)[2], uint32_t (&b)[kProducts][2]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            b[2 * i][0] = select_bytes(x[i].x, x[i].z, 0x5410);
            b[2 * i][1] = select_bytes(x[i].x, x[i].z, 0x7632);
            b[2 * i + 1][0] = select_bytes(x[i].y, x[i].w, 0x5410);
            b[2 * i + 1][1] = select_bytes(x[i].y, x[i].w, 0x7632);
        }
    }

    // Operands of the two products that eight codes take part in.
    template <class Policy>
    __device__ static void scaled_pairs(uint32_t codes, uint32_t factor, uint32_t (&a)[2][2]) {
        uint32_t pair[4];
        e2m1_pairs(codes, pair);
#pragma unroll
        for (int j = 0; j < 4; j++) a[j / 2][j % 2] = Policy::scaled(pair[j], factor);
    }
    template <class Policy>
    __device__ static void scaled_pairs(uint2 codes, uint32_t factor,
                                        uint32_t (&a)[kProducts][2]) {
        uint32_t two[2][2][2];
        scaled_pairs<Policy>(codes.x, factor, two[0]);
        scaled_pairs<Policy>(codes.y, factor, two[1]);
#pragma unroll
        for (int j = 0; j < 4; j++) a[j][0] = two[j / 2][j % 2][0], a[j][1] = two[j / 2][j % 2][1];
    }
};

// e2m1 * e4m3 is exact in bf16 (6 bits). 2^-126 from e2m1_pairs and 2^119 in the scale leave 2^-7.
struct Nvfp4 : Fp4Chunk {
    static constexpr int kHalvesAtOnce = 2;
    using Scale = uint16_t;  // two e4m3, one for every 16 columns
    static constexpr float kFactor = 128;

    __device__ static const Scale* scale_row(const dsv4_weight& w, int64_t row) {
        return (const Scale*)((const char*)w.scale + row * (w.k / 16));
    }
    __device__ static Scale load_scale(const Scale* row, int chunk) { return __ldg(row + chunk); }

    // Both halves of the result: the scale of half a chunk.
    __device__ static uint32_t factor(Scale scales, int half) {
        float2 both = e4m3_pair(scales);
        float scale = (half == 0 ? both.x : both.y) * kUp119;
        return pair_of(scale, scale);
    }
    __device__ static uint32_t scaled(uint32_t pair, uint32_t factor) {
        return multiply(pair, factor);
    }
    __device__ static void operand(uint2 codes, Scale scales, int half,
                                   uint32_t (&a)[kProducts][2]) {
        scaled_pairs<Nvfp4>(codes, factor(scales, half), a);
    }
};

// The scale may reach 2^127, so 2^126 and the scale are two products.
struct Mxfp4 : Fp4Chunk {
    static constexpr int kHalvesAtOnce = 1;
    using Scale = uint8_t;  // e8m0 for 32 columns
    static constexpr float kFactor = 1;

    __device__ static const Scale* scale_row(const dsv4_weight& w, int64_t row) {
        return (const Scale*)w.scale + row * (w.k / 32);
    }
    __device__ static Scale load_scale(const Scale* row, int chunk) { return __ldg(row + chunk); }

    __device__ static uint32_t factor(Scale scale, int) {
        uint32_t bits = e8m0_bits(scale);
        return select_bytes(bits, bits, 0x3232);  // as two bf16
    }
    __device__ static uint32_t scaled(uint32_t pair, uint32_t factor) {
        return multiply(multiply(pair, kUp126Pair), factor);
    }
    __device__ static void operand(uint2 codes, Scale scale, int half,
                                   uint32_t (&a)[kProducts][2]) {
        scaled_pairs<Mxfp4>(codes, factor(scale, half), a);
    }
};

// e4m3 is exact in bf16. The scale of a 128 x 128 block (Stored: float or e8m0) multiplies sums, in
// float32.
template <class Stored> struct Fp8 {
    using Scale = float;
    static constexpr int kChunk = 16, kProducts = 2, kDepth = 4, kHalvesAtOnce = 1;
    static constexpr float kFactor = 1;
    static constexpr bool kBlockScale = true;

    __device__ static const Stored* scale_row(const dsv4_weight& w, int64_t row) {
        return (const Stored*)w.scale + row / 128 * ((w.k + 127) / 128);
    }
    __device__ static Scale load_scale(const Stored* row, int chunk) {
        Stored stored = __ldg(row + chunk / (128 / kChunk));
        if constexpr (sizeof(Stored) == sizeof(float)) return stored;
        else return __uint_as_float(e8m0_bits(stored));
    }
    __device__ static void operand(uint2 codes, Scale, int, uint32_t (&a)[kProducts][2]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t word = i == 0 ? codes.x : codes.y;
            float2 low = e4m3_pair(word & 0xFFFF), high = e4m3_pair(word >> 16);
            a[i][0] = pair_of(low.x, low.y);
            a[i][1] = pair_of(high.x, high.y);
        }
    }
    __device__ static void column(const uint4 (&x)[1], uint32_t (&b)[kProducts][2]) {
        b[0][0] = x[0].x, b[0][1] = x[0].y, b[1][0] = x[0].z, b[1][1] = x[0].w;
    }
};

struct Bf16 {
    struct Scale {};
    static constexpr int kChunk = 8, kProducts = 1, kDepth = 4, kHalvesAtOnce = 2;
    static constexpr float kFactor = 1;
    static constexpr bool kBlockScale = false;

    __device__ static const Scale* scale_row(const dsv4_weight&, int64_t) { return nullptr; }
    __device__ static Scale load_scale(const Scale*, int) { return {}; }
    __device__ static void operand(uint2 codes, Scale, int, uint32_t (&a)[kProducts][2]) {
        a[0][0] = codes.x, a[0][1] = codes.y;
    }
    __device__ static void column(const uint2 (&x)[1], uint32_t (&b)[kProducts][2]) {
        b[0][0] = x[0].x, b[0][1] = x[0].y;
    }
};

// Calls body(policy) for a format that the matrix unit can take whole chunks of; else kUnsupported.
template <class Body> inline int with_policy(int32_t format, int64_t k, Body body) {
    if (format == DSV4_NVFP4 && k % Nvfp4::kChunk == 0) return body(Nvfp4{});
    if (format == DSV4_MXFP4 && k % Mxfp4::kChunk == 0) return body(Mxfp4{});
    if (format == DSV4_FP8_E8M0 && k % Fp8<uint8_t>::kChunk == 0) return body(Fp8<uint8_t>{});
    if (format == DSV4_FP8_F32 && k % Fp8<float>::kChunk == 0) return body(Fp8<float>{});
    if (format == DSV4_DENSE_BF16 && k % Bf16::kChunk == 0) return body(Bf16{});
    return kUnsupported;
}

}  // namespace dsv4
