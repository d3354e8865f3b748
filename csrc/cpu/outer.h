// A register tile of sums of outer products: sums[i][v] += a(l, i) * b(l, v) over l. No horizontal
// sums, so it suits a product whose columns can lie in vector lanes.
#pragma once

#include "vec.h"

namespace dsv4 {

#if defined(__AVX512F__)
constexpr int kOuterRows = 12;  // with two vectors of columns: 24 of 32 registers hold sums
#else
constexpr int kOuterRows = 4;  // 8 of 16
#endif

template <int M, int N, class A, class B>
inline void outer_tile(int64_t depth, const A& a, const B& b, f32v (&sums)[M][N]) {
    for (int64_t l = 0; l < depth; l++) {
        f32v right[N];
        for (int v = 0; v < N; v++) right[v] = b(l, v);
        for (int i = 0; i < M; i++) {
            f32v left = splat(a(l, i));
            for (int v = 0; v < N; v++) sums[i][v] += left * right[v];
        }
    }
}

// q [heads, dim] -> [dim, lanes] float32, zeros behind the last head: heads become lanes.
template <class T>
inline void heads_to_lanes(const T* q, int64_t heads, int64_t dim, int64_t lanes, float* out) {
    for (int64_t d = 0; d < dim; d++) {
        for (int64_t h = 0; h < heads; h++) out[d * lanes + h] = to_float(q[h * dim + d]);
        for (int64_t h = heads; h < lanes; h++) out[d * lanes + h] = 0;
    }
}

}  // namespace dsv4
