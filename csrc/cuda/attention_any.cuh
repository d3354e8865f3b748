// Attention for any dtype and head width: a block a token and head, plain arithmetic.
#pragma once

#include "attention.cuh"
#include "kv_entry.cuh"

namespace dsv4 {

constexpr int kWarps = 4, kMostWidth = 512;

// One block a token and head; each warp takes every fourth key, lane i elements i, i + 32, ... Packed
// pools are laid out as `layout` says.
template <class T, bool kPacked>
__global__ void __launch_bounds__(32 * kWarps)
    attention_any_kernel(const T* q, Keys keys, const float* sink, float scale, int64_t heads,
                         EntryLayout layout, T* o, float* lse) {
    constexpr int kElements = kMostWidth / 32;
    __shared__ float value[kWarps][kMostWidth];
    __shared__ Softmax part[kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = layout.dim;
    const int64_t row = blockIdx.x;
    const int token = row / heads;
    let_next_start();
    wait_for_previous();
    float query[kElements], sum[kElements] = {};
    for (int i = 0; i < kElements; i++) {
        int at = lane + 32 * i;
        query[i] = at < dim ? to_float(q[row * dim + at]) * (scale * kLog2e) : 0;
    }
    Softmax s = {-INFINITY, 0};
    for (int which = 0; which < 2; which++) {
        Pool pool = keys.pick(which);
        for (int k = warp; k < pool.width; k += kWarps) {
            int64_t index = pool.index[(int64_t)token * pool.width + k];
            if (index < 0) continue;
            if (index >= pool.rows) __trap();
            const uint8_t* key =
                (const uint8_t*)pool.keys + index * (kPacked ? layout.bytes() : dim * sizeof(T));
            float element[kElements], dot = 0;
#pragma unroll
            for (int i = 0; i < kElements; i++) {
                int at = lane + 32 * i;
                if (at >= dim) element[i] = 0;
                else if constexpr (kPacked) element[i] = entry_value(key, layout, at);
                else element[i] = to_float(((const T*)key)[at]);
                dot += query[i] * element[i];
            }
            dot = warp_sum(dot);
            float most = fmaxf(s.most, dot), shrink = weight_of(s.most, most);
            float p = weight_of(dot, most);
            s = {most, s.sum * shrink + p};
#pragma unroll
            for (int i = 0; i < kElements; i++) sum[i] = sum[i] * shrink + p * element[i];
        }
    }
    if (lane == 0) part[warp] = s;
    for (int i = 0; i < kElements; i++) value[warp][lane + 32 * i] = sum[i];
    __syncthreads();
    Softmax all = part[0];
    for (int w = 1; w < kWarps; w++) all.most = fmaxf(all.most, part[w].most);
    all.sum = 0;
    for (int w = 0; w < kWarps; w++) all.sum += part[w].sum * weight_of(part[w].most, all.most);
    Softmax total = with_sink(all, sink[row % heads]);
    for (int i = threadIdx.x; i < dim; i += 32 * kWarps) {
        float result = 0;
        for (int w = 0; w < kWarps; w++)
            result += value[w][i] * weight_of(part[w].most, total.most);
        o[row * dim + i] = from_float<T>(result / total.sum);
    }
    if (threadIdx.x == 0) lse[row] = lse_of(total);
}

}  // namespace dsv4
