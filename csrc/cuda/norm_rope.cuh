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

    // Of the elements from column `first` on, the first rotated pair; negative where none is.
    __device__ int pair(int first) const { return (first - (d - 2 * half)) / 2; }
};

// Eight elements of a row in a thread.
using Eight = Vector<bf16>;

__device__ inline float sum_of_squares(const Eight& v) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += to_float(v.at[j]) * to_float(v.at[j]);
    return sum;
}

// v times the norm's factor and `gain`, if there is a weight; rounded.
template <class W>
__device__ inline Eight normed_eight(Eight v, float factor, bool weighted, const Vector<W, 8>& gain) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float value = to_float(v.at[j]) * factor;
        v.at[j] = from_float<bf16>(weighted ? value * to_float(gain.at[j]) : value);
    }
    return v;
}

// The angles of four pairs in a thread.
struct Turns {
    float2 at[4];

    // Of pairs from `pair` on, if it is not negative. Up to 32 pairs: each lane makes one turn for its
    // warp, by `freq` = freqs[lane]. All threads of a warp.
    __device__ Turns(int64_t position, int pair, int half, float freq, const float* freqs) {
        if (half <= 32) {
            const float2 mine = turn(position, freq, false);
#pragma unroll
            for (int j = 0; j < 4; j++)
                at[j] = {__shfl_sync(~0u, mine.x, pair + j), __shfl_sync(~0u, mine.y, pair + j)};
        } else if (pair >= 0) {
#pragma unroll
            for (int j = 0; j < 4; j++) at[j] = turn(position, freqs[pair + j], false);
        }
    }
    __device__ Eight turned(Eight v) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 pair = turned_pair(to_float(v.at[2 * j]), to_float(v.at[2 * j + 1]), at[j]);
            v.at[2 * j] = from_float<bf16>(pair.x);
            v.at[2 * j + 1] = from_float<bf16>(pair.y);
        }
        return v;
    }
};

// A block of Threads threads writes one row to y: thread t has the elements [8 t, 8 t + 8) in v, or none.
// At every step the numbers of rms_norm and rope, also their roundings. What the norm makes goes to
// `normed`, the row also to `turned`. Null pointers: nowhere. partial: Threads / 32 floats.
template <int Threads, class W>
__device__ inline void norm_rope_row(const NormRope<W>& p, Eight v, int64_t position, bf16* y,
                                     float* partial, bf16* normed = nullptr,
                                     bf16* turned = nullptr) {
    const int first = threadIdx.x * 8, lane = threadIdx.x % 32, pair = p.pair(first);
    const bool mine = first < p.d;
    Vector<W, 8> gain;
    if (mine && p.weight) gain = load_vector<W, 8>(p.weight + first);
    const float freq = lane < p.half ? p.freqs[lane] : 0;
    const Turns turns(position, mine ? pair : -1, p.half, freq, p.freqs);
    const float sum = block_sum<Threads>(mine ? sum_of_squares(v) : 0, partial);
    if (!mine) return;
    v = normed_eight(v, 1 / sqrtf(sum / (float)p.d + p.eps), p.weight != nullptr, gain);
    if (normed) store_vector(normed + first, v);
    if (pair >= 0) v = turns.turned(v);
    if (turned) store_vector(turned + first, v);
    if (y) store_vector(y + first, v);
}

}  // namespace dsv4
