// Op attention: every query head against the same keys, which are the values too.
//
// Heads lie in vector lanes: one group of heads at a time, its queries transposed once. For each
// token the valid keys are listed (an index of -1 is dropped and never read), then
//   logits[key][head] = scale * q . k;  lse = log(sum exp(logits) + exp(sink));
//   o[head] = sum over keys of exp(logit - lse) k, the weight rounded to q's dtype.

#include <cmath>

#include "outer.h"
#include "parallel.h"

namespace dsv4 {
namespace {

constexpr int64_t kChunk = 96;  // keys taken together: their rows stay in the second-level cache

struct Problem {
    int64_t n, heads, dim;             // q [n, heads, dim]
    const int32_t *window_index, *entry_index;
    int64_t window_width, entry_width;  // keys a token has in each pool
    const float* sink;
    float scale;
};

// Scratch of one thread, sized for `keys` keys and `lanes` heads at once.
struct Memory {
    float* queries;      // [dim, lanes]
    float* logits;       // [keys, lanes], then the weights
    float* output;       // [lanes, dim padded]
    float* rows;         // [kChunk, dim]: keys widened from bfloat16
    const void** keys;   // [keys] rows of the pools
    const float** chunk; // [kChunk] the same rows as float32

    static int64_t bytes(const Problem& p, int64_t lanes) {
        int64_t keys = p.window_width + p.entry_width, dim = round_up(p.dim, 2 * W);
        int64_t floats = dim * lanes + keys * lanes + lanes * dim + kChunk * dim;
        return round_up(floats * 4 + (keys + kChunk) * 8, 64);
    }
    Memory(char* base, const Problem& p, int64_t lanes) {
        int64_t count = p.window_width + p.entry_width, dim = round_up(p.dim, 2 * W);
        queries = (float*)base;
        logits = queries + dim * lanes;
        output = logits + count * lanes;
        rows = output + lanes * dim;
        keys = (const void**)(rows + kChunk * dim);
        chunk = (const float**)(keys + count);
    }
};

// The rows of token t that exist, in index order.
template <class T>
int64_t list_keys(const Problem& p, const T* window, const T* entries, int64_t t,
                  const void** keys) {
    int64_t count = 0;
    for (int64_t j = 0; j < p.window_width; j++) {
        int64_t row = p.window_index[t * p.window_width + j];
        if (row >= 0) keys[count++] = window + row * p.dim;
    }
    for (int64_t j = 0; j < p.entry_width; j++) {
        int64_t row = p.entry_index[t * p.entry_width + j];
        if (row >= 0) keys[count++] = entries + row * p.dim;
    }
    return count;
}

// Keys [first, first + count) as float32 rows; float32 pools are used where they lie, unless the
// row's end has to be padded to whole vectors.
template <class T>
void take_chunk(const Problem& p, const Memory& m, int64_t first, int64_t count) {
    int64_t padded = round_up(p.dim, 2 * W);
    for (int64_t j = 0; j < count; j++) {
        const T* key = (const T*)m.keys[first + j];
        if (sizeof(T) == sizeof(float) && padded == p.dim) {
            m.chunk[j] = (const float*)key;
            continue;
        }
        float* row = m.rows + j * padded;
        convert(row, key, p.dim);
        for (int64_t d = p.dim; d < padded; d++) row[d] = 0;
        m.chunk[j] = row;
    }
}

template <int M, int N>
void logit_tile(const Problem& p, const Memory& m, int64_t j, float* logits) {
    f32v sums[M][N] = {};
    const float* const* keys = m.chunk + j;
    const float* rows[M];
    for (int i = 0; i < M; i++) rows[i] = keys[i];
    outer_tile<M, N>(
        p.dim, [&](int64_t l, int i) { return rows[i][l]; },
        [&](int64_t l, int v) { return load(m.queries + (l * N + v) * W); }, sums);
    for (int i = 0; i < M; i++)
        for (int v = 0; v < N; v++) store(logits + (i * N + v) * W, sums[i][v] * p.scale);
}

// output[head][d ...] += sum over the chunk of weight[key][head] * key[d ...], two vectors of d.
template <int M, int N>
void value_tile(const Memory& m, const float* weights, int64_t head, int64_t count, int64_t d,
                int64_t padded) {
    f32v sums[M][2];
    float* out = m.output + head * padded + d;
    for (int i = 0; i < M; i++)
        for (int v = 0; v < 2; v++) sums[i][v] = load(out + i * padded + v * W);
    outer_tile<M, 2>(
        count, [&](int64_t l, int i) { return weights[l * N * W + head + i]; },
        [&](int64_t l, int v) { return load(m.chunk[l] + d + v * W); }, sums);
    for (int i = 0; i < M; i++)
        for (int v = 0; v < 2; v++) store(out + i * padded + v * W, sums[i][v]);
}

// Turns `count` rows of logits into weights exp(logit - lse), rounded to T; lse is left in lse[].
// With lse NaN or -inf even a masked key's weight is NaN: returned as what to add to the output.
template <class T, int N>
void soften(const float* sink, int64_t heads, int64_t count, float* logits, float* lse,
            float* masked) {
    for (int v = 0; v < N; v++) {
        float* column = logits + v * W;
        f32v s = heads > v * W ? load_upto(sink + v * W, heads - v * W) : f32v{};
        f32v top = s;
        for (int64_t j = 0; j < count; j++) {
            f32v x = load(column + j * N * W);
            top = x > top ? x : top;
        }
        top = (top == INFINITY) | (top == -INFINITY) ? f32v{} : top;
        f32v total = exp(s - top);
        for (int64_t j = 0; j < count; j++) total += exp(load(column + j * N * W) - top);
        for (int i = 0; i < W; i++) lse[v * W + i] = std::log(total[i]) + top[i];
        f32v norm = load(lse + v * W);
        for (int64_t j = 0; j < count; j++) {
            f32v weight = exp(load(column + j * N * W) - norm);
            T rounded[W];
            store(rounded, weight);
            store(column + j * N * W, load(rounded));
        }
        store(masked + v * W, exp(splat(-INFINITY) - norm) * 0.0f);
    }
}

// One token, N vectors of heads from `first_head`.
template <class T, int N>
void one_group(const Problem& p, const T* q, const T* window, const T* entries, int64_t t,
               int64_t first_head, const Memory& m, T* o, float* lse) {
    constexpr int64_t lanes = N * W;
    int64_t heads = min64(lanes, p.heads - first_head), padded = round_up(p.dim, 2 * W);
    int64_t offset = (t * p.heads + first_head) * p.dim;
    heads_to_lanes(q + offset, heads, p.dim, lanes, m.queries);
    int64_t count = list_keys(p, window, entries, t, m.keys);
    for (int64_t first = 0; first < count; first += kChunk) {
        int64_t some = min64(kChunk, count - first), j = 0;
        take_chunk<T>(p, m, first, some);
        float* logits = m.logits + first * lanes;
        for (; j + kOuterRows <= some; j += kOuterRows)
            logit_tile<kOuterRows, N>(p, m, j, logits + j * lanes);
        for (; j < some; j++) logit_tile<1, N>(p, m, j, logits + j * lanes);
    }
    float sums[lanes], masked[lanes];
    soften<T, N>(p.sink + first_head, heads, count, m.logits, sums, masked);
    bool any_masked = count < p.window_width + p.entry_width;
    for (int64_t h = 0; h < heads; h++) {
        lse[t * p.heads + first_head + h] = sums[h];
        for (int64_t d = 0; d < padded; d++) m.output[h * padded + d] = any_masked ? masked[h] : 0;
    }
    for (int64_t first = 0; first < count; first += kChunk) {
        int64_t some = min64(kChunk, count - first);
        take_chunk<T>(p, m, first, some);
        const float* weights = m.logits + first * lanes;
        for (int64_t d = 0; d < padded; d += 2 * W) {
            int64_t h = 0;
            for (; h + 8 <= heads; h += 8) value_tile<8, N>(m, weights, h, some, d, padded);
            for (; h < heads; h++) value_tile<1, N>(m, weights, h, some, d, padded);
        }
    }
    for (int64_t h = 0; h < heads; h++)
        convert(o + offset + h * p.dim, m.output + h * padded, p.dim);
}

template <class T, int N>
void run(const Problem& p, const T* q, const T* window, const T* entries, T* o, float* lse,
         int threads) {
    constexpr int64_t lanes = N * W;
    int64_t groups = (p.heads + lanes - 1) / lanes, keys = p.window_width + p.entry_width;
    int64_t share = Memory::bytes(p, lanes);
    char* memory = (char*)scratch(kLogits, threads * share);
    int64_t work = p.n * p.heads * p.dim * keys / 8;
    parallel(threads, p.n * groups, work, [&](int64_t begin, int64_t end, int worker) {
        Memory mine(memory + worker * share, p, lanes);
        for (int64_t i = begin; i < end; i++)
            one_group<T, N>(p, q, window, entries, i / groups, i % groups * lanes, mine, o, lse);
    });
}

// Two vectors of heads use the registers best; one when there would be too few pieces to share.
template <class T>
void dispatch(const Problem& p, const void* q, const void* window, const void* entries, void* o,
              float* lse, int threads) {
    int64_t pieces = p.n * ((p.heads + 2 * W - 1) / (2 * W));
    if (p.heads > W && pieces >= threads)
        run<T, 2>(p, (const T*)q, (const T*)window, (const T*)entries, (T*)o, lse, threads);
    else
        run<T, 1>(p, (const T*)q, (const T*)window, (const T*)entries, (T*)o, lse, threads);
}

// Whether all rows named by an index are in its pool; -1 (any negative) names none.
bool in_pool(const int32_t* index, int64_t count, int64_t rows) {
    for (int64_t i = 0; i < count; i++)
        if (index[i] >= rows) return false;
    return true;
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// q, o [n, heads, dim], window [window_rows, dim], entries [entry_rows, dim], all of `dtype` and
// contiguous; window_index [n, window_width] and entry_index [n, entry_width] int32; sink [heads]
// and lse [n, heads] float32. DSV4_BAD_INDEX if an index is past its pool.
DSV4_EXPORT int dsv4_attention(const void* q, const void* window, int64_t window_rows,
                               const int32_t* window_index, int64_t window_width,
                               const void* entries, int64_t entry_rows, const int32_t* entry_index,
                               int64_t entry_width, const float* sink, float scale, int64_t n,
                               int64_t heads, int64_t dim, void* o, float* lse, int dtype,
                               int threads) {
    if (!in_pool(window_index, n * window_width, window_rows) ||
        !in_pool(entry_index, n * entry_width, entry_rows))
        return DSV4_BAD_INDEX;
    Problem p = {n, heads, dim, window_index, entry_index, window_width, entry_width, sink, scale};
    return guarded([&] {
        if (dtype == DSV4_F32) dispatch<float>(p, q, window, entries, o, lse, threads);
        else dispatch<bf16>(p, q, window, entries, o, lse, threads);
        return DSV4_OK;
    });
}
