// What the kernels of linear share.
#pragma once

#include "decode.cuh"

namespace dsv4 {

constexpr int kMostBlocks = 8;    // of a cluster
constexpr int kProcessors = 132;  // of an H100 or H200; another number only costs time

// y [m, n] = x [m, groups * k] W^T, both with a row stride; output rows of group g see columns
// [g * k, (g + 1) * k) of x.
struct Product {
    dsv4_weight w;
    const void* x;
    void* y;
    int64_t m, x_stride, y_stride, per_group;  // per_group: output rows of a group
};

}  // namespace dsv4
