// Op hc_post: expanding a sublayer's output into the four residual streams.

#include "dispatch.cuh"
#include "hopper.cuh"
#include "hyper_math.cuh"

namespace dsv4 {
namespace {

// One store of all values.
__device__ inline void store_floats(bf16* to, const float (&v)[8]) {
    store16(to, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
            pack_bf16(v[6], v[7]));
}
__device__ inline void store_floats(float* to, const float (&v)[4]) {
    store16(to, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
            __float_as_uint(v[3]));
}
template <class T> __device__ inline void store_floats(T* to, const float (&v)[1]) {
    *to = from_float<T>(v[0]);
}

constexpr int kExpandThreads = 128;

// N columns a thread, `blocks` blocks a token.
template <class T, int N>
__global__ void __launch_bounds__(kExpandThreads)
    expand_kernel(const T* y, const T* x, const float* post, const float* comb, int64_t d, int blocks,
                  T* out) {
    using V = Vector<T, N>;
    let_next_start();
    int64_t token = blockIdx.x / blocks;
    int64_t column = ((int64_t)(blockIdx.x % blocks) * kExpandThreads + threadIdx.x) * N;
    wait_for_previous();
    if (column >= d) return;
    V in = *(const V*)(y + token * d + column);
    V streams[kStreams];
    x += token * kStreams * d + column;
#pragma unroll
    for (int j = 0; j < kStreams; j++) streams[j] = *(const V*)(x + j * d);
    float c[kCombs], a[kStreams];
#pragma unroll
    for (int i = 0; i < kStreams; i++) {
        a[i] = post[token * kStreams + i];
        *(float4*)(c + kStreams * i) = *(const float4*)(comb + token * kCombs + kStreams * i);
    }
    out += token * kStreams * d + column;
#pragma unroll
    for (int k = 0; k < kStreams; k++) {
        float value[N];
        expand_streams(in, streams, a[k], c + k, value);
        store_floats(out + k * d, value);
    }
}

template <class T, int N>
int expand(const T* y, const T* x, const float* post, const float* comb, int64_t n, int64_t d,
           T* out, void* stream) {
    int blocks = (int)ceil_div(d, kExpandThreads * N);
    return launch(expand_kernel<T, N>, dim3(n * blocks), kExpandThreads, 0, stream, y, x, post, comb,
                  d, blocks, out);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// out[n, k] = post[n, k] * y[n] + sum over j of comb[n, j, k] * x[n, j]; y [n, d], x, out [n, 4, d].
DSV4_EXPORT int dsv4_hc_post(const void* y, const void* x, const float* post, const float* comb,
                             int dtype, int64_t n, int64_t d, void* out, void* stream) {
    return with_dtype(dtype, [&](auto tag) {
        using T = type_of<decltype(tag)>;
        constexpr int N = 16 / sizeof(T);
        auto run = d % N == 0 ? expand<T, N> : expand<T, 1>;
        return run((const T*)y, (const T*)x, post, comb, n, d, (T*)out, stream);
    });
}
