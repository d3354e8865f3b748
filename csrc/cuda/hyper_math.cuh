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

// 1 / x to one unit in the last place for ordinary x, without the branches that keep others from
// overlapping.
__device__ inline float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// A 4 x 4 matrix by Rows rows a thread, in 4 / Rows neighbouring lanes: logits -> doubly stochastic, by
// row softmax + eps, columns, then iters - 1 rounds of rows and columns. A line is divided by its sum +
// eps. Only the scales of rows and columns change from round to round, so errors do not add up: with
// s the scaled sum of a line, its scale goes from 1 / q to 1 / (s + eps q).
template <int Rows> __device__ inline void sinkhorn(float (&m)[Rows][kStreams], int iters, float eps) {
    float row_inverse[Rows], column_inverse[kStreams], row[Rows], column[kStreams];
#pragma unroll
    for (int i = 0; i < Rows; i++) {
        float most = fmaxf(fmaxf(m[i][0], m[i][1]), fmaxf(m[i][2], m[i][3])), sum = 0;
#pragma unroll
        for (int j = 0; j < kStreams; j++) sum += m[i][j] = expf(m[i][j] - most);
        float factor = reciprocal(sum);
#pragma unroll
        for (int j = 0; j < kStreams; j++) m[i][j] = fmaf(m[i][j], factor, eps);
        row[i] = row_inverse[i] = 1;
    }
#pragma unroll
    for (int j = 0; j < kStreams; j++) column_inverse[j] = 1;
    for (int round = 0; round < iters; round++) {
        if (round > 0) {
#pragma unroll
            for (int i = 0; i < Rows; i++) {
                float low = fmaf(m[i][0], column[0], m[i][1] * column[1]);
                float high = fmaf(m[i][2], column[2], m[i][3] * column[3]);
                row_inverse[i] = fmaf(eps, row_inverse[i], low) + high;
                row[i] = reciprocal(row_inverse[i]);
            }
        }
#pragma unroll
        for (int j = 0; j < kStreams; j++) {
            float sum = m[0][j] * row[0];
#pragma unroll
            for (int i = 1; i < Rows; i++) sum = fmaf(m[i][j], row[i], sum);
#pragma unroll
            for (int lane = 1; lane < kStreams / Rows; lane *= 2)
                sum += __shfl_xor_sync(~0u, sum, lane);
            column_inverse[j] = fmaf(eps, column_inverse[j], sum);
            column[j] = reciprocal(column_inverse[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < Rows; i++)
#pragma unroll
        for (int j = 0; j < kStreams; j++) m[i][j] *= row[i] * column[j];
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
