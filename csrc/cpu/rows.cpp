// Ops that move rows: embed, cache_write, gather_swa; and the plain read that gauges memory.

#include "parallel.h"
#include "vec.h"

namespace dsv4 {
namespace {

struct Rows {
    const void* data;
    int dtype;  // float32, bfloat16 or float16
    int64_t d;
};

// Row `row` of `from`, converted -> row `to_row` of `to` (stride elements a row).
template <class To> void copy_row(const Rows& from, int64_t row, To* to) {
    int64_t at = row * from.d;
    if (from.dtype == DSV4_F32) convert(to, (const float*)from.data + at, from.d);
    else if (from.dtype == DSV4_BF16) convert(to, (const bf16*)from.data + at, from.d);
    else convert(to, (const f16*)from.data + at, from.d);
}

void copy_row(const Rows& from, int64_t row, void* to, int dtype, int64_t offset) {
    if (dtype == DSV4_F32) copy_row(from, row, (float*)to + offset);
    else copy_row(from, row, (bf16*)to + offset);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// out [n, hc, d] = hc copies of table[tokens], table [v, d] of table_dtype (float16 too), out of
// out_dtype. DSV4_BAD_INDEX if a token is not in [0, v).
DSV4_EXPORT int dsv4_embed(const int64_t* tokens, int64_t n, const void* table, int table_dtype,
                           int64_t v, int64_t d, int64_t hc, void* out, int out_dtype) {
    for (int64_t t = 0; t < n; t++)
        if (tokens[t] < 0 || tokens[t] >= v) return DSV4_BAD_INDEX;
    Rows rows = {table, table_dtype, d};
    for (int64_t t = 0; t < n; t++)
        for (int64_t h = 0; h < hc; h++)
            copy_row(rows, tokens[t], out, out_dtype, (t * hc + h) * d);
    return DSV4_OK;
}

// cache[slots[i]] = rows[i] in place, negative slots skipped, of two equal slots the later row
// wins. rows [m, d], cache [capacity, d] with `stride` elements a row. DSV4_BAD_INDEX, with
// nothing written, if a slot is past the end.
DSV4_EXPORT int dsv4_cache_write(const void* rows, int rows_dtype, const int64_t* slots, int64_t m,
                                 void* cache, int cache_dtype, int64_t capacity, int64_t d,
                                 int64_t stride) {
    for (int64_t i = 0; i < m; i++)
        if (slots[i] >= capacity) return DSV4_BAD_INDEX;
    Rows from = {rows, rows_dtype, d};
    for (int64_t i = 0; i < m; i++)
        if (slots[i] >= 0) copy_row(from, i, cache, cache_dtype, slots[i] * stride);
    return DSV4_OK;
}

// out [r + n, d] = ring [r, d] followed by kv [n, d], all in ring's dtype.
DSV4_EXPORT int dsv4_gather_swa(const void* ring, int64_t r, const void* kv, int64_t n, int64_t d,
                                int ring_dtype, int kv_dtype, void* out) {
    std::memcpy(out, ring, r * d * (ring_dtype == DSV4_F32 ? 4 : 2));
    Rows fresh = {kv, kv_dtype, d};
    for (int64_t i = 0; i < n; i++) copy_row(fresh, i, out, ring_dtype, (r + i) * d);
    return DSV4_OK;
}

// Reads `bytes` (a multiple of 64 a thread) and leaves their sum, so that nothing can be skipped:
// what memory gives to a loop that does nothing else.
DSV4_EXPORT int dsv4_read_bytes(const void* data, int64_t bytes, float* total, int threads) {
    int64_t lines = bytes / 256;
    float sums[256] = {};
    threads = threads < 256 ? threads : 256;
    parallel(threads, lines, bytes, [&](int64_t first, int64_t last, int worker) {
        u32v parts[4] = {};
        const char* base = (const char*)data;
        for (int64_t i = first; i < last; i++)
            for (int64_t j = 0; j < 256; j += 4 * sizeof(u32v))
                for (int v = 0; v < 4; v++)
                    parts[v] ^= load_raw<u32v>(base + i * 256 + j + v * sizeof(u32v));
        u32v all = parts[0] ^ parts[1] ^ parts[2] ^ parts[3];
        sums[worker] += float(all[0] ^ all[W - 1]);
    });
    *total = 0;
    for (float sum : sums) *total += sum;
    return DSV4_OK;
}
