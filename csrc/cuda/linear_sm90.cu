// Ops linear and grouped_linear.
//
// bf16 activations use the matrix unit: one row, and where it pays up to eight, with rings of weights
// (few_rows.cuh), up to 16 with loads to registers (stream.cuh), more in tiles (tile.cuh). float32 activations,
// float32 and float16 weights and odd sizes go through float32 multiply-adds, one weight row a warp.

#include "elements.cuh"
#include "few_rows.cuh"
#include "tile.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;

// ---------------------------------------------------------------- on the matrix unit

// Adds up what the warps, and the blocks of a cluster, left in `sums` [warp][row][token], and writes
// it times `factor`. All threads of the block.
template <class Y, int kColumns>
__device__ void write_sums(const Product& p, const float (&sums)[kWarps][16][kColumns], int split,
                           int64_t token0, float factor) {
    int tiles = kWarps / split, clusters = gridDim.z, tokens = kColumns - 1;
    if (clusters > 1) cluster_barrier();
    else __syncthreads();
    for (int i = threadIdx.x; blockIdx.z == 0 && i < tiles * 16 * tokens; i += kWarps * 32) {
        int row = i % 16, token = i / 16 % tokens, tile = i / (16 * tokens);
        int64_t n = (blockIdx.x * (int64_t)tiles + tile) * 16 + row;
        if (n >= p.w.n || token0 + token >= p.m) continue;
        float total = 0;
        for (int c = 0; c < clusters; c++)
            for (int s = 0; s < split; s++) {
                const float* at = &sums[tile * split + s][row][token];
                total += clusters == 1 ? *at : load_from_block(at, c);
            }
        total *= factor;
        ((Y*)p.y)[(token0 + token) * p.y_stride + n] = from_float<Y>(total * p.w.global_scale);
    }
    if (clusters > 1) cluster_barrier();  // the sums are read before their block ends
}

// What a warp of a block has to do: 16 rows from row0 on, steps [first, last).
struct Part {
    int64_t row0;
    int first, last, block_first, block_last;  // and the steps of all warps of its block
    __device__ Part(const Product& p, int split, int steps) {
        int warp = threadIdx.x / 32, parts = split * gridDim.z, share = (steps + parts - 1) / parts;
        row0 = (blockIdx.x * (int64_t)(kWarps / split) + warp / split) * 16;
        block_first = min(blockIdx.z * split * share, steps);
        block_last = min(block_first + split * share, steps);
        first = min(block_first + warp % split * share, steps);
        last = row0 >= p.w.n ? first : min(first + share, steps);
    }
};

// A block holds kWarps / split tiles of 16 weight rows; `split` warps share a tile's columns, and so
// do the blocks of a cluster, whose first one adds up the sums.
template <class Policy, int NT, class Y>
__global__ void __launch_bounds__(kWarps * 32, 2) skinny_kernel(const Product p, int split) {
    constexpr int kTokens = 8 * NT;
    __shared__ float sums[kWarps][16][kTokens + 1];
    let_next_start();
    int64_t token0 = blockIdx.y * (int64_t)kTokens;
    Part part(p, split, steps_of<Policy>(p.w.k));
    Stream<Policy, NT> stream(p.w, part.row0, part.first, part.last);
    wait_for_previous();

    const bf16* x[NT];
#pragma unroll
    for (int t = 0; t < NT; t++) {
        int64_t token = token0 + 8 * t + stream.lane.group;
        int64_t group = part.row0 / p.per_group;
        x[t] = token < p.m ? (const bf16*)p.x + token * p.x_stride + group * p.w.k : nullptr;
    }
    float sum[NT][4] = {};
    stream.run(x, part.first, sum);
    auto& mine = sums[threadIdx.x / 32];
    const Lane& lane = stream.lane;
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            mine[lane.group + i / 2 * 8][8 * t + 2 * lane.member + i % 2] = sum[t][i];
    write_sums<Y>(p, sums, split, token0, Policy::kFactor);
}

// Warps that share a tile, at most kWarps in a block and then up to kMostBlocks blocks: enough that a
// warp has few steps and that small matrices fill the GPU.
constexpr int kEnoughWarps = 2048;  // of 132 multiprocessors' 2112
struct Split {
    int warps = 1, blocks = 1;
    Split(int64_t tiles, int steps) {
        while (warps < kWarps && steps > warps && (steps > 8 * warps || tiles * warps < kEnoughWarps))
            warps *= 2;
        while (blocks < kMostBlocks && steps > 2 * warps * blocks &&
               tiles * warps * blocks <= kEnoughWarps / 2)
            blocks *= 2;
    }
};

template <class Policy, int NT, class Y> int skinny(const Product& p, void* stream) {
    Split split(ceil_div(p.w.n, 16), steps_of<Policy>(p.w.k));
    dim3 grid(ceil_div(p.w.n, 16 * kWarps / split.warps), ceil_div(p.m, 8 * NT), split.blocks);
    return launch_clusters(split.blocks, skinny_kernel<Policy, NT, Y>, grid, kWarps * 32, 0, stream,
                           p, split.warps);
}

template <class Policy, class Y> int up_to_16_rows(const Product& p, void* stream) {
    const int status = few_rows<Policy, Y>(p, stream);
    if (status != kUnsupported) return status;
    return p.m <= 8 ? skinny<Policy, 1, Y>(p, stream) : skinny<Policy, 2, Y>(p, stream);
}

// ---------------------------------------------------------------- many rows

// One tile a block; the blocks of a cluster share its columns, and each adds up a part of the rows.
template <class Policy, class Y>
__global__ void __launch_bounds__(kTileThreads, 2) tile_kernel(const Product p) {
    using Rows = Tile<Policy>;
    extern __shared__ __align__(16) char memory[];
    auto& shared = *reinterpret_cast<typename Rows::Shared*>(memory);
    let_next_start();
    int64_t row0 = blockIdx.x * (int64_t)kTileRows, token0 = blockIdx.y * (int64_t)kTileTokens;
    Rows tile(shared, [&](int t, int64_t& row) {
        row = row0 + 16 * t;
        return &p.w;
    });
    wait_for_previous();
    if (threadIdx.x < kTileTokens) {
        int64_t token = token0 + threadIdx.x;
        const bf16* x = (const bf16*)p.x + token * p.x_stride + row0 / p.per_group * p.w.k;
        shared.rows[threadIdx.x] = token < p.m ? x : nullptr;
    }
    int steps = steps_of<Policy>(p.w.k), blocks = gridDim.z;
    int share = (steps + blocks - 1) / blocks, first = blockIdx.z * share;
    tile.run(first, min(first + share, steps));
    tile.keep_sums();
    if (blocks > 1) cluster_barrier();
    else __syncthreads();
    int rows = kTileRows / blocks, skipped = blockIdx.z * rows;
    for (int i = threadIdx.x; i < rows * kTileTokens; i += kTileThreads) {
        int row = skipped + i % rows, token = i / rows;
        if (row0 + row >= p.w.n || token0 + token >= p.m) continue;
        float total = 0;
        for (int b = 0; b < blocks; b++) total += load_from_block(&shared.sums[token][row], b);
        total *= Policy::kFactor;
        ((Y*)p.y)[(token0 + token) * p.y_stride + row0 + row] =
            from_float<Y>(total * p.w.global_scale);
    }
    if (blocks > 1) cluster_barrier();  // the sums are read before their block ends
}

template <class Policy, class Y> int tiles(const Product& p, void* stream) {
    constexpr size_t kShared = sizeof(typename Tile<Policy>::Shared);
    auto kernel = tile_kernel<Policy, Y>;
    int status = allow_shared(kernel, kShared), blocks = 1;
    if (status != cudaSuccess) return status;
    int64_t count = ceil_div(p.w.n, kTileRows) * ceil_div(p.m, kTileTokens);
    int steps = steps_of<Policy>(p.w.k);
    while (blocks < kMostBlocks && count * blocks <= kProcessors && steps >= 4 * blocks) blocks *= 2;
    dim3 grid(ceil_div(p.w.n, kTileRows), ceil_div(p.m, kTileTokens), blocks);
    return launch_clusters(blocks, kernel, grid, kTileThreads, kShared, stream, p);
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
    if (m == 0 || w->n == 0) return cudaSuccess;
    Product p = {*w, x, y, m, groups * w->k, w->n, w->n / groups};
    return with_dtype(y_dtype, [&](auto y_tag) {
        using Y = type_of<decltype(y_tag)>;
        bool whole_tiles = groups == 1 || p.per_group % 16 == 0;
        int status = kUnsupported;
        if (x_dtype == DSV4_BF16 && whole_tiles && (uintptr_t)x % 16 == 0)
            status = with_policy(w->format, w->k, [&](auto policy) {
                using Policy = decltype(policy);
                bool tiles_span_groups = groups > 1 && p.per_group % kTileRows;
                bool few = m <= 16 || (m <= 64 && w->n <= 2048);  // too few tiles to fill the GPU
                if (few || tiles_span_groups) return up_to_16_rows<Policy, Y>(p, stream);
                return tiles<Policy, Y>(p, stream);
            });
        if (status != kUnsupported) return status;
        return with_dtype(x_dtype, [&](auto x_tag) {
            return plain<type_of<decltype(x_tag)>, Y>(p, stream);
        });
    });
}
