// Ops hc_pre, hc_post, hc_head: the hyper-connections between the residual streams.

#include <cmath>

#include "matmul.h"
#include "parallel.h"
#include "vec.h"

namespace dsv4 {
namespace {

struct Sizes {
    int64_t n, hc, d;  // x [n, hc, d]
};

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// rsqrt(mean(x^2) + eps) over `count` elements.
template <class T> float inverse_rms(const T* x, int64_t count, float eps) {
    f32v even = {}, odd = {};
    for (int64_t i = 0; i < count; i += 2 * W) {
        f32v a = load_upto(x + i, count - i);
        f32v b = count - i > W ? load_upto(x + i + W, count - i - W) : f32v{};
        even += a * a;
        odd += b * b;
    }
    return 1.0f / std::sqrt(sum(even + odd) / float(count) + eps);
}

// mixes [n, m] = (x fn^T) * inverse_rms(x), x [n, hc * d], fn [m, hc * d]: scaled after it.
template <class T>
float* mix(const T* x, const Sizes& s, const float* fn, int64_t m, float eps, int threads) {
    int dtype = sizeof(T) == 4 ? DSV4_F32 : DSV4_BF16;
    int64_t width = s.hc * s.d;
    float* mixes = scratch_of(kMixes, s.n * m);
    dsv4_weight weight = {fn, nullptr, m, width, 1.0f, DSV4_DENSE_F32};
    matmul({(void*)x, width, dtype}, s.n, weight, 1, {mixes, m, DSV4_F32}, threads);
    parallel(threads, s.n, s.n * width, [&](int64_t first, int64_t last, int) {
        for (int64_t t = first; t < last; t++) {
            float rho = inverse_rms(x + t * width, width, eps);
            for (int64_t i = 0; i < m; i++) mixes[t * m + i] *= rho;
        }
    });
    return mixes;
}

// out [d] = sum over streams of pre[h] * x[h].
template <class T> void collapse(const T* x, const float* pre, const Sizes& s, T* out) {
    for (int64_t i = 0; i < s.d; i += W) {
        f32v total = {};
        for (int64_t h = 0; h < s.hc; h++) total += load_upto(x + h * s.d + i, s.d - i) * pre[h];
        store_upto(out + i, total, s.d - i);
    }
}

// comb [hc, hc] divided by its sums over rows (step 1 within a row) or columns, plus eps.
void normalise(float* comb, int64_t hc, float eps, int64_t group, int64_t step) {
    for (int64_t g = 0; g < hc; g++) {
        float total = 0;
        for (int64_t i = 0; i < hc; i++) total += comb[g * group + i * step];
        for (int64_t i = 0; i < hc; i++) comb[g * group + i * step] /= total + eps;
    }
}

// Logits [hc, hc] in place -> doubly stochastic: row softmax + eps, columns, then iters - 1 rounds
// of rows and columns; the columns come last.
void sinkhorn(float* comb, int64_t hc, int64_t iters, float eps) {
    for (int64_t j = 0; j < hc; j++) {
        float* row = comb + j * hc;
        float top = row[0], total = 0;
        for (int64_t k = 1; k < hc; k++) top = row[k] > top ? row[k] : top;
        for (int64_t k = 0; k < hc; k++) total += row[k] = std::exp(row[k] - top);
        for (int64_t k = 0; k < hc; k++) row[k] = row[k] / total + eps;
    }
    normalise(comb, hc, eps, 1, hc);
    for (int64_t i = 1; i < iters; i++) {
        normalise(comb, hc, eps, hc, 1);
        normalise(comb, hc, eps, 1, hc);
    }
}

struct Mapping {
    const float *fn, *scale, *base;
    float eps, norm_eps;
};

template <class T>
void pre(const T* x, const Sizes& s, const Mapping& p, int64_t iters, T* u, float* post,
         float* comb, int threads) {
    int64_t hc = s.hc, m = (2 + hc) * hc;
    float* mixes = mix(x, s, p.fn, m, p.norm_eps, threads);
    parallel(threads, s.n, s.n * hc * s.d, [&](int64_t first, int64_t last, int) {
        for (int64_t t = first; t < last; t++) {
            float *row = mixes + t * m, *own = comb + t * hc * hc;
            for (int64_t h = 0; h < hc; h++) {
                row[h] = sigmoid(row[h] * p.scale[0] + p.base[h]) + p.eps;
                post[t * hc + h] = 2 * sigmoid(row[hc + h] * p.scale[1] + p.base[hc + h]);
            }
            for (int64_t i = 0; i < hc * hc; i++)
                own[i] = row[2 * hc + i] * p.scale[2] + p.base[2 * hc + i];
            sinkhorn(own, hc, iters, p.eps);
            collapse(x + t * hc * s.d, row, s, u + t * s.d);
        }
    });
}

template <class T>
void head(const T* x, const Sizes& s, const Mapping& p, T* out, int threads) {
    float* mixes = mix(x, s, p.fn, s.hc, p.norm_eps, threads);
    parallel(threads, s.n, s.n * s.hc * s.d, [&](int64_t first, int64_t last, int) {
        for (int64_t t = first; t < last; t++) {
            float* row = mixes + t * s.hc;
            for (int64_t h = 0; h < s.hc; h++)
                row[h] = sigmoid(row[h] * p.scale[0] + p.base[h]) + p.eps;
            collapse(x + t * s.hc * s.d, row, s, out + t * s.d);
        }
    });
}

// x'_k = post_k * y + sum_j comb[j, k] * x_j: the sum runs over comb's first index.
template <class TY, class T>
void post(const TY* y, const T* x, const float* post, const float* comb, const Sizes& s, T* out,
          int threads) {
    int64_t hc = s.hc, d = s.d;
    parallel(threads, s.n * hc, s.n * hc * hc * d, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; i++) {
            int64_t t = i / hc, k = i % hc;
            const float* column = comb + t * hc * hc + k;
            for (int64_t c = 0; c < d; c += W) {
                f32v total = load_upto(y + t * d + c, d - c) * post[i];
                for (int64_t j = 0; j < hc; j++)
                    total += load_upto(x + (t * hc + j) * d + c, d - c) * column[j * hc];
                store_upto(out + i * d + c, total, d - c);
            }
        }
    });
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [n, hc, d] -> u [n, d] (both of `dtype`), post [n, hc] and comb [n, hc, hc] float32.
// fn [(2 + hc) * hc, hc * d], scale [3], base [(2 + hc) * hc], float32; order pre, post, comb.
DSV4_EXPORT int dsv4_hc_pre(const void* x, int dtype, int64_t n, int64_t hc, int64_t d,
                            const float* fn, const float* scale, const float* base, int64_t iters,
                            float eps, float norm_eps, void* u, float* post, float* comb,
                            int threads) {
    Sizes s = {n, hc, d};
    Mapping p = {fn, scale, base, eps, norm_eps};
    return guarded([&] {
        if (dtype == DSV4_F32) pre((const float*)x, s, p, iters, (float*)u, post, comb, threads);
        else pre((const bf16*)x, s, p, iters, (bf16*)u, post, comb, threads);
        return DSV4_OK;
    });
}

// x [n, hc, d] -> h [n, d], both of `dtype`; fn [hc, hc * d], scale [1], base [hc], float32.
DSV4_EXPORT int dsv4_hc_head(const void* x, int dtype, int64_t n, int64_t hc, int64_t d,
                             const float* fn, const float* scale, const float* base, float eps,
                             float norm_eps, void* h, int threads) {
    Sizes s = {n, hc, d};
    Mapping p = {fn, scale, base, eps, norm_eps};
    return guarded([&] {
        if (dtype == DSV4_F32) head((const float*)x, s, p, (float*)h, threads);
        else head((const bf16*)x, s, p, (bf16*)h, threads);
        return DSV4_OK;
    });
}

// y [n, d] of y_dtype, x [n, hc, d] of x_dtype, post [n, hc] and comb [n, hc, hc] float32
// -> out [n, hc, d] of x_dtype.
DSV4_EXPORT int dsv4_hc_post(const void* y, int y_dtype, const void* x, int x_dtype,
                             const float* post_weights, const float* comb, int64_t n, int64_t hc,
                             int64_t d, void* out, int threads) {
    Sizes s = {n, hc, d};
    auto run = [&](auto* typed_y, auto* typed_x, auto* typed_out) {
        post(typed_y, typed_x, post_weights, comb, s, typed_out, threads);
    };
    auto run_x = [&](auto* typed_y) {
        if (x_dtype == DSV4_F32) run(typed_y, (const float*)x, (float*)out);
        else run(typed_y, (const bf16*)x, (bf16*)out);
    };
    if (y_dtype == DSV4_F32) run_x((const float*)y);
    else run_x((const bf16*)y);
    return DSV4_OK;
}
