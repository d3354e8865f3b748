// Weights of any format as float32, a few consecutive columns at a time: the path for odd sizes.
#pragma once

#include "decode.cuh"

namespace dsv4 {

// Readers: kSize columns from `at` (a multiple of kSize, inside the row) of weight row `n`, every
// factor applied but the global scale.

template <bool kNvfp4> struct Fp4Reader {
    static constexpr int kSize = 8;
    const uint8_t *codes, *scales;
    __device__ Fp4Reader(const dsv4_weight& w, int64_t n)
        : codes((const uint8_t*)w.data + n * (w.k / 2)),
          scales((const uint8_t*)w.scale + n * (w.k / (kNvfp4 ? 16 : 32))) {}
    __device__ void read(int64_t at, float (&out)[kSize]) const {
        uint32_t word = *(const uint32_t*)(codes + at / 2);
        uint8_t code = scales[at / (kNvfp4 ? 16 : 32)];
        float scale = kNvfp4 ? e4m3_pair(code).x : __uint_as_float(e8m0_bits(code));
#pragma unroll
        for (int i = 0; i < kSize; i++) {
            uint32_t nibble = word >> 4 * i & 15;
            // Exponent and mantissa at the bottom of float32's fields: value * 2^-126.
            uint32_t bits = (nibble & 8) << 28 | (nibble & 7) << 22;
            out[i] = __uint_as_float(bits) * 8.50705917302346159e37f * scale;  // 2^126
        }
    }
};

struct Fp8Reader {
    static constexpr int kSize = 1;
    const dsv4_weight& w;
    const uint8_t* codes;
    int64_t block;
    __device__ Fp8Reader(const dsv4_weight& w, int64_t n)
        : w(w), codes((const uint8_t*)w.data + n * w.k), block(n / 128 * ((w.k + 127) / 128)) {}
    __device__ void read(int64_t at, float (&out)[kSize]) const {
        int64_t b = block + at / 128;
        float scale = w.format == DSV4_FP8_F32
                          ? ((const float*)w.scale)[b]
                          : __uint_as_float(e8m0_bits(((const uint8_t*)w.scale)[b]));
        out[0] = e4m3_pair(codes[at]).x * scale;
    }
};

// kSize > 1 needs k to be a multiple of it.
template <class T, int Size> struct DenseReader {
    static constexpr int kSize = Size;
    const T* row;
    __device__ DenseReader(const dsv4_weight& w, int64_t n) : row((const T*)w.data + n * w.k) {}
    __device__ void read(int64_t at, float (&out)[kSize]) const {
        Vector<T, kSize> v = *(const Vector<T, kSize>*)(row + at);
#pragma unroll
        for (int i = 0; i < kSize; i++) out[i] = to_float(v.at[i]);
    }
};

template <class T, class Body> inline int with_dense_reader(int64_t k, Body body) {
    return k % 4 ? body(Tag<DenseReader<T, 1>>{}) : body(Tag<DenseReader<T, 4>>{});
}

template <class Body> inline int with_reader(int32_t format, int64_t k, Body body) {
    switch (format) {
        case DSV4_NVFP4: return body(Tag<Fp4Reader<true>>{});
        case DSV4_MXFP4: return body(Tag<Fp4Reader<false>>{});
        case DSV4_FP8_E8M0:
        case DSV4_FP8_F32: return body(Tag<Fp8Reader>{});
        case DSV4_DENSE_F32: return with_dense_reader<float>(k, body);
        case DSV4_DENSE_BF16: return with_dense_reader<bf16>(k, body);
        case DSV4_DENSE_F16: return with_dense_reader<__half>(k, body);
        default: return kUnsupported;
    }
}

}  // namespace dsv4
