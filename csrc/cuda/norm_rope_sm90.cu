// Per-row norm, rope and cache insert in one launch, for what comes one after another in a decode step.

#include <assert.h>

#include "dispatch.cuh"
#include "rope.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 64, kV = Vector<bf16>::kSize;

struct Rows {
    const bf16* x;  // [n * heads, d]
    int heads, d, half;
    float eps;
    const int64_t* positions;  // [n]
    const float* freqs;        // [half]
    const int64_t* slots;      // [n * heads] rows of y, or null: the same ones
    int64_t count;             // rows of y
    bf16* y;
    int64_t stride;  // of y's rows
};

// One block a row, eight elements a thread: at every step the numbers of rms_norm, rope and cache_write,
// also their roundings.
template <class W>
__global__ void __launch_bounds__(kThreads) norm_rope_kernel(Rows p, const W* weight) {
    __shared__ float partial[kThreads / 32];
    const int first = threadIdx.x * kV, rotated = first - (p.d - 2 * p.half);
    const bool mine = first < p.d;
    let_next_start();
    wait_for_previous();
    Vector<W, kV> gain;
    if (mine && weight) gain = load_vector<W, kV>(weight + first);
    const int64_t row = blockIdx.x;
    Vector<bf16> v;
    float2 turns[kV / 2];
    if (mine) v = load_vector(p.x + row * p.d + first);
    if (mine && rotated >= 0) {
        int64_t position = p.positions[row / p.heads];
#pragma unroll
        for (int j = 0; j < kV / 2; j++) turns[j] = turn(position, p.freqs[rotated / 2 + j], false);
    }
    float sum = 0;
    if (mine) {
#pragma unroll
        for (int j = 0; j < kV; j++) sum += to_float(v.at[j]) * to_float(v.at[j]);
    }
    float factor = 1 / sqrtf(block_sum<kThreads>(sum, partial) / (float)p.d + p.eps);
    const int64_t to = p.slots ? p.slots[row] : row;
    if (!mine || to < 0) return;
    assert(to < p.count && "cache_write: a slot is past the end of the cache");
#pragma unroll
    for (int j = 0; j < kV; j++) {
        float value = to_float(v.at[j]) * factor;
        v.at[j] = from_float<bf16>(weight ? value * to_float(gain.at[j]) : value);
    }
    if (rotated >= 0) {
#pragma unroll
        for (int j = 0; j < kV; j += 2) {
            float even = to_float(v.at[j]), odd = to_float(v.at[j + 1]);
            float2 cs = turns[j / 2];
            v.at[j] = from_float<bf16>(even * cs.x - odd * cs.y);
            v.at[j + 1] = from_float<bf16>(even * cs.y + odd * cs.x);
        }
    }
    store_vector(p.y + to * p.stride + first, v);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [rows, d] bfloat16, `heads` rows a token; weight [d] or null -> y [count, d] with a row stride, at
// rows `slots` (negative: nowhere) or, if null, the same rows.
DSV4_EXPORT int dsv4_norm_rope(const void* x, int64_t rows, int64_t heads, int64_t d,
                               const void* weight, int weight_dtype, float eps,
                               const int64_t* positions, const float* freqs, int64_t half,
                               const int64_t* slots, int64_t count, void* y, int64_t stride,
                               void* stream) {
    if (d > kThreads * kV || d % kV || 2 * half % kV || 2 * half > d || stride % kV)
        return kUnsupported;
    Rows p = {(const bf16*)x, (int)heads, (int)d, (int)half, eps, positions, freqs, slots, count,
              (bf16*)y, stride};
    return with_dtype(weight_dtype, [&](auto tag) {
        using W = type_of<decltype(tag)>;
        return launch(norm_rope_kernel<W>, dim3(rows), kThreads, 0, stream, p, (const W*)weight);
    });
}
