// Per-row norm, rope and cache insert in one launch, for what comes one after another in a decode step.

#include <assert.h>

#include "dispatch.cuh"
#include "norm_rope.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 64, kV = Vector<bf16>::kSize;

struct Rows {
    const bf16* x;  // [n * heads, d]
    int heads;
    const int64_t* positions;  // [n]
    const int64_t* slots;      // [n * heads] rows of y, or null: the same ones
    int64_t count;             // rows of y
    bf16* y;
    int64_t stride;         // of y's rows
    bf16 *normed, *turned;  // [n * heads, d] or null: the results before the rope, and before y
};

// One block a row, eight elements a thread.
template <class W>
__global__ void __launch_bounds__(kThreads) norm_rope_kernel(Rows p, NormRope<W> how) {
    __shared__ float partial[kThreads / 32];
    const int first = threadIdx.x * kV;
    let_next_start();
    wait_for_previous();
    const int64_t row = blockIdx.x, to = p.slots ? p.slots[row] : row;
    Vector<bf16> v;
    if (first < how.d) v = load_vector(p.x + row * how.d + first);
    assert(to < p.count && "cache_write: a slot is past the end of the cache");
    bf16* y = to < 0 ? nullptr : p.y + to * p.stride;
    bf16* normed = p.normed ? p.normed + row * how.d : nullptr;
    bf16* turned = p.turned ? p.turned + row * how.d : nullptr;
    norm_rope_row<kThreads>(how, v, p.positions[row / p.heads], y, partial, normed, turned);
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
    if (d > kThreads * kV || d % kV || 2 * half % kV || 2 * half > d || stride % kV)
        return kUnsupported;
    Rows p = {(const bf16*)x, (int)heads, positions,     slots,         count,
              (bf16*)y,       stride,     (bf16*)normed, (bf16*)turned};
    return with_dtype(weight_dtype, [&](auto tag) {
        using W = type_of<decltype(tag)>;
        NormRope<W> how = {(int)d, (int)half, eps, (const W*)weight, freqs};
        return launch(norm_rope_kernel<W>, dim3(rows), kThreads, 0, stream, p, how);
    });
}
