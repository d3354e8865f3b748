// Op rms_norm.

#include <cmath>

#include "parallel.h"
#include "vec.h"

namespace dsv4 {
namespace {

// One row; `weight` may be null.
template <class T, class TW>
void norm_row(const T* x, int64_t d, const TW* weight, float eps, T* y) {
    f32v even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * W <= d; i += 2 * W) {
        f32v a = load(x + i), b = load(x + i + W);
        even += a * a;
        odd += b * b;
    }
    for (; i < d; i += W) {
        f32v a = load_upto(x + i, d - i);
        even += a * a;
    }
    float factor = 1.0f / std::sqrt(sum(even + odd) / float(d) + eps);
    for (i = 0; i < d; i += W) {
        f32v value = load_upto(x + i, d - i) * factor;
        if (weight != nullptr) value *= load_upto(weight + i, d - i);
        store_upto(y + i, value, d - i);
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y = x * rsqrt(mean(x^2) + eps) * weight, row by row: x, y [rows, d] of `dtype`, weight [d] of
// weight_dtype or null.
DSV4_EXPORT int dsv4_rms_norm(const void* x, int dtype, int64_t rows, int64_t d, const void* weight,
                              int weight_dtype, float eps, void* y, int threads) {
    auto run = [&](auto* typed_x, auto* typed_weight, auto* typed_y) {
        parallel(threads, rows, rows * d, [&](int64_t first, int64_t last, int) {
            for (int64_t r = first; r < last; r++)
                norm_row(typed_x + r * d, d, typed_weight, eps, typed_y + r * d);
        });
    };
    auto run_weight = [&](auto* typed_x, auto* typed_y) {
        if (weight_dtype == DSV4_F32) run(typed_x, (const float*)weight, typed_y);
        else run(typed_x, (const bf16*)weight, typed_y);
    };
    if (dtype == DSV4_F32) run_weight((const float*)x, (float*)y);
    else run_weight((const bf16*)x, (bf16*)y);
    return DSV4_OK;
}
