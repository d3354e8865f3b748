// Ops index_score and index_topk: score every visible entry of a sequence, keep the best.

#include <cmath>

#include "order.h"
#include "outer.h"
#include "parallel.h"

namespace dsv4 {
namespace {

constexpr int64_t kKeyBlock = 512;  // entries scored in one piece of work

struct Problem {
    int64_t heads, dim, capacity, total, ratio;
    float scale;
};

// M keys against all heads: score = sum over heads of weight * relu(q . k), heads in lanes.
template <int M, class T>
void score_keys(const Problem& p, const float* q, const float* weights, const T* keys, float* out) {
    f32v score[M] = {};
    int64_t lanes = round_up(p.heads, 2 * W);
    for (int64_t h = 0; h < lanes; h += 2 * W) {
        f32v dots[M][2] = {};
        outer_tile<M, 2>(
            p.dim, [&](int64_t l, int i) { return to_float(keys[i * p.dim + l]); },
            [&](int64_t l, int v) { return load(q + l * lanes + h + v * W); }, dots);
        for (int v = 0; v < 2; v++)
            for (int i = 0; i < M; i++) {
                f32v dot = dots[i][v];
                f32v weighted = (dot < 0.0f ? f32v{} : dot) * load(weights + h + v * W);
                // Lanes behind the last head: 0 * inf must not add NaN.
                for (int64_t lane = p.heads - h - v * W; lane < W; lane++)
                    if (lane >= 0) weighted[lane] = 0;
                score[i] += weighted;
            }
    }
    for (int i = 0; i < M; i++) out[i] = sum(score[i]);
}

// Scores of entries [first, last) for one token -> out[first ...]; -inf from `visible` on.
template <class T, class TW>
void score_block(const Problem& p, const T* q, const TW* weights, const T* keys, int64_t visible,
                 int64_t first, int64_t last, float* memory, float* out) {
    int64_t lanes = round_up(p.heads, 2 * W), j = first, end = min64(last, visible);
    float* scaled = memory + p.dim * lanes;
    if (j < end) {
        heads_to_lanes(q, p.heads, p.dim, lanes, memory);
        for (int64_t h = 0; h < lanes; h++)
            scaled[h] = h < p.heads ? to_float(weights[h]) * p.scale : 0;
    }
    for (; j + kOuterRows <= end; j += kOuterRows)
        score_keys<kOuterRows>(p, memory, scaled, keys + j * p.dim, out + j);
    for (; j < end; j++) score_keys<1>(p, memory, scaled, keys + j * p.dim, out + j);
    for (; j < last; j++) out[j] = -INFINITY;
}

struct Batch {
    const int64_t *starts, *lengths;
    int64_t count;
};

template <class T, class TW>
void score_all(const Problem& p, const T* q, const T* keys, const TW* weights, const Batch& batch,
               float* score, int threads) {
    int64_t lanes = round_up(p.heads, 2 * W), share = lanes * (p.dim + 1);
    float* memory = scratch_of(kQueries, threads * share);
    int64_t blocks = (p.total + kKeyBlock - 1) / kKeyBlock;
    for (int64_t b = 0; b < batch.count; b++) {
        int64_t n = batch.lengths[b], start = batch.starts[b];
        int64_t work = n * p.total * p.heads * p.dim / 8;
        parallel(threads, n * blocks, work, [&](int64_t begin, int64_t end, int worker) {
            float* mine = memory + worker * share;
            for (int64_t i = begin; i < end; i++) {
                int64_t t = i / blocks, first = i % blocks * kKeyBlock;
                int64_t visible = (start + t + 1) / p.ratio;
                score_block(p, q + t * p.heads * p.dim, weights + t * p.heads,
                            keys + b * p.capacity * p.dim, visible, first,
                            min64(first + kKeyBlock, p.total), mine, score + t * p.total);
            }
        });
        q += n * p.heads * p.dim;
        weights += n * p.heads;
        score += n * p.total;
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// score [n, total] float32 = scale * sum over heads of weights * relu(q . key), -inf where an entry
// is not visible. q [n, heads, dim] and keys [batch, capacity, dim] of `dtype`, weights [n, heads]
// of `weights_dtype`; starts, lengths [batch]. total <= capacity.
DSV4_EXPORT int dsv4_index_score(const void* q, const void* keys, const void* weights,
                                 const int64_t* starts, const int64_t* lengths, int64_t batch,
                                 int64_t ratio, int64_t heads, int64_t dim, int64_t capacity,
                                 int64_t total, float scale, float* score, int dtype,
                                 int weights_dtype, int threads) {
    Problem p = {heads, dim, capacity, total, ratio, scale};
    Batch sequences = {starts, lengths, batch};
    auto run = [&](auto* typed_q, auto* typed_weights) {
        score_all(p, typed_q, (decltype(typed_q))keys, typed_weights, sequences, score, threads);
    };
    auto run_weights = [&](auto* typed_q) {
        if (weights_dtype == DSV4_F32) run(typed_q, (const float*)weights);
        else run(typed_q, (const bf16*)weights);
    };
    return guarded([&] {
        if (dtype == DSV4_F32) run_weights((const float*)q);
        else run_weights((const bf16*)q);
        return DSV4_OK;
    });
}

// index [n, k] int32: the k <= total best of score [n, total], best first, ties to the lower index;
// -1 where the entry is not among the first visible[row].
DSV4_EXPORT int dsv4_index_topk(const float* score, const int64_t* visible, int64_t n,
                                int64_t total, int64_t k, int32_t* index, int threads) {
    return guarded([&] {
        uint64_t* memory = scratch_of<uint64_t>(kOrder, threads * total);
        parallel(threads, n, n * total * 8, [&](int64_t first, int64_t last, int worker) {
            uint64_t* keys = memory + worker * total;
            for (int64_t t = first; t < last; t++) {
                best_first(score + t * total, total, k, keys, index + t * k);
                for (int64_t i = t * k; i < (t + 1) * k; i++)
                    if (index[i] >= visible[t]) index[i] = -1;
            }
        });
        return DSV4_OK;
    });
}
