// Ops linear and grouped_linear for few activation rows: one stream over the weight.
//
// bf16 activations use the matrix unit (stream.cuh). float32 activations, float32 and float16
// weights and odd sizes go through float32 multiply-adds, one weight row a warp.

#include "elements.cuh"
#include "stream.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;

// y [m, n] = x [m, groups * k] W^T, both with a row stride; output rows of group g see columns
// [g * k, (g + 1) * k) of x.
struct Product {
    dsv4_weight w;
    const void* x;
    void* y;
    int64_t m, x_stride, y_stride, per_group;  // per_group: output rows of a group
};

// ---------------------------------------------------------------- on the matrix unit

// A block holds kWarps / split tiles of 16 weight rows; `split` warps share a tile's columns.
template <class Policy, int NT, class Y>
__global__ void __launch_bounds__(kWarps * 32, 2) skinny_kernel(const Product p, int split) {
    constexpr int kTokens = 8 * NT;
    __shared__ float sums[kWarps][16][kTokens + 1];
    let_next_start();
    int warp = threadIdx.x / 32, tiles = kWarps / split;
    int64_t row0 = (blockIdx.x * (int64_t)tiles + warp / split) * 16;
    int64_t token0 = blockIdx.y * (int64_t)kTokens;
    int steps = Stream<Policy, NT>::steps(p.w.k), share = (steps + split - 1) / split;
    int first = warp % split * share;
    int last = row0 >= p.w.n ? 0 : first + share < steps ? first + share : steps;
    Stream<Policy, NT> stream(p.w, row0, first, last);
    wait_for_previous();

    const bf16* x[NT];
#pragma unroll
    for (int t = 0; t < NT; t++) {
        int64_t token = token0 + 8 * t + stream.lane.group;
        int64_t group = row0 / p.per_group;
        x[t] = token < p.m ? (const bf16*)p.x + token * p.x_stride + group * p.w.k : nullptr;
    }
    float sum[NT][4] = {};
    stream.run(x, first, sum);
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[warp][stream.lane.group + i / 2 * 8][8 * t + 2 * stream.lane.member + i % 2] =
                sum[t][i];
    __syncthreads();

    for (int i = threadIdx.x; i < tiles * 16 * kTokens; i += kWarps * 32) {
        int row = i % 16, token = i / 16 % kTokens, tile = i / (16 * kTokens);
        int64_t n = (blockIdx.x * (int64_t)tiles + tile) * 16 + row;
        if (n >= p.w.n || token0 + token >= p.m) continue;
        float total = 0;
        for (int s = 0; s < split; s++) total += sums[tile * split + s][row][token];
        total *= Policy::kFactor;
        ((Y*)p.y)[(token0 + token) * p.y_stride + n] = from_float<Y>(total * p.w.global_scale);
    }
}

// Warps to a tile: enough that a warp has at most eight steps, and that small matrices fill the GPU.
inline int warps_per_tile(int64_t n, int steps) {
    int split = 1;
    while (split < kWarps && (steps > 8 * split || (n * split < 16 * 2048 && steps > split)))
        split *= 2;
    return split;
}

template <class Policy, int NT, class Y> int skinny(const Product& p, void* stream) {
    int split = warps_per_tile(p.w.n, Stream<Policy, NT>::steps(p.w.k));
    dim3 grid(ceil_div(p.w.n, 16 * kWarps / split), ceil_div(p.m, 8 * NT));
    return launch(skinny_kernel<Policy, NT, Y>, grid, kWarps * 32, 0, stream, p, split);
}

// ---------------------------------------------------------------- float32 multiply-adds

constexpr int kTokensAtOnce = 8;

// One warp multiplies one weight row with up to kTokensAtOnce activation rows.
template <class Reader, class X, class Y>
__global__ void __launch_bounds__(kWarps * 32) plain_kernel(const Product p) {
    let_next_start();
    wait_for_previous();
    int64_t n = blockIdx.x * (int64_t)kWarps + threadIdx.x / 32;
    if (n >= p.w.n) return;
    int64_t token0 = blockIdx.y * (int64_t)kTokensAtOnce;
    int64_t count = p.m - token0 < kTokensAtOnce ? p.m - token0 : kTokensAtOnce;
    const X* x = (const X*)p.x + token0 * p.x_stride + n / p.per_group * p.w.k;
    Reader reader(p.w, n);
    float sum[kTokensAtOnce] = {};
    for (int64_t at = threadIdx.x % 32 * Reader::kSize; at < p.w.k; at += 32 * Reader::kSize) {
        float weights[Reader::kSize];
        reader.read(at, weights);
#pragma unroll
        for (int t = 0; t < kTokensAtOnce; t++) {
            if (t >= count) continue;
#pragma unroll
            for (int j = 0; j < Reader::kSize; j++)
                sum[t] += weights[j] * to_float(x[t * p.x_stride + at + j]);
        }
    }
#pragma unroll
    for (int t = 0; t < kTokensAtOnce; t++) {
        if (t >= count) continue;
        float total = warp_sum(sum[t]) * p.w.global_scale;
        if (threadIdx.x % 32 == 0)
            ((Y*)p.y)[(token0 + t) * p.y_stride + n] = from_float<Y>(total);
    }
}

template <class X, class Y> int plain(const Product& p, void* stream) {
    return with_reader(p.w.format, p.w.k, [&](auto tag) {
        using Reader = type_of<decltype(tag)>;
        dim3 grid(ceil_div(p.w.n, kWarps), ceil_div(p.m, kTokensAtOnce));
        return launch(plain_kernel<Reader, X, Y>, grid, kWarps * 32, 0, stream, p);
    });
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [m, groups * k] in x_dtype, y [m, n] in y_dtype, both contiguous (float32 or bfloat16).
// groups = 1 is op linear, more is grouped_linear.
DSV4_EXPORT int dsv4_linear(const void* x, int x_dtype, int64_t m, const dsv4_weight* w,
                            int64_t groups, void* y, int y_dtype, void* stream) {
    Product p = {*w, x, y, m, groups * w->k, w->n, w->n / groups};
    return with_dtype(y_dtype, [&](auto y_tag) {
        using Y = type_of<decltype(y_tag)>;
        bool whole_tiles = groups == 1 || p.per_group % 16 == 0;
        int status = kUnsupported;
        if (x_dtype == DSV4_BF16 && whole_tiles && (uintptr_t)x % 16 == 0)
            status = with_policy(w->format, w->k, [&](auto policy) {
                using Policy = decltype(policy);
                return m <= 8 ? skinny<Policy, 1, Y>(p, stream) : skinny<Policy, 2, Y>(p, stream);
            });
        if (status != kUnsupported) return status;
        return with_dtype(x_dtype, [&](auto x_tag) {
            return plain<type_of<decltype(x_tag)>, Y>(p, stream);
        });
    });
}
