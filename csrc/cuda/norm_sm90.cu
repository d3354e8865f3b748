// Ops rms_norm (weighted, and unweighted for each head) and rope (forward and inverse).

#include "dispatch.cuh"
#include "rope.cuh"

namespace dsv4 {
namespace {

// ---------------------------------------------------------------- rms_norm

constexpr int kHeld = 4;  // vectors of a thread that stay in registers; the others are read twice

// The sum of all that a block's threads have: first over the warps, then warp after warp of sum[0], of sum[1]
// and so on, of which `used` are: of bfloat16 in the order of columns, 256 at a time, as hyper_roles.cuh adds.
template <int Threads>
__device__ float sum_in_order(const float (&sum)[kHeld], int used, float (*partial)[Threads / 32]) {
#pragma unroll
    for (int h = 0; h < kHeld; h++) {
        if (h >= used) break;
        const float all = warp_sum(sum[h]);
        if (threadIdx.x % 32 == 0) partial[h][threadIdx.x / 32] = all;
    }
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int h = 0; h < kHeld; h++) {
        if (h >= used) break;
#pragma unroll
        for (int warp = 0; warp < Threads / 32; warp++) total += partial[h][warp];
    }
    return total;
}

// y = x * rsqrt(mean(x^2) + eps) * weight for one row of d; one block a row. kVector says that d is whole
// vectors.
template <class T, class W, int Threads, bool kVector>
__global__ void __launch_bounds__(Threads)
    rms_norm_kernel(const T* x, int d, const W* weight, float eps, T* y) {
    constexpr int V = kVector ? Vector<T>::kSize : 1, kEarly = 2, kStride = Threads * V;
    __shared__ float partial[kHeld][Threads / 32];
    const int first = threadIdx.x * V;
    let_next_start();
    wait_for_previous();
    Vector<W, V> gain[kEarly];  // on its way while the sum is computed
#pragma unroll
    for (int h = 0; h < kEarly; h++)
        if (weight && first + h * kStride < d)
            gain[h] = load_vector<W, V>(weight + first + h * kStride);
    x += blockIdx.x * (int64_t)d;
    y += blockIdx.x * (int64_t)d;
    Vector<T, V> held[kHeld];
    float sum[kHeld] = {};  // of each held vector; the last also of all behind it
    auto add = [](const Vector<T, V>& v, float& to) {
#pragma unroll
        for (int j = 0; j < V; j++) to += to_float(v.at[j]) * to_float(v.at[j]);
    };
#pragma unroll
    for (int h = 0; h < kHeld; h++)
        if (first + h * kStride < d) held[h] = load_vector<T, V>(x + first + h * kStride);
#pragma unroll
    for (int h = 0; h < kHeld; h++)
        if (first + h * kStride < d) add(held[h], sum[h]);
    for (int i = first + kHeld * kStride; i < d; i += kStride)
        add(load_vector<T, V>(x + i), sum[kHeld - 1]);
    const int used = min((d + kStride - 1) / kStride, kHeld);
    float factor = 1 / sqrtf(sum_in_order<Threads>(sum, used, partial) / (float)d + eps);
    auto scale = [&](Vector<T, V> v, Vector<W, V> by, int i) {
#pragma unroll
        for (int j = 0; j < V; j++) {
            float value = to_float(v.at[j]) * factor;
            v.at[j] = from_float<T>(weight ? value * to_float(by.at[j]) : value);
        }
        store_vector(y + i, v);
    };
    auto late = [&](int i) { return weight ? load_vector<W, V>(weight + i) : Vector<W, V>{}; };
#pragma unroll
    for (int h = 0; h < kHeld; h++) {
        int i = first + h * kStride;
        if (i < d) scale(held[h], h < kEarly ? gain[h % kEarly] : late(i), i);
    }
    for (int i = first + kHeld * kStride; i < d; i += kStride)
        scale(load_vector<T, V>(x + i), late(i), i);
}

template <class T, class W, int Threads>
int rms_norm(const T* x, int64_t rows, int64_t d, const W* weight, float eps, T* y, void* stream) {
    auto kernel = d % Vector<T>::kSize == 0 ? rms_norm_kernel<T, W, Threads, true>
                                            : rms_norm_kernel<T, W, Threads, false>;
    return launch(kernel, dim3(rows), Threads, 0, stream, x, (int)d, weight, eps, y);
}

// ---------------------------------------------------------------- rope

constexpr int kRopeThreads = 128;
constexpr int kMostPairs = 256;  // rotated pairs of a head

// One block rotates heads [y * per_block, ...) of token x. Vectors: d and the rotated part are whole
// 16-byte vectors; else one element at a time.
template <class T, bool Vectors>
__global__ void __launch_bounds__(kRopeThreads)
    rope_kernel(const T* x, const int64_t* positions, int64_t heads, int64_t per_block, int64_t d,
                const float* freqs, int64_t half, bool inverse, T* y) {
    constexpr int V = Vectors ? Vector<T>::kSize : 1;
    __shared__ float2 cos_sin[kMostPairs];
    int64_t first = blockIdx.y * per_block, plain = d - 2 * half;
    int64_t count = (first + per_block < heads ? per_block : heads - first) * d;
    int64_t base = (blockIdx.x * heads + first) * d;
    let_next_start();
    wait_for_previous();
    float freq = threadIdx.x < half ? freqs[threadIdx.x] : 0;
    int64_t position = positions[blockIdx.x];
    Vector<T> early;  // on its way while the angles are computed
    if (Vectors && threadIdx.x * V < count) early = load_vector(x + base + threadIdx.x * V);
    for (int i = threadIdx.x; i < half; i += kRopeThreads)
        cos_sin[i] = turn(position, i == threadIdx.x ? freq : freqs[i], inverse);
    __syncthreads();
    for (int64_t i = threadIdx.x * V; i < count; i += kRopeThreads * V) {
        int64_t at = i % d - plain;  // in the rotated part if >= 0
        if (Vectors) {
            Vector<T> v = i == threadIdx.x * V ? early : load_vector(x + base + i);
            if (at >= 0) {
#pragma unroll
                for (int j = 0; j < V; j += 2) {
                    float even = to_float(v.at[j]), odd = to_float(v.at[j + 1]);
                    float2 cs = cos_sin[(at + j) / 2];
                    v.at[j] = from_float<T>(even * cs.x - odd * cs.y);
                    v.at[j + 1] = from_float<T>(even * cs.y + odd * cs.x);
                }
            }
            store_vector(y + base + i, v);
        } else if (at < 0) {
            y[base + i] = x[base + i];
        } else {
            float2 cs = cos_sin[at / 2];
            float mine = to_float(x[base + i]), other = to_float(x[base + (at % 2 ? i - 1 : i + 1)]);
            y[base + i] = from_float<T>(mine * cs.x + (at % 2 ? other : -other) * cs.y);
        }
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [rows, d] -> y [rows, d] of the same dtype; weight [d] or null.
DSV4_EXPORT int dsv4_rms_norm(const void* x, int dtype, int64_t rows, int64_t d, const void* weight,
                              int weight_dtype, float eps, void* y, void* stream) {
    return with_dtype(dtype, [&](auto tag) {
        return with_dtype(weight_dtype, [&](auto weight_tag) {
            using T = type_of<decltype(tag)>;
            using W = type_of<decltype(weight_tag)>;
            if (d <= 512)
                return rms_norm<T, W, 64>((const T*)x, rows, d, (const W*)weight, eps, (T*)y,
                                          stream);
            return rms_norm<T, W, 256>((const T*)x, rows, d, (const W*)weight, eps, (T*)y, stream);
        });
    });
}

// x [n, heads, d] -> y: the pairs of the last 2 * half dims rotated by positions[n] * freqs[half].
DSV4_EXPORT int dsv4_rope(const void* x, int dtype, const int64_t* positions, int64_t n,
                          int64_t heads, int64_t d, const float* freqs, int64_t half, int inverse,
                          void* y, void* stream) {
    if (half > kMostPairs) return kUnsupported;
    return with_dtype(dtype, [&](auto tag) {
        using T = type_of<decltype(tag)>;
        constexpr int V = Vector<T>::kSize;
        bool vectors = d % V == 0 && 2 * half % V == 0;
        int64_t per_block = vectors && d < 2 * V * kRopeThreads ? 2 * V * kRopeThreads / d : 1;
        auto kernel = vectors ? rope_kernel<T, true> : rope_kernel<T, false>;
        return launch(kernel, dim3(n, ceil_div(heads, per_block)), kRopeThreads, 0, stream,
                      (const T*)x, positions, heads, per_block, d, freqs, half, (bool)inverse,
                      (T*)y);
    });
}
