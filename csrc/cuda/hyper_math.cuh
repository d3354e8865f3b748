// What hyper-connections do with the mixes of one token: gates, and the Sinkhorn iterations.
#pragma once

#include "types.cuh"

namespace dsv4 {

constexpr int kStreams = 4;                           // hc
constexpr int kMixes = (2 + kStreams) * kStreams;     // pre 4, post 4, comb 16
constexpr int kCombs = kStreams * kStreams;

// Scalars of hc_pre and hc_head.
struct HyperParameters {
    const float* scale;  // [3], or [1] for the head
    const float* base;   // [24], or [4] for the head
    int iters;
    float eps, norm_eps;
};

__device__ inline float sigmoid(float x) { return __fdividef(1, 1 + expf(-x)); }

// 1 / x to the last place for ordinary x, without the branches that keep others from overlapping.
__device__ inline float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return fmaf(r, fmaf(-x, r, 1.0f), r);
}

// One pass of rows (kColumns false) or columns over comb[4][4]: each is divided by its sum + eps.
template <bool kColumns> __device__ inline void normalise(float (&comb)[kCombs], float eps) {
    constexpr int kLine = kColumns ? 1 : kStreams, kStep = kColumns ? kStreams : 1;
#pragma unroll
    for (int line = 0; line < kStreams; line++) {
        float* c = comb + line * kLine;
        float sum = (c[0] + c[kStep]) + (c[2 * kStep] + c[3 * kStep]) + eps;
        float factor = reciprocal(sum);
#pragma unroll
        for (int i = 0; i < kStreams; i++) c[i * kStep] *= factor;
    }
}

// comb: 16 logits, row-major -> doubly stochastic; row softmax + eps, columns, then iters - 1 rounds.
__device__ inline void sinkhorn(float (&comb)[kCombs], int iters, float eps) {
#pragma unroll
    for (int row = 0; row < kStreams; row++) {
        float* c = comb + row * kStreams;
        float most = fmaxf(fmaxf(c[0], c[1]), fmaxf(c[2], c[3]));
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kStreams; i++) sum += c[i] = expf(c[i] - most);
        float factor = reciprocal(sum);
#pragma unroll
        for (int i = 0; i < kStreams; i++) c[i] = fmaf(c[i], factor, eps);
    }
    normalise<true>(comb, eps);
    for (int i = 1; i < iters; i++) {
        normalise<false>(comb, eps);
        normalise<true>(comb, eps);
    }
}

// One new stream: post * y + sum over j of comb[j] * x_j; `comb` points at a column of comb[4][4].
template <class T, int N>
__device__ inline void expand_streams(const Vector<T, N>& y, const Vector<T, N> (&x)[kStreams],
                                      float post, const float* comb, float (&value)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) value[i] = post * to_float(y.at[i]);
#pragma unroll
    for (int j = 0; j < kStreams; j++)
#pragma unroll
        for (int i = 0; i < N; i++) value[i] += comb[j * kStreams] * to_float(x[j].at[i]);
}

}  // namespace dsv4
