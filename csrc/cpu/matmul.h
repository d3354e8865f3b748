// y = x W^T for every weight format; linear.cpp defines it, other ops call it.
#pragma once

#include "../common/abi.h"

namespace dsv4 {

// Activations or results [rows, columns] in float32 or bfloat16; `stride` elements from row to row.
struct Matrix {
    void* data;
    int64_t stride;
    int dtype;
};

// y [m, n] = x [m, groups * k] W^T, float32 accumulation. With groups > 1, rows
// [g * n/groups, (g+1) * n/groups) of W see only columns [g * k, (g+1) * k) of x.
void matmul(Matrix x, int64_t m, const dsv4_weight& w, int64_t groups, Matrix y, int threads);

}  // namespace dsv4
