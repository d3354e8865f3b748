// The C ABI of every kernel: raw pointers, int64 sizes, an int of threads, an int status.
// Nothing here knows about torch. The Python side checks shapes and dtypes before it calls.
#pragma once

#include <stdint.h>

#define DSV4_EXPORT extern "C" __attribute__((visibility("default")))

// Element types of activations and dense weights.
enum dsv4_dtype { DSV4_F32 = 0, DSV4_BF16 = 1, DSV4_F16 = 2 };

// How a weight matrix [n, k] is stored; see engine/formats.py.
enum dsv4_format {
    DSV4_NVFP4 = 0,     // codes [n, k/2], scale e4m3 [n, k/16], global scale
    DSV4_MXFP4 = 1,     // codes [n, k/2], scale e8m0 [n, k/32]
    DSV4_FP8_E8M0 = 2,  // e4m3 [n, k], scale e8m0 [ceil(n/128), ceil(k/128)]
    DSV4_FP8_F32 = 3,   // e4m3 [n, k], scale float32 [ceil(n/128), ceil(k/128)]
    DSV4_DENSE_F32 = 4,
    DSV4_DENSE_BF16 = 5,
    DSV4_DENSE_F16 = 6,
};

// What a kernel returns; 0 is success.
enum dsv4_status { DSV4_OK = 0, DSV4_NO_MEMORY = 1, DSV4_BAD_INDEX = 2 };

// One weight matrix, both tensors contiguous.
typedef struct dsv4_weight {
    const void* data;
    const void* scale;  // null for dense
    int64_t n;
    int64_t k;
    float global_scale;  // 1 but for nvfp4; multiplies the product
    int32_t format;      // enum dsv4_format
} dsv4_weight;
