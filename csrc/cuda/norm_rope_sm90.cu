// Per-row norm, rope and cache insert in one launch, for what comes one after another in a decode step.

#include <assert.h>

#include "dispatch.cuh"
#include "norm_rope.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 4, kMost = 512;  // rows of a block; elements of a row

struct Rows {
    const bf16* x;  // [count, d]
    int64_t count;
    int heads;                 // rows a token
    const int64_t* positions;  // [count / heads]
    const int64_t* slots;      // [count] rows of y, or null: the same ones
    int64_t places;            // rows of y
    bf16* y;
    int64_t stride;         // of y's rows
    bf16 *normed, *turned;  // [count, d] or null: the results before the rope, and before y
};

// A warp a row, eight elements of its first half and of its second half a lane. Adds up as rms_norm does: each
// 256 columns over the warp, then in order.
template <class W>
__global__ void __launch_bounds__(32 * kWarps) norm_rope_kernel(Rows p, NormRope<W> how) {
    const int lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x * (int64_t)kWarps + threadIdx.x / 32;
    let_next_start();
    const float freq = lane < how.half ? how.freqs[lane] : 0;
    Vector<W, 8> gain[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (how.weight && 256 * h + 8 * lane < how.d)
            gain[h] = load_vector<W, 8>(how.weight + 256 * h + 8 * lane);
    wait_for_previous();
    if (row >= p.count) return;
    const int64_t position = p.positions[row / p.heads], to = p.slots ? p.slots[row] : row;
    Eight v[2];
    float sum = 0;
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (256 * h + 8 * lane < how.d) v[h] = load_vector(p.x + row * how.d + 256 * h + 8 * lane);
#pragma unroll
    for (int h = 0; h < 2; h++)
        sum += warp_sum(256 * h + 8 * lane < how.d ? sum_of_squares(v[h]) : 0);
    const float factor = 1 / sqrtf(sum / (float)how.d + how.eps);
    assert(to < p.places && "cache_write: a slot is past the end of the cache");
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int first = 256 * h + 8 * lane, pair = how.pair(first);
        const bool mine = first < how.d;
        const Turns turns(position, mine ? pair : -1, how.half, freq, how.freqs);
        if (!mine) continue;
        v[h] = normed_eight(v[h], factor, how.weight != nullptr, gain[h]);
        if (p.normed) store_vector(p.normed + row * how.d + first, v[h]);
        if (pair >= 0) v[h] = turns.turned(v[h]);
        if (p.turned) store_vector(p.turned + row * how.d + first, v[h]);
        if (to >= 0) store_vector(p.y + to * p.stride + first, v[h]);
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [rows, d] bfloat16, `heads` rows a token; weight [d] or null -> y [count, d] with a row stride, at
// rows `slots` (negative: nowhere) or, if null, the same rows. What the norm returns goes to `normed`, what
// the rope returns to `turned` [rows, d], unless null.
DSV4_EXPORT int dsv4_norm_rope(const void* x, int64_t rows, int64_t heads, int64_t d,
                               const void* weight, int weight_dtype, float eps,
                               const int64_t* positions, const float* freqs, int64_t half,
                               const int64_t* slots, int64_t count, void* y, int64_t stride,
                               void* normed, void* turned, void* stream) {
    if (d > kMost || d % 8 || 2 * half % 8 || 2 * half > d || stride % 8) return kUnsupported;
    Rows p = {(const bf16*)x, rows,       (int)heads, positions,     slots,
              count,          (bf16*)y,   stride,     (bf16*)normed, (bf16*)turned};
    return with_dtype(weight_dtype, [&](auto tag) {
        using W = type_of<decltype(tag)>;
        NormRope<W> how = {(int)d, (int)half, eps, (const W*)weight, freqs};
        return launch(norm_rope_kernel<W>, dim3(ceil_div(rows, (int64_t)kWarps)), 32 * kWarps, 0, stream,
                      p, how);
    });
}
