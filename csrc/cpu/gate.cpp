// Op gate: scores = sqrt(softplus(x W^T)), the k best by score + bias, weights from the scores.

#include <cmath>

#include "matmul.h"
#include "order.h"
#include "parallel.h"

namespace dsv4 {
namespace {

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

struct Choice {
    const float* bias;     // [e] or null: added for picking only
    const int32_t* given;  // [n, k] or null: the experts, then nothing is picked
    int64_t count, k;      // experts of the layer, of a token
    float scale;
};

// Experts and weights of one token, from its scores.
void choose(const float* scores, const Choice& c, const int32_t* given, uint64_t* keys,
            float* biased, float* routing, int32_t* experts) {
    if (given != nullptr) {
        std::memcpy(experts, given, c.k * sizeof(int32_t));
    } else {
        for (int64_t e = 0; e < c.count; e++) biased[e] = scores[e] + (c.bias ? c.bias[e] : 0.0f);
        best_first(biased, c.count, c.k, keys, experts);
    }
    float total = 0;
    for (int64_t i = 0; i < c.k; i++) total += routing[i] = scores[experts[i]];
    for (int64_t i = 0; i < c.k; i++) routing[i] = routing[i] / total * c.scale;
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [n, d] of x_dtype, w dense [e, d], bias [e] float32 or null, given [n, k] int32 or null
// -> routing [n, k] float32, experts [n, k] int32, scores [n, e] float32. k <= e.
// DSV4_BAD_INDEX if a given expert is not in [0, e).
DSV4_EXPORT int dsv4_gate(void* x, int x_dtype, const dsv4_weight* w, int64_t n, const float* bias,
                          const int32_t* given, int64_t k, float scale, float* routing,
                          int32_t* experts, float* scores, int threads) {
    int64_t count = w->n;
    for (int64_t i = 0; given != nullptr && i < n * k; i++)
        if (given[i] < 0 || given[i] >= count) return DSV4_BAD_INDEX;
    return guarded([&] {
        matmul({x, w->k, x_dtype}, n, *w, 1, {scores, count, DSV4_F32}, threads);
        Choice choice = {bias, given, count, k, scale};
        uint64_t* memory = scratch_of<uint64_t>(kOrder, threads * 2 * count);
        parallel(threads, n, n * count * 32, [&](int64_t first, int64_t last, int worker) {
            uint64_t* keys = memory + worker * 2 * count;
            for (int64_t t = first; t < last; t++) {
                float* row = scores + t * count;
                for (int64_t e = 0; e < count; e++) row[e] = std::sqrt(softplus(row[e]));
                choose(row, choice, given ? given + t * k : nullptr, keys, (float*)(keys + count),
                       routing + t * k, experts + t * k);
            }
        });
        return DSV4_OK;
    });
}
