// Matrix products with weights in any format, decoded on the way: ops linear and grouped_linear.
//
// Few rows (a decode step): one stream over the weight, each row decoded once in registers.
// Many rows: a block of weight rows is decoded to float32 in cache and used for all of them.

#include "matmul.h"

#include "e2m1_dot.h"
#include "parallel.h"
#include "vec.h"
#include "weights.h"

namespace dsv4 {
namespace {

constexpr int64_t kFewRows = 8;        // most rows for which the weight is decoded in registers
constexpr int64_t kRowsAtOnce = 512;   // activation rows held as float32 in the blocked path
constexpr int64_t kBlockRows = 32;     // weight rows decoded at a time
constexpr int64_t kBlockDepth = 1024;  // columns of them

// x [m, k] with row stride -> float32 [m, padded], zeros behind column k.
void widen(Matrix x, int64_t first, int64_t m, int64_t k, int64_t padded, float* out) {
    for (int64_t i = 0; i < m; i++, out += padded) {
        int64_t start = (first + i) * x.stride;
        if (x.dtype == DSV4_F32) convert(out, (const float*)x.data + start, k);
        else convert(out, (const bf16*)x.data + start, k);
        for (int64_t j = k; j < padded; j++) out[j] = 0;
    }
}

void put(Matrix y, int64_t row, int64_t column, float value) {
    int64_t at = row * y.stride + column;
    if (y.dtype == DSV4_F32) ((float*)y.data)[at] = value;
    else store_one((bf16*)y.data + at, value);
}

// ---------------------------------------------------------------- few rows

// One weight row times M activation rows, any format. Two sums a row hide the FMA's latency.
template <int M, class Row>
void dot_row(const Row& row, int64_t k, const float* x, int64_t stride, float* out) {
    f32v even[M] = {}, odd[M] = {};
    int64_t i = 0;
    for (; i + 2 * W <= k; i += 2 * W) {
        f32v a = row.at(i), b = row.at(i + W);
        for (int r = 0; r < M; r++) {
            even[r] += a * load(x + r * stride + i);
            odd[r] += b * load(x + r * stride + i + W);
        }
    }
    for (; i < k; i += W) {
        f32v a = i + W <= k ? row.at(i) : row.tail(i, k - i);
        for (int r = 0; r < M; r++) even[r] += a * load(x + r * stride + i);
    }
    for (int r = 0; r < M; r++) out[r] = sum(even[r] + odd[r]);
}

// Fp8 rows: the scale multiplies the sum over its 128 columns.
template <int M, class S>
void dot_row(const Fp8Row<S>& row, int64_t k, const float* x, int64_t stride, float* out) {
    f32v sums[M] = {};
    for (int64_t first = 0; first < k; first += kFp8Block) {
        int64_t end = min64(first + kFp8Block, k);
        f32v part[M] = {};
        for (int64_t i = first; i < end; i += W) {
            f32v a = i + W <= end ? row.codes_at(i) : row.codes_tail(i, end - i);
            for (int r = 0; r < M; r++) part[r] += a * load(x + r * stride + i);
        }
        f32v scale = splat(row.scale_at(first));
        for (int r = 0; r < M; r++) sums[r] += part[r] * scale;
    }
    for (int r = 0; r < M; r++) out[r] = sum(sums[r]);
}

// What few_rows needs beside the weight: m <= kFewRows activation rows of every group; row i of
// group g is row i * groups + g of `x`, `stride` elements (words, if prepared) from the next.
struct Activations {
    const void* x;
    int64_t m, groups, stride;
};

// y[0 ... m, n] for one row of any format.
template <class Row>
void product_row(const dsv4_weight& w, int64_t n, const Activations& a, Matrix y) {
    Row row(w, n);
    int64_t per_group = w.n / a.groups, step = a.groups * a.stride, i = 0;
    const float* x = (const float*)a.x + n / per_group * a.stride;
    float out[kFewRows];
    for (; i + 4 <= a.m; i += 4) dot_row<4>(row, w.k, x + i * step, step, out + i);
    for (; i + 2 <= a.m; i += 2) dot_row<2>(row, w.k, x + i * step, step, out + i);
    for (; i < a.m; i++) dot_row<1>(row, w.k, x + i * step, step, out + i);
    for (int64_t r = 0; r < a.m; r++) put(y, r, n, out[r] * w.global_scale);
}

// y[first ... first + M, n ... n + R] for R rows of 4-bit codes.
template <int R, int M, bool Pairs, int Block>
void product_tile(const dsv4_weight& w, int64_t n, int64_t first, const Activations& a, Matrix y) {
    int64_t per_group = w.n / a.groups, step = a.groups * a.stride;
    const uint32_t* x = (const uint32_t*)a.x + n / per_group * a.stride + first * step;
    float out[R][M];
    dot_rows<R, M, Pairs, Block>(E2m1Row<Block>(w, n), w.k, x, step, out);
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) put(y, first + m, n + r, out[r][m] * w.global_scale);
}

// Rows [first, last) of 4-bit codes. A single activation row goes through two weight rows at a
// time, so that it is loaded once for both; more activation rows fill the registers themselves.
template <bool Pairs, int Block>
void few_e2m1_rows(const dsv4_weight& w, int64_t first, int64_t last, const Activations& a,
                   Matrix y) {
    int64_t per_group = w.n / a.groups, n = first;
    while (n < last) {
        if (a.m == 1 && n + 1 < last && n / per_group == (n + 1) / per_group) {
            product_tile<2, 1, Pairs, Block>(w, n, 0, a, y);
            n += 2;
            continue;
        }
        int64_t i = 0;
        for (; i + 4 <= a.m; i += 4) product_tile<1, 4, Pairs, Block>(w, n, i, a, y);
        for (; i + 2 <= a.m; i += 2) product_tile<1, 2, Pairs, Block>(w, n, i, a, y);
        for (; i < a.m; i++) product_tile<1, 1, Pairs, Block>(w, n, i, a, y);
        n++;
    }
}

bool is_e2m1(const dsv4_weight& w) { return w.format == DSV4_NVFP4 || w.format == DSV4_MXFP4; }

// y = x W^T for m <= kFewRows. xf holds the activations as float32, `padded` a row; `is_bf16` says
// that bfloat16 holds them too.
void few_rows(const float* xf, int64_t padded, int64_t m, const dsv4_weight& w, int64_t groups,
              bool is_bf16, Matrix y, int threads) {
    Activations a = {xf, m, groups, padded};
    const bool pairs = kHasPairs && is_bf16;
    if (is_e2m1(w)) {
        a.stride = prepared_size(padded, pairs);
        uint32_t* prepared = scratch_of<uint32_t>(kPrepared, m * groups * a.stride);
        for (int64_t i = 0; i < m * groups; i++)
            prepare(xf + i * padded, padded, pairs, prepared + i * a.stride);
        a.x = prepared;
    }
    parallel(threads, w.n, w.n * w.k, [&](int64_t first, int64_t last, int) {
        if (w.format == DSV4_NVFP4) {
            if (pairs) few_e2m1_rows<kHasPairs, 16>(w, first, last, a, y);
            else few_e2m1_rows<false, 16>(w, first, last, a, y);
        } else if (w.format == DSV4_MXFP4) {
            if (pairs) few_e2m1_rows<kHasPairs, 32>(w, first, last, a, y);
            else few_e2m1_rows<false, 32>(w, first, last, a, y);
        } else {
            with_format(w, [&](auto tag) {
                using Row = typename decltype(tag)::type;
                for (int64_t n = first; n < last; n++) product_row<Row>(w, n, a, y);
            });
        }
    });
}

// ---------------------------------------------------------------- many rows

#if defined(__AVX512F__)
constexpr int kTileM = 6, kTileN = 4;  // 24 of 32 registers hold sums
#else
constexpr int kTileM = 3, kTileN = 4;  // 12 of 16
#endif

// c [M, N] += a [M, k] b [N, k]^T, k a multiple of W.
template <int M, int N>
void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c,
          int64_t ldc) {
    f32v sums[M][N] = {};
    for (int64_t l = 0; l < k; l += W) {
        f32v right[N];
        for (int j = 0; j < N; j++) right[j] = load(b + j * ldb + l);
        for (int i = 0; i < M; i++) {
            f32v left = load(a + i * lda + l);
            for (int j = 0; j < N; j++) sums[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) c[i * ldc + j] += sum(sums[i][j]);
}

template <int M>
void tile_columns(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, int64_t k,
                  float* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + kTileN <= n; j += kTileN) tile<M, kTileN>(a, lda, b + j * ldb, ldb, k, c + j, ldc);
    for (; j < n; j++) tile<M, 1>(a, lda, b + j * ldb, ldb, k, c + j, ldc);
}

// Decode weight rows [row, row + rows), and multiply them with m rows of x -> y columns from `row`.
void block_rows(const float* x, int64_t stride, int64_t m, const dsv4_weight& w, int64_t row,
                int64_t rows, float* block, float* c, Matrix y, int64_t y_row) {
    for (int64_t i = 0; i < m * kBlockRows; i++) c[i] = 0;
    for (int64_t depth = 0; depth < w.k; depth += kBlockDepth) {
        int64_t count = min64(kBlockDepth, w.k - depth), padded = round_up(count, W);
        with_format(w, [&](auto tag) {
            for (int64_t n = 0; n < rows; n++) {
                typename decltype(tag)::type reader(w, row + n);
                dequantize(reader, depth, count, block + n * kBlockDepth);
            }
        });
        int64_t i = 0;
        const float* a = x + depth;
        for (; i + kTileM <= m; i += kTileM)
            tile_columns<kTileM>(a + i * stride, stride, block, kBlockDepth, rows, padded,
                                 c + i * kBlockRows, kBlockRows);
        for (; i < m; i++)
            tile_columns<1>(a + i * stride, stride, block, kBlockDepth, rows, padded,
                            c + i * kBlockRows, kBlockRows);
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < rows; n++)
            put(y, y_row + i, row + n, c[i * kBlockRows + n] * w.global_scale);
}

void many_rows(const float* x, int64_t stride, int64_t m, const dsv4_weight& w, int64_t first_row,
               int64_t n, Matrix y, int64_t y_row, int threads) {
    int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
    int64_t block_size = kBlockRows * kBlockDepth, c_size = m * kBlockRows;
    float* memory = scratch_of(kWeightBlock, threads * (block_size + c_size));
    parallel(threads, blocks, m * n * w.k / 8, [&](int64_t first, int64_t last, int worker) {
        float* block = memory + worker * (block_size + c_size);
        for (int64_t b = first; b < last; b++) {
            int64_t row = first_row + b * kBlockRows;
            int64_t rows = min64(kBlockRows, first_row + n - row);
            block_rows(x, stride, m, w, row, rows, block, block + block_size, y, y_row);
        }
    });
}

}  // namespace

void matmul(Matrix x, int64_t m, const dsv4_weight& w, int64_t groups, Matrix y, int threads) {
    int64_t k = w.k, n = w.n / groups;
    if (m <= kFewRows) {
        int64_t padded = round_up(k, kCodes);
        float* xf = scratch_of(kActivations, m * groups * padded);
        for (int64_t i = 0; i < m; i++)
            for (int64_t g = 0; g < groups; g++) {
                int64_t size = x.dtype == DSV4_F32 ? sizeof(float) : sizeof(bf16);
                Matrix part = {(char*)x.data + (i * x.stride + g * k) * size, x.stride, x.dtype};
                widen(part, 0, 1, k, padded, xf + (i * groups + g) * padded);
            }
        few_rows(xf, padded, m, w, groups, x.dtype == DSV4_BF16, y, threads);
        return;
    }
    int64_t padded = round_up(k, W);
    for (int64_t first = 0; first < m; first += kRowsAtOnce) {
        int64_t rows = min64(kRowsAtOnce, m - first);
        float* xf = scratch_of(kActivations, rows * padded);
        for (int64_t g = 0; g < groups; g++) {
            int64_t size = x.dtype == DSV4_F32 ? sizeof(float) : sizeof(bf16);
            Matrix part = {(char*)x.data + g * k * size, x.stride, x.dtype};
            widen(part, first, rows, k, padded, xf);
            many_rows(xf, padded, rows, w, g * n, n, y, first, threads);
        }
    }
}

}  // namespace dsv4

using namespace dsv4;

// x [m, groups * k] in x_dtype, y [m, n] in y_dtype, both contiguous (float32 or bfloat16).
// groups = 1 is op linear, more is grouped_linear.
DSV4_EXPORT int dsv4_linear(void* x, int x_dtype, int64_t m, const dsv4_weight* w, int64_t groups,
                            void* y, int y_dtype, int threads) {
    return guarded([&] {
        matmul({x, groups * w->k, x_dtype}, m, *w, groups, {y, w->n, y_dtype}, threads);
        return DSV4_OK;
    });
}
