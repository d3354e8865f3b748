// What the attention kernels share: pools of keys, and the state of a softmax with a sink.
#pragma once

#include "dispatch.cuh"

namespace dsv4 {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// A pool of keys, in q's dtype or packed, and for each token the rows of it that it attends to, -1 for
// none.
struct Pool {
    const void* keys;
    const int* index;  // [n, width]
    int rows;          // of the pool; INT_MAX for more, which no index reaches
    int width;
};
struct Keys {
    Pool window, entries;
    __device__ Pool pick(bool second) const { return second ? entries : window; }
};

// What a row of logits amounts to: the largest, and the sum of 2^(logit - largest), in log2 units.
struct Softmax {
    float most, sum;
};
// 2^(x - most) where both may be -inf.
__device__ inline float weight_of(float x, float most) {
    return exp2f(x - (most == -INFINITY ? 0 : most));
}
__device__ inline Softmax with_sink(Softmax s, float sink) {
    float most = fmaxf(s.most, sink * kLog2e);
    return {most, s.sum * weight_of(s.most, most) + weight_of(sink * kLog2e, most)};
}
__device__ inline float lse_of(Softmax s) {
    return (s.most == -INFINITY ? 0 : s.most) * kLn2 + logf(s.sum);
}

}  // namespace dsv4
