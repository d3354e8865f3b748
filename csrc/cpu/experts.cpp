// Ops experts and shared_expert: clamped SwiGLU between three matrices; moe_sum.
//
// One call runs one expert on the tokens that chose it and adds to y, so the weights of an expert
// are read only when it is used, whatever keeps them.

#include "matmul.h"
#include "parallel.h"
#include "vec.h"

namespace dsv4 {
namespace {

// silu(min(gate, limit)) * clamp(up, -limit, limit): the gate is clamped from above only.
inline f32v swiglu(f32v gate, f32v up, float limit) {
    const f32v high = splat(limit), low = splat(-limit);
    gate = gate > high ? high : gate;
    up = up < low ? low : up;
    up = up > high ? high : up;
    return gate / (1.0f + exp(-gate)) * up;
}

// The tokens of one expert: which rows of x, and the weight of each (null: all rows, no weight).
struct Chosen {
    int64_t count;
    const int64_t* rows;
    const float* routing;
};

struct Expert {
    const dsv4_weight &w1, &w3, &w2;  // gate and up [i, d], down [d, i]
    float limit;
};

template <class T> T* gather(const T* x, const Chosen& c, int64_t d) {
    T* out = scratch_of<T>(kRows, c.count * d);
    for (int64_t r = 0; r < c.count; r++)
        std::memcpy(out + r * d, x + c.rows[r] * d, d * sizeof(T));
    return out;
}

// y[row] += expert(x[row]). Gate, up and the hidden vector are rounded to T, as the reference does.
template <class T>
void forward(const T* x, const Chosen& c, const Expert& e, float* y, int threads) {
    constexpr int dtype = sizeof(T) == 4 ? DSV4_F32 : DSV4_BF16;
    int64_t d = e.w1.k, inner = e.w1.n, m = c.count;
    T* xs = c.rows ? gather(x, c, d) : const_cast<T*>(x);
    T* gate = scratch_of<T>(kGate, m * inner);
    T* up = scratch_of<T>(kUp, m * inner);
    T* hidden = scratch_of<T>(kHidden, m * inner);
    matmul({xs, d, dtype}, m, e.w1, 1, {gate, inner, dtype}, threads);
    matmul({xs, d, dtype}, m, e.w3, 1, {up, inner, dtype}, threads);
    parallel(threads, m, m * inner, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++) {
            f32v weight = splat(c.routing ? c.routing[r] : 1.0f);
            for (int64_t i = r * inner; i < (r + 1) * inner; i += W) {
                int64_t count = (r + 1) * inner - i;
                f32v h = swiglu(load_upto(gate + i, count), load_upto(up + i, count), e.limit);
                store_upto(hidden + i, h * weight, count);
            }
        }
    });
    float* down = scratch_of(kProducts, m * d);
    matmul({hidden, inner, dtype}, m, e.w2, 1, {down, d, DSV4_F32}, threads);
    for (int64_t r = 0; r < m; r++) {
        float* out = y + (c.rows ? c.rows[r] : r) * d;
        for (int64_t i = 0; i < d; i += W) {
            f32v total = load_upto(out + i, d - i) + load_upto(down + r * d + i, d - i);
            store_upto(out + i, total, d - i);
        }
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// Adds one expert's output to y [n, d] float32, for the tokens of x [n, d] (x_dtype) that chose it:
// experts [n, k] int32 and routing [n, k] float32, entries equal to `id`. With experts null, for
// all tokens and without routing weight. w1, w3 [i, d], w2 [d, i].
DSV4_EXPORT int dsv4_expert(const void* x, int x_dtype, int64_t n, const int32_t* experts,
                            const float* routing, int64_t k, int64_t id, const dsv4_weight* w1,
                            const dsv4_weight* w3, const dsv4_weight* w2, float limit, float* y,
                            int threads) {
    return guarded([&] {
        Chosen chosen = {n, nullptr, nullptr};
        if (experts != nullptr) {
            int64_t* rows = scratch_of<int64_t>(kOrder, 2 * n * k);
            float* weights = (float*)(rows + n * k);
            int64_t count = 0;
            for (int64_t i = 0; i < n * k; i++) {
                if (experts[i] != id) continue;
                rows[count] = i / k;
                weights[count++] = routing[i];
            }
            chosen = {count, rows, weights};
        }
        Expert expert = {*w1, *w3, *w2, limit};
        if (x_dtype == DSV4_F32) forward((const float*)x, chosen, expert, y, threads);
        else forward((const bf16*)x, chosen, expert, y, threads);
        return DSV4_OK;
    });
}

// out = a + b, `count` elements: float32 in, `out_dtype` out.
DSV4_EXPORT int dsv4_moe_sum(const float* a, const float* b, int64_t count, void* out,
                             int out_dtype, int threads) {
    int64_t blocks = (count + W - 1) / W;
    parallel(threads, blocks, count, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first * W; i < min64(last * W, count); i += W) {
            f32v total = load_upto(a + i, count - i) + load_upto(b + i, count - i);
            if (out_dtype == DSV4_F32) store_upto((float*)out + i, total, count - i);
            else store_upto((bf16*)out + i, total, count - i);
        }
    });
    return DSV4_OK;
}
