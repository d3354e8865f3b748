// Several products of the same one to eight activation rows in one launch: op linear for weights of one input.
//
// A block multiplies rows of one matrix as linear does (few_rows.cuh). Together the matrices have about one
// block a multiprocessor, all with nearly as many bytes to read.

#include "dispatch.cuh"
#include "few_rows.cuh"

namespace dsv4 {
namespace {

constexpr int kMost = 8;  // matrices a launch
template <class Policy, int kRows> using Shape = std::conditional_t<kRows == 1, OneRow<Policy>, SomeRows<Policy>>;
constexpr int kWarps = OneRow<Bf16>::kWarps;

struct Products {
    const bf16* x;  // [m, k]
    int64_t m, k;
    int count, split;
    dsv4_weight w[kMost];
    void* y[kMost];     // [m, w.n]
    int y_dtype[kMost];  // enum dsv4_dtype
    int rows[kMost];     // of a block
    int end[kMost];      // of the matrix' blocks
};

// ---------------------------------------------------------------- how rows are divided

bool takes(const dsv4_weight& w, int64_t k) {
    return w.n > 0 && w.k == k && k % 16 == 0 &&
           (w.format == DSV4_DENSE_BF16 || w.format == DSV4_FP8_E8M0 || w.format == DSV4_FP8_F32);
}

// Tiles of a block that has `rows` rows, in turn at its places.
template <class Policy, int kRows>
__host__ __device__ FewBlock<Shape<Policy, kRows>> block_of(const Products& p, int rows, int split) {
    const int places = kWarps / split, tiles = (rows + 15) / 16;
    return FewBlock<Shape<Policy, kRows>>(split, (tiles + places - 1) / places, p.k, (int)p.m);
}

// Rows of a block, for up to kRows activation rows. A tile of FP8 lies in one block of scales, so that these
// are whole tiles.
template <int kRows> struct Division {
    int split, rows[kMost], end[kMost];
    double cost;    // of the longest block, in stages of a warp
    size_t shared;  // of the largest

    // Blocks of no more bytes than `share` rows of FP8 have, as far as they can be so small.
    Division(const Products& p, int split, int64_t share) : split(split), cost(0), shared(0) {
        const int64_t most = most_rows(split);
        int blocks = 0;
        for (int i = 0; i < p.count; i++) {
            const bool dense = p.w[i].format == DSV4_DENSE_BF16;
            const int unit = dense ? 1 : 16;
            const int64_t allowed = (dense ? share / 2 : share) / unit * unit;
            const int64_t some = allowed < unit ? unit : allowed < most ? allowed : most;
            const int64_t count = ceil_div(p.w[i].n, some);
            rows[i] = (int)ceil_div(ceil_div(p.w[i].n, count), unit) * unit;
            end[i] = blocks += (int)ceil_div(p.w[i].n, rows[i]);
            with_policy(p.w[i].format, p.k, [&](auto policy) {
                const auto block = block_of<decltype(policy), kRows>(p, rows[i], split);
                if (block.cost() > cost) cost = block.cost();
                if (block.bytes() > shared) shared = block.bytes();
                return 0;
            });
        }
        cost *= ceil_div(blocks, (int64_t)kProcessors);
        if (shared > kFewShared) cost = 1e30;
    }
    static int64_t most_rows(int split) { return Shape<Bf16, kRows>::kMostRounds * kWarps / split * 16; }
    int blocks(const Products& p) const { return end[p.count - 1]; }

    // The smallest blocks of which there is one a multiprocessor, else the largest.
    static Division fair(const Products& p, int split) {
        int64_t low = 1, high = 2 * most_rows(split);
        while (low < high) {
            const int64_t share = (low + high) / 2;
            if (Division(p, split, share).blocks(p) > kProcessors) low = share + 1;
            else high = share;
        }
        return Division(p, split, low);
    }
    static Division best(const Products& p) {
        Division best = fair(p, kWarps);
        for (int split = kWarps / 2; split >= 1; split /= 2) {
            const Division other = fair(p, split);
            if (other.cost < best.cost) best = other;
        }
        return best;
    }
};

// ---------------------------------------------------------------- kernel

template <int kRows>
__global__ void __launch_bounds__(Shape<Bf16, kRows>::kThreads, 2) linears_kernel(const Products p) {
    extern __shared__ __align__(16) char memory[];
    let_next_start();
    prefetch_share(p.x, p.m * p.k * sizeof(bf16));
    const int b = blockIdx.x;
    int i = 0;
    while (i < p.count && b >= p.end[i]) i++;
    if (i == p.count) return wait_for_previous();  // else two of the next kernel's blocks meet here
    const int64_t row0 = (b - (i > 0 ? p.end[i - 1] : 0)) * (int64_t)p.rows[i], pitch = p.w[i].n;
    dsv4_weight part = p.w[i];
    if (part.n > row0 + p.rows[i]) part.n = row0 + p.rows[i];
    void* y = p.y[i];
    const bool wide = p.y_dtype[i] == DSV4_F32;
    auto store = [=](int row, int64_t n, float value) {
        if (wide) ((float*)y)[row * pitch + n] = value;
        else ((bf16*)y)[row * pitch + n] = from_float<bf16>(value);
    };
    auto multiply = [&](auto policy) {
        const auto block = block_of<decltype(policy), kRows>(p, p.rows[i], p.split);
        multiply_few(part, row0, block, p.x, p.k, memory, store);
    };
    if (part.format == DSV4_DENSE_BF16) multiply(Bf16{});
    else if (part.format == DSV4_FP8_E8M0) multiply(Fp8<uint8_t>{});
    else multiply(Fp8<float>{});
}

template <int kRows> int launch_linears(Products p, void* stream) {
    const auto division = Division<kRows>::best(p);
    if (division.shared > kFewShared) return kUnsupported;
    p.split = division.split;
    for (int i = 0; i < p.count; i++) p.rows[i] = division.rows[i], p.end[i] = division.end[i];
    const int blocks = division.blocks(p);
    const size_t shared = Shape<Bf16, kRows>::shared(division.shared, blocks);
    const int status = allow_shared(linears_kernel<kRows>, shared);
    if (status != cudaSuccess) return status;
    // One block a multiprocessor, even if it has no row: else some get two of the next kernel's.
    return launch(linears_kernel<kRows>, dim3(blocks < kProcessors ? kProcessors : blocks),
                  Shape<Bf16, kRows>::kThreads, shared, stream, p);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y[i] [m, w[i]->n] in y_dtype[i] = x [m, k] bfloat16 times w[i]: up to eight rows; bf16 or FP8, k a multiple
// of 16, all at multiples of 16 bytes.
DSV4_EXPORT int dsv4_linears(const void* x, int64_t m, int64_t k, int64_t count, const dsv4_weight* const* w,
                             void* const* y, const int* y_dtype, void* stream) {
    if (count < 1 || count > kMost || m < 1 || m > kMostColumns) return kUnsupported;
    Products p = {(const bf16*)x, m, k, (int)count};
    for (int i = 0; i < count; i++) {
        if (!takes(*w[i], k)) return kUnsupported;
        p.w[i] = *w[i];
        p.y[i] = y[i];
        p.y_dtype[i] = y_dtype[i];
    }
    return m == 1 ? launch_linears<1>(p, stream) : launch_linears<kMostColumns>(p, stream);
}
