// Ops hc_pre and hc_head: collapsing the four residual streams to the input of a sublayer.

#include "hyper_collapse.cuh"
#include "hyper_few.cuh"

namespace dsv4 {
namespace {

constexpr int kAnyThreads = 256;

// One block a token. M mixes: 24 for hc_pre, 4 for hc_head, which has no post and comb.
template <class T, int M>
__global__ void __launch_bounds__(kAnyThreads)
    collapse_any_kernel(const T* x, int64_t d, const float* fn, HyperParameters p, T* u,
                        float* post, float* comb) {
    __shared__ float partial[kAnyThreads / 32][M + 1];
    __shared__ float mix[M + 1];
    __shared__ float pre[kStreams];
    let_next_start();
    wait_for_previous();
    int64_t token = blockIdx.x, width = kStreams * d;
    x += token * width;
    float sum[M + 1] = {};  // the last is the sum of squares
    for (int64_t i = threadIdx.x; i < width; i += kAnyThreads) {
        float value = to_float(x[i]);
#pragma unroll
        for (int m = 0; m < M; m++) sum[m] += value * fn[m * width + i];
        sum[M] += value * value;
    }
#pragma unroll
    for (int m = 0; m <= M; m++) {
        float total = warp_sum(sum[m]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][m] = total;
    }
    __syncthreads();
    if (threadIdx.x <= M) {
        float total = 0;
        for (int warp = 0; warp < kAnyThreads / 32; warp++) total += partial[warp][threadIdx.x];
        mix[threadIdx.x] = total;
    }
    __syncthreads();
    float rho = 1 / sqrtf(mix[M] / (float)width + p.norm_eps);
    if (threadIdx.x < kStreams) {
        int i = threadIdx.x;
        pre[i] = sigmoid(mix[i] * rho * p.scale[0] + p.base[i]) + p.eps;
        if (M == kMixes) {
            int k = kStreams + i;
            post[token * kStreams + i] = 2 * sigmoid(mix[k % M] * rho * p.scale[1] + p.base[k]);
        }
    }
    __syncthreads();
    if (M == kMixes && threadIdx.x == kAnyThreads - 1) {
        float c[kStreams][kStreams];
#pragma unroll
        for (int i = 0; i < kCombs; i++) {
            int k = 2 * kStreams + i;
            c[i / kStreams][i % kStreams] = mix[k % M] * rho * p.scale[2] + p.base[k];
        }
        sinkhorn(c, p.iters, p.eps);
#pragma unroll
        for (int i = 0; i < kCombs; i++) comb[token * kCombs + i] = c[i / kStreams][i % kStreams];
    }
    for (int64_t i = threadIdx.x; i < d; i += kAnyThreads) {
        float value = 0;
        for (int k = 0; k < kStreams; k++) value += pre[k] * to_float(x[k * d + i]);
        u[token * d + i] = from_float<T>(value);
    }
}

template <int M>
int collapse_any(const void* x, int dtype, int64_t n, int64_t d, const float* fn,
                 HyperParameters p, void* u, float* post, float* comb, void* stream) {
    return with_dtype(dtype, [&](auto tag) {
        using T = type_of<decltype(tag)>;
        return launch(collapse_any_kernel<T, M>, dim3(n), kAnyThreads, 0, stream, (const T*)x, d, fn,
                      p, (T*)u, post, comb);
    });
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [n, 4, d] -> u [n, d] of the same dtype, post [n, 4], comb [n, 4, 4]; fn [24, 4 * d].
DSV4_EXPORT int dsv4_hc_pre(const void* x, int dtype, int64_t n, int64_t d, const float* fn,
                            const float* scale, const float* base, int64_t iters, float eps,
                            float norm_eps, void* u, float* post, float* comb, void* stream) {
    if (n == 0) return cudaSuccess;
    HyperParameters p = {scale, base, (int)iters, eps, norm_eps};
    Streams in = {.n = (int)n, .fn = fn, .p = p, .u = (bf16*)u, .post = post, .comb = comb};
    int status = kUnsupported;
    if (dtype == DSV4_BF16 && d == 4096) status = collapse<Collapse<16, 4, 2, 3, 5>>(x, nullptr, in, stream);
    if (dtype == DSV4_BF16 && d == 7168) status = collapse<Collapse<8, 7, 2, 3, 6>>(x, nullptr, in, stream);
    if (status != kUnsupported) return status;
    return collapse_any<kMixes>(x, dtype, n, d, fn, p, u, post, comb, stream);
}

// hc_post, then hc_pre of its result, in one kernel: y [n, d], x [n, 4, d] of bfloat16, post and comb as
// hc_pre made them for x -> new_x [n, 4, d], u, new_post, new_comb; and, where `normed` is not null,
// u's RMS norm with weight norm_weight [d]. Only d 4096, and 64 tokens to be normed.
DSV4_EXPORT int dsv4_hc_post_pre(const void* y, const void* x, const float* post, const float* comb,
                                 int64_t n, int64_t d, const float* fn, const float* scale,
                                 const float* base, int64_t iters, float eps, float norm_eps,
                                 void* new_x, void* u, float* new_post, float* new_comb,
                                 const void* weight, int weight_dtype, float weight_eps, void* normed,
                                 void* stream) {
    if (n == 0) return cudaSuccess;
    HyperParameters p = {scale, base, (int)iters, eps, norm_eps};
    Streams in = {.n = (int)n, .fn = fn, .p = p, .u = (bf16*)u, .post = new_post, .comb = new_comb};
    in.sublayer.post = post, in.sublayer.comb = comb, in.sublayer.x = (bf16*)new_x;
    in.norm = {weight, weight_dtype, weight_eps, (bf16*)normed};
    return d == 4096 ? collapse<Collapse<16, 4, 2, 3, 4, true>>(x, y, in, stream) : kUnsupported;
}

// hc_post, hc_pre and the norm of hc_post_pre for up to 8 tokens of d 4096, by two kernels, but for post and comb:
// those follow from sums [n, 64, 32], see dsv4_hc_gates. If routed and shared [n, d] float32 are not null, y
// becomes their sum first.
DSV4_EXPORT int dsv4_hc_few(void* y, const float* routed, const float* shared, const void* x,
                            const float* post, const float* comb, int64_t n, const float* fn,
                            const float* scale, const float* base, float eps, float norm_eps,
                            void* new_x, void* u, const void* weight, int weight_dtype,
                            float weight_eps, void* normed, float* sums, void* stream) {
    if (n > kFewTokens) return kUnsupported;
    if (n == 0) return cudaSuccess;
    const FewStreams in = {(bf16*)y, routed, shared, (const bf16*)x, post, comb, (bf16*)new_x, (int)n, fn,
                           {scale, base, 0, eps, norm_eps}, sums, (bf16*)u,
                           weight, weight_dtype, weight_eps, (bf16*)normed};
    return collapse_few(in, stream);
}

// post [n, 4] and comb [n, 4, 4] of the sums that dsv4_hc_few has left.
DSV4_EXPORT int dsv4_hc_gates(const float* sums, int64_t n, const float* scale, const float* base,
                              int64_t iters, float eps, float norm_eps, float* post, float* comb,
                              void* stream) {
    const HyperParameters p = {scale, base, (int)iters, eps, norm_eps};
    return launch(gates_kernel, dim3(n), 32, 0, stream, sums, p, post, comb);
}

// x [n, 4, d] -> h [n, d] of the same dtype; fn [4, 4 * d].
DSV4_EXPORT int dsv4_hc_head(const void* x, int dtype, int64_t n, int64_t d, const float* fn,
                             const float* scale, const float* base, float eps, float norm_eps,
                             void* h, void* stream) {
    if (n == 0) return cudaSuccess;
    HyperParameters p = {scale, base, 0, eps, norm_eps};
    Streams in = {.n = (int)n, .fn = fn, .p = p, .u = (bf16*)h};
    int status = kUnsupported;
    if (dtype == DSV4_BF16 && d == 4096) status = collapse<Collapse<16, 4, 4, 1, 5>>(x, nullptr, in, stream);
    if (dtype == DSV4_BF16 && d == 7168) status = collapse<Collapse<8, 7, 4, 1, 6>>(x, nullptr, in, stream);
    if (status != kUnsupported) return status;
    return collapse_any<kStreams>(x, dtype, n, d, fn, p, h, nullptr, nullptr, stream);
}

