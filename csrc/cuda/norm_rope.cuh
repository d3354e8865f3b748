// RMS norm, rope and rounding of one row, for kernels that do what is done before or after as well.
#pragma once

#include "rope.cuh"
#include "types.cuh"

namespace dsv4 {

// What a row of d elements is multiplied and rotated by; `weight` [d] may be null.
template <class W> struct NormRope {
    int d, half;  // half: rotated pairs, of the last dims
    float eps;
    const W* weight;
    const float* freqs;  // [half]
};

// A block of Threads threads writes one row to y: thread t has the elements [8 t, 8 t + 8) in v, or none.
// At every step the numbers of rms_norm and rope, also their roundings. What the norm makes goes to
// `normed`, the row also to `turned`. Null pointers: nowhere. partial: Threads / 32 floats.
template <int Threads, class W>
__device__ inline void norm_rope_row(const NormRope<W>& p, Vector<bf16> v, int64_t position, bf16* y,
                                     float* partial, bf16* normed = nullptr,
                                     bf16* turned = nullptr) {
    constexpr int V = Vector<bf16>::kSize;
    const int first = threadIdx.x * V, rotated = first - (p.d - 2 * p.half);
    const bool mine = first < p.d;
    Vector<W, V> gain;
    if (mine && p.weight) gain = load_vector<W, V>(p.weight + first);
    float2 turns[V / 2];
    if (mine && rotated >= 0)
#pragma unroll
        for (int j = 0; j < V / 2; j++) turns[j] = turn(position, p.freqs[rotated / 2 + j], false);
    float sum = 0;
    if (mine)
#pragma unroll
        for (int j = 0; j < V; j++) sum += to_float(v.at[j]) * to_float(v.at[j]);
    const float factor = 1 / sqrtf(block_sum<Threads>(sum, partial) / (float)p.d + p.eps);
    if (!mine || !(y || normed || turned)) return;
#pragma unroll
    for (int j = 0; j < V; j++) {
        float value = to_float(v.at[j]) * factor;
        v.at[j] = from_float<bf16>(p.weight ? value * to_float(gain.at[j]) : value);
    }
    if (normed) store_vector(normed + first, v);
    if (rotated >= 0)
#pragma unroll
        for (int j = 0; j < V; j += 2) {
            float even = to_float(v.at[j]), odd = to_float(v.at[j + 1]);
            float2 cs = turns[j / 2];
            v.at[j] = from_float<bf16>(even * cs.x - odd * cs.y);
            v.at[j + 1] = from_float<bf16>(even * cs.y + odd * cs.x);
        }
    if (turned) store_vector(turned + first, v);
    if (y) store_vector(y + first, v);
}

}  // namespace dsv4
