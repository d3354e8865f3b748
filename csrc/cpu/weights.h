// Rows of a weight matrix as float32, decoded on the fly: one reader a format.
//
// A reader gives W consecutive elements of one row, `at(i)` for i a multiple of W, or fewer at the
// end of the row, `tail(i, count)`, with zeros behind them. Values are without NVFP4's global
// scale: that multiplies the product.
#pragma once

#include "../common/abi.h"
#include "vec.h"

namespace dsv4 {

constexpr int64_t kFp8Block = 128;

template <class T> struct DenseRow {
    const T* data;
    DenseRow(const dsv4_weight& w, int64_t row) : data((const T*)w.data + row * w.k) {}
    f32v at(int64_t i) const { return load(data + i); }
    f32v tail(int64_t i, int64_t count) const { return load_part(data + i, count); }
};

// Fp8 with scales of type S, one for 128 columns of 128 rows.
template <class S> struct Fp8Row {
    const uint8_t* data;
    const S* scale;
    Fp8Row(const dsv4_weight& w, int64_t row)
        : data((const uint8_t*)w.data + row * w.k),
          scale((const S*)w.scale + row / kFp8Block * ((w.k + kFp8Block - 1) / kFp8Block)) {}
    static float value(float s) { return s; }
    static float value(uint8_t s) { return e8m0(s); }
    float scale_at(int64_t i) const { return value(scale[i / kFp8Block]); }

    f32v codes_at(int64_t i) const { return e4m3(load_bytes<W>(data + i)); }
    f32v codes_tail(int64_t i, int64_t count) const {
        uint8_t padded[W] = {};
        std::memcpy(padded, data + i, count);
        return e4m3(load_bytes<W>(padded));
    }
    f32v at(int64_t i) const { return codes_at(i) * splat(scale_at(i)); }
    f32v tail(int64_t i, int64_t count) const { return codes_tail(i, count) * splat(scale_at(i)); }
};

// One block scale, as a float.
template <int Block> inline float block_scale(uint8_t code) {
    if constexpr (Block == 32) return e8m0(code);
    else return e4m3(load_bytes<1>(&code))[0];
}

// 4-bit codes with a scale for every `Block` of them: 16 is nvfp4, 32 is mxfp4.
template <int Block> struct E2m1Row {
    const uint8_t* codes;
    const uint8_t* scales;
    E2m1Row(const dsv4_weight& w, int64_t row)
        : codes((const uint8_t*)w.data + row * (w.k / 2)),
          scales((const uint8_t*)w.scale + row * (w.k / Block)) {}

    // Spread W codes over the lanes. k is a multiple of 16, so no row ends inside a vector.
    f32v at(int64_t i) const {
        uint64_t packed = 0;
        std::memcpy(&packed, codes + i / 2, W / 2);
        u32v words, shift;
        for (int lane = 0; lane < W; lane++) {
            words[lane] = uint32_t(packed >> (32 * (lane / 8)));
            shift[lane] = 4 * (lane % 8);
        }
        return e2m1(words >> shift) * splat(block_scale<Block>(scales[i / Block]));
    }
    f32v tail(int64_t, int64_t) const { return f32v{}; }
};

// Calls use(Row<...>) with the reader type of the weight's format, as a tag.
template <class Row> struct Tag {
    using type = Row;
};

template <class Use> inline void with_format(const dsv4_weight& w, const Use& use) {
    switch (w.format) {
        case DSV4_NVFP4: return use(Tag<E2m1Row<16>>{});
        case DSV4_MXFP4: return use(Tag<E2m1Row<32>>{});
        case DSV4_FP8_E8M0: return use(Tag<Fp8Row<uint8_t>>{});
        case DSV4_FP8_F32: return use(Tag<Fp8Row<float>>{});
        case DSV4_DENSE_F32: return use(Tag<DenseRow<float>>{});
        case DSV4_DENSE_BF16: return use(Tag<DenseRow<bf16>>{});
        case DSV4_DENSE_F16: return use(Tag<DenseRow<f16>>{});
    }
}

// Columns [first, first + count) of a row -> out, zeros up to a multiple of W. `first` is a
// multiple of W.
template <class Row>
inline void dequantize(const Row& row, int64_t first, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, row.at(first + i));
    if (i < count) store(out + i, row.tail(first + i, count - i));
}

}  // namespace dsv4
