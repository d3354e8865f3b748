// The packed KV entry: e4m3 codes in tiles of 64, bfloat16 rope values, e8m0 scales (engine/kv_entry.py).
#pragma once

#include "decode.cuh"

namespace dsv4 {

constexpr int kTile = 64, kScaleBytes = 8;
constexpr int kMostPacked = 512;  // values of an entry that pack_entry takes

// An entry of `dim` values, of which the first `plain` have no rope. Starts at multiples of 8 bytes.
struct EntryLayout {
    int dim, plain;
    __host__ __device__ constexpr int scales_at() const { return plain + 2 * (dim - plain); }
    __host__ __device__ constexpr int bytes() const { return scales_at() + kScaleBytes; }
};

__device__ inline float scale_of(uint8_t code) { return __uint_as_float(e8m0_bits(code)); }

// Value `i` of an entry.
__device__ inline float entry_value(const uint8_t* entry, EntryLayout layout, int i) {
    if (i >= layout.plain) return to_float(((const bf16*)(entry + layout.plain))[i - layout.plain]);
    return e4m3_pair(entry[i]).x * scale_of(entry[layout.scales_at() + i / kTile]);
}

// 2^(code - 127), NaN for 255, twice in bfloat16.
__device__ inline uint32_t scale_pair(uint32_t code) {
    return code == 255 ? 0x7FC07FC0u : max(code * 0x00800080u, 0x00400040u);
}

// Eight codes times their scale, as bfloat16: exact.
__device__ inline uint4 decode_codes(uint2 codes, uint32_t scales) {
    auto pair = [&](uint32_t two) {
        const float2 value = e4m3_pair((uint16_t)two);
        return multiply(pair_of(value.x, value.y), scales);
    };
    return {pair(codes.x), pair(codes.x >> 16), pair(codes.y), pair(codes.y >> 16)};
}

// Two floats as e4m3 codes, rounded to nearest even; NaN becomes 0x7F. At most 448 in magnitude.
__device__ inline uint32_t encode_pair(float low, float high) {
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

// The code of the smallest power of two s with amax <= 448 s, for a normal amax; 448 = 1.75 * 2^8.
__device__ inline uint32_t scale_code(float amax) {
    uint32_t bits = __float_as_uint(amax);
    return (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000);
}

// row [dim] -> entry, by 64 threads of two whole warps; `unit` is the thread's number among them.
// Eight threads share a tile, each has eight values.
template <class From>
__device__ void pack_entry(const From* row, uint8_t* entry, EntryLayout layout, int unit) {
    const bool exists = 8 * unit < layout.dim, coded = 8 * unit < layout.plain;
    float value[8], amax = 1e-4f;
    Vector<From, 8> from = {};
    if (exists) from = load_vector<From, 8>(row + 8 * unit);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        value[i] = exists ? to_float(from.at[i]) : 0;
        if (coded && isfinite(value[i])) amax = fmaxf(amax, fabsf(value[i]));
    }
    for (int offset = 1; offset < 8; offset *= 2)
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, offset));
    const uint32_t code = scale_code(amax);
    if (unit % 8 == 0) entry[layout.scales_at() + unit / 8] = coded ? code : 0;
    if (coded) {
        const float inverse = __uint_as_float((254 - code) << 23);
#pragma unroll
        for (int i = 0; i < 8; i++)
            value[i] = isfinite(value[i]) ? value[i] * inverse : __int_as_float(0x7FC00000);
        *(uint2*)(entry + 8 * unit) = {
            encode_pair(value[0], value[1]) | encode_pair(value[2], value[3]) << 16,
            encode_pair(value[4], value[5]) | encode_pair(value[6], value[7]) << 16};
    } else if (exists) {
        uint2* rope = (uint2*)(entry + layout.plain + 2 * (8 * unit - layout.plain));
        rope[0] = {pair_of(value[0], value[1]), pair_of(value[2], value[3])};
        rope[1] = {pair_of(value[4], value[5]), pair_of(value[6], value[7])};
    }
}

}  // namespace dsv4
