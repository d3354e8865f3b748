// linear for one to eight activation rows: the stream of weights from memory sets the pace.
//
// Every warp multiplies its tiles of 16 weight rows out of its own ring. `split` warps of a block share
// a tile's columns, every split-th stage each, and each holds its own columns of the activations in
// shared memory; the sums meet in the end. The rings begin to fill while the kernel before still runs.
#pragma once

#include "linear.cuh"
#include "stage_products.cuh"

namespace dsv4 {

constexpr size_t kFewShared = 226 * 1024;  // bytes, of all blocks on a multiprocessor

// How blocks are made for up to kRows activation rows. kStages: of a ring, half of them asked for before the
// activations.
template <class Format, int kRows, int kStages> struct FewShape {
    using Policy = Format;
    static constexpr bool kBlocks = kFourBits<Policy> && kRows == 1;  // second operands, see stage_products.cuh
    static constexpr int kWarps = 8, kThreads = kWarps * 32, kMostRounds = 8;
    static constexpr int kMost = kRows, kDepth = kStages, kEarly = kStages / 2;
    // Blocks that a multiprocessor has room for. With two, that of the next kernel fills its rings early.
    // With one, no two of a launch share a multiprocessor where a small kernel before takes another's place.
    static constexpr int kResident = kBlocks ? 2 : 1;

    // What each of `blocks` asks for that needs `bytes`. More blocks than multiprocessors fill all places.
    static size_t shared(size_t bytes, int64_t blocks) {
        constexpr size_t kMoreThanHalf = kFewShared / 2 + 1024;
        const bool alone = kResident == 1 && blocks <= kProcessors;
        return alone && bytes < kMoreThanHalf ? kMoreThanHalf : bytes;
    }
};

template <class Policy> using OneRow = FewShape<Policy, 1, 5>;
// Of bfloat16 and FP8, where no block waits for another's place.
template <class Policy> using OneRowDeep = FewShape<Policy, 1, 8>;
template <class Policy> using SomeRows = FewShape<Policy, kMostColumns, 4>;

// ---------------------------------------------------------------- how the work is divided

// What a block does: `rounds` tiles of a matrix at each of its kWarps / split places. A warp goes over
// `own` of the `all` stages of their columns.
template <class Shape> struct FewBlock : Shape {
    using typename Shape::Policy;
    using Shape::kWarps, Shape::kDepth;
    int split, rounds, all, own, rows;  // rows: of activations

    __host__ __device__ FewBlock(int split, int rounds, int64_t k, int rows)
        : split(split), rounds(rounds),
          all(((int)(k / Policy::kChunk) + kStageChunks - 1) / kStageChunks),
          own((all + split - 1) / split), rows(rows) {}
    __host__ __device__ int places() const { return kWarps / split; }
    __host__ __device__ int tiles() const { return places() * rounds; }
    __host__ __device__ int vectors() const { return own * Policy::kChunk; }  // of a warp's activation row
    __host__ __device__ size_t bytes() const {
        return kWarps * (kDepth * sizeof(Slot<Policy>) + (size_t)rows * vectors() * sizeof(uint4) +
                         (size_t)rounds * rows * 16 * sizeof(float));
    }
    // In stages of one warp.
    double cost() const {
        const bool scattered = split < kWarps && all > 8;  // 128 bytes here and there
        return rounds * (own + 0.25) * (scattered ? 1.5 : 1) + 0.1 * rows * own;  // the latter: activations
    }
};

// All blocks of a matrix.
template <class Shape> struct FewPlan : FewBlock<Shape> {
    using Base = FewBlock<Shape>;
    using Base::places, Base::rounds, Base::kWarps;
    int64_t blocks;

    // `tiles` of the matrix, `group` of them in a group; its rows have k columns.
    FewPlan(int64_t tiles, int64_t group, int64_t k, int rows, int split) : Base(split, 1, k, rows) {
        const int64_t needed = ceil_div(tiles, (int64_t)kProcessors * places());
        rounds = (int)(needed < Base::kMostRounds ? needed : Base::kMostRounds);
        while (rounds > 1 && group % this->tiles()) rounds--;
        blocks = ceil_div(tiles, (int64_t)this->tiles());
    }
    double cost() const {
        if (this->bytes() > kFewShared) return 1e30;
        const bool alone = Base::kResident == 2 && this->bytes() > kFewShared / 2 - 1024;
        return (double)ceil_div(blocks, (int64_t)kProcessors) * Base::cost() * (alone ? 1.5 : 1);
    }
    static FewPlan best(int64_t tiles, int64_t group, int64_t k, int rows) {
        FewPlan best(tiles, group, k, rows, kWarps);
        for (int split = kWarps / 2; split >= 1; split /= 2) {
            const FewPlan plan(tiles, group, k, rows, split);
            if (group % plan.places() == 0 && plan.cost() < best.cost()) best = plan;
        }
        return best;
    }
};

// ---------------------------------------------------------------- kernel

// Adds up what warps left, [tile][split][rows][16], and stores it. All threads of the block.
template <class Shape, class Store>
__device__ void store_few_sums(const dsv4_weight& w, int64_t row0, const FewBlock<Shape>& block,
                               const float* sums, Store store) {
    __syncthreads();
    const int rows = block.rows;
    for (int i = threadIdx.x; i < block.tiles() * rows * 16; i += blockDim.x) {
        const int tile = i / (rows * 16), row = i / 16 % rows;
        const int64_t n = row0 + tile * 16 + i % 16;
        if (n >= w.n) continue;
        float total = 0;
#pragma unroll
        for (int s = 0; s < block.kWarps; s++)
            if (s < block.split) total += sums[((tile * block.split + s) * rows + row) * 16 + i % 16];
        total *= product_factor<typename Shape::Policy, Shape::kBlocks>();
        store(row, n, total * w.global_scale);
    }
}

// One block: weight rows from row0 on, as many as its tiles have, times activation rows `stride` apart;
// store(activation row, weight row, product). `memory` has block.bytes().
template <class Shape, class Store>
__device__ void multiply_few(const dsv4_weight& w, int64_t row0, const FewBlock<Shape>& block,
                             const bf16* x, int64_t stride, char* memory, Store store) {
    using Policy = typename Shape::Policy;
    constexpr bool kBlocks = Shape::kBlocks;
    auto* slots = (Slot<Policy>*)memory;
    auto* vectors = (uint4*)(slots + Shape::kWarps * Shape::kDepth);
    auto* sums = (float*)(vectors + Shape::kWarps * block.rows * block.vectors());
    const int warp = threadIdx.x / 32, place = warp / block.split, s = warp % block.split;
    const int left = max((int)((w.n - row0 + 15) / 16) - place, 0);  // tiles: the last block's
    const Strip strip{row0 + place * 16, block.places() * 16,
                      min(block.rounds, (left + block.places() - 1) / block.places()), s, block.all,
                      block.split};
    slots += warp * Shape::kDepth;
    Ring<Policy, Shape::kDepth> ring(w, slots, strip);
#pragma unroll 1
    for (int i = 0; i < Shape::kEarly; i++) ring.fill();
    StageScales<Policy> scales(w, strip);
    wait_for_previous();

    // Loads queue up behind the copies of a block: those of the activations come before most of them.
    const int rows = row0 < w.n ? (Shape::kMost == 1 ? 1 : block.rows) : 0;
    OwnColumns<Policy, kBlocks> own_x{vectors + warp * block.rows * block.vectors(), rows, block.vectors()};
    own_x.copy(x, stride, (int)w.k, s, block.split);
#pragma unroll 1
    for (int i = Shape::kEarly; i < Shape::kDepth; i++) ring.fill();
    wait_for_copies<Shape::kDepth - Shape::kEarly>();
    own_x.template settle<Shape::kMost>();
    Columns<Policy, kBlocks> columns(own_x, 0, rows);
    const int own = strip.stages();
    for (int t = 0; t < strip.tiles; t++) {
        TileSums<Policy, kBlocks> tile;
        for (int i = 0; i < own; i++) {
            const Piece<Policy> piece(*(const Slot<Policy>*)((const char*)slots + ring.oldest()),
                                      tile.lane);
            __syncwarp();
            ring.fill();
            columns.load(i);
            const float scale = scales.of(i);
            tile.add(piece, columns, scale, scale);
        }
        tile.restore(own_x, 0, 1);
        tile.keep(sums + ((t * block.places() + place) * block.split + s) * block.rows * 16, block.rows);
        scales.next_tile();
    }
    store_few_sums(w, row0, block, sums, store);
}

// All tiles of a block are in one group.
template <class Shape, class Y>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    few_kernel(const Product p, const FewBlock<Shape> block) {
    extern __shared__ __align__(16) char memory[];
    let_next_start();
    prefetch_share(p.x, p.m * p.x_stride * sizeof(bf16));
    const int64_t row0 = blockIdx.x * (int64_t)block.tiles() * 16;
    const bf16* x = (const bf16*)p.x + row0 / p.per_group * p.w.k;
    multiply_few(p.w, row0, block, x, p.x_stride, memory, [&](int row, int64_t n, float value) {
        ((Y*)p.y)[row * p.y_stride + n] = from_float<Y>(value);
    });
}

// kUnsupported without room, or if there are more than `most` blocks.
template <class Shape, class Y> int few_rows_by(const Product& p, int64_t most, void* stream) {
    const int64_t group = p.per_group < p.w.n ? p.per_group / 16 : 0;
    const auto plan = FewPlan<Shape>::best(ceil_div(p.w.n, 16), group, p.w.k, (int)p.m);
    if (plan.bytes() > kFewShared || plan.blocks > most) return kUnsupported;
    auto kernel = few_kernel<Shape, Y>;
    const size_t shared = plan.shared(plan.bytes(), plan.blocks);
    const int status = allow_shared(kernel, shared);
    if (status != cudaSuccess) return status;
    // One block a multiprocessor, even if it has no tile: else some get two of the next kernel's.
    const int64_t blocks = plan.blocks < kProcessors ? kProcessors : plan.blocks;
    return launch(kernel, dim3(blocks), plan.kThreads, shared, stream, p, (FewBlock<Shape>)plan);
}

// Whether the products of several rows are faster than with activations from L1 (stream.cuh): every block
// stages all rows of them, which only much reading hides.
template <class Policy> bool few_rows_pay(const Product& p) {
    constexpr int64_t kMuch = 32 << 20;  // bytes of weights
    return p.m <= (kFourBits<Policy> ? 2 : 4) || p.w.n * p.w.k / Policy::kChunk * 16 >= kMuch;
}

// kUnsupported where it does not pay, if a tile would span groups, or if rows of scales do not start at words.
template <class Policy, class Y> int few_rows(const Product& p, void* stream) {
    const int64_t chunks = p.w.k / Policy::kChunk;
    const bool tiles_span_groups = p.per_group < p.w.n && p.per_group % 16;
    if (chunks * kScaleWords<Policy> / 2 % 4 || tiles_span_groups) return kUnsupported;
    if (p.m == 1) {
        int status = kUnsupported;
        if constexpr (!kFourBits<Policy>) status = few_rows_by<OneRowDeep<Policy>, Y>(p, kProcessors, stream);
        return status == kUnsupported ? few_rows_by<OneRow<Policy>, Y>(p, INT64_MAX, stream) : status;
    }
    if constexpr (!std::is_same_v<Policy, Mxfp4>)  // scales of up to 2^127 fit sums, not fp16 weights
        if (p.m <= kMostColumns && few_rows_pay<Policy>(p))
            return few_rows_by<SomeRows<Policy>, Y>(p, INT64_MAX, stream);
    return kUnsupported;
}

}  // namespace dsv4
