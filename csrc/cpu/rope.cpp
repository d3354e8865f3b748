// Op rope: rotate interleaved pairs of the last dims.

#include <cmath>

#include "parallel.h"
#include "vec.h"

namespace dsv4 {
namespace {

// Rotate the pairs of x's last 2 * half dims; the others are copied. cos, sin [half].
template <class T>
void rotate(const T* x, int64_t d, int64_t half, const float* cos, const float* sin, T* y) {
    int64_t copied = d - 2 * half;
    std::memcpy(y, x, copied * sizeof(T));
    for (int64_t i = 0; i < half; i++) {
        float even = to_float(x[copied + 2 * i]), odd = to_float(x[copied + 2 * i + 1]);
        store_one(y + copied + 2 * i, even * cos[i] - odd * sin[i]);
        store_one(y + copied + 2 * i + 1, even * sin[i] + odd * cos[i]);
    }
}

template <class T>
void rope(const T* x, const int64_t* positions, int64_t n, int64_t heads, int64_t d,
          const float* freqs, int64_t half, float sign, T* y, int threads) {
    float* memory = scratch_of(kMixes, threads * 2 * half);
    parallel(threads, n, n * heads * d, [&](int64_t first, int64_t last, int worker) {
        float *cos = memory + worker * 2 * half, *sin = cos + half;
        for (int64_t t = first; t < last; t++) {
            for (int64_t i = 0; i < half; i++) {
                float angle = float(positions[t]) * freqs[i];
                cos[i] = std::cos(angle);
                sin[i] = sign * std::sin(angle);
            }
            for (int64_t h = t * heads; h < (t + 1) * heads; h++)
                rotate(x + h * d, d, half, cos, sin, y + h * d);
        }
    });
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x, y [n, heads, d] of `dtype`, positions [n], freqs [half] float32; angle = position * freq,
// turned back if inverse.
DSV4_EXPORT int dsv4_rope(const void* x, int dtype, const int64_t* positions, int64_t n,
                          int64_t heads, int64_t d, const float* freqs, int64_t half, int inverse,
                          void* y, int threads) {
    float sign = inverse ? -1.0f : 1.0f;
    return guarded([&] {
        if (dtype == DSV4_F32)
            rope((const float*)x, positions, n, heads, d, freqs, half, sign, (float*)y, threads);
        else rope((const bf16*)x, positions, n, heads, d, freqs, half, sign, (bf16*)y, threads);
        return DSV4_OK;
    });
}
