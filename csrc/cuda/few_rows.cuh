// linear for one to four activation rows: the stream of weights from memory sets the pace.
//
// A block holds its columns of the activations in shared memory, and every warp multiplies its tiles
// of 16 weight rows out of its own ring. `split` warps share a tile's columns, and so do the blocks of
// a cluster; the sums meet in the end. Several blocks fit on a multiprocessor: while some work, those of
// the next kernel fill their rings.
#pragma once

#include "gemv.cuh"
#include "linear.cuh"
#include "ring.cuh"

namespace dsv4 {

// How blocks are made. kDepth: stages of a ring; kResident: blocks that a multiprocessor has room for.
template <class Policy> struct FewShape {
    static constexpr int kWarps = 8, kDepth = 5, kResident = 2;
    static constexpr int kThreads = kWarps * 32;
    static constexpr size_t kSlots = kWarps * kDepth * sizeof(Slot<Policy>);
};
constexpr int kFewRows = 4;
constexpr size_t kFewShared = 226 * 1024;  // bytes, of all resident blocks

// ---------------------------------------------------------------- how the work is divided

// `split` warps and `parts` blocks share a tile's columns. A block goes over `rounds` tiles at each of
// its kWarps / split places, and over `stages` of `all` stages of their columns.
template <class Policy> struct FewPlan : FewShape<Policy> {
    using Shape = FewShape<Policy>;
    static constexpr int kMostRounds = 8;
    int split, parts, rounds, stages, all, vectors, rows;  // vectors: of a row that a block holds
    int64_t blocks;

    __host__ __device__ int places() const { return Shape::kWarps / split; }
    __host__ __device__ int tiles() const { return places() * rounds; }

    // `tiles` of the matrix, `group` of them in a group.
    FewPlan(int64_t tiles, int64_t group, int all, int rows, int split, int parts)
        : split(split), parts(parts), stages((int)ceil_div(ceil_div(all, parts), split) * split),
          all(all), vectors(stages * Policy::kChunk), rows(rows) {
        const int64_t needed = ceil_div(tiles * parts, (int64_t)kProcessors * places());
        rounds = (int)(needed < kMostRounds ? needed : kMostRounds);
        while (rounds > 1 && group % this->tiles()) rounds--;
        blocks = ceil_div(tiles, (int64_t)this->tiles());
    }
    size_t bytes() const {
        return Shape::kSlots + (size_t)rows * vectors * sizeof(uint4) +
               Shape::kWarps * rounds * rows * 16 * sizeof(float);
    }
    // In stages of one warp.
    double cost() const {
        if (bytes() > kFewShared) return 1e30;
        const double waves = (double)ceil_div(blocks * parts, (int64_t)kProcessors);
        const bool alone = bytes() > kFewShared / Shape::kResident - 1024;
        const bool scattered = split < Shape::kWarps && all > 8;  // 128 bytes here and there
        return waves * rounds * (stages / split + 0.25) * (alone ? 1.5 : 1) * (scattered ? 1.5 : 1) +
               (parts > 1 ? 1.5 : 0);
    }
    static FewPlan best(int64_t tiles, int64_t group, int all, int rows) {
        FewPlan best(tiles, group, all, rows, Shape::kWarps, 1);
        for (int parts = 1; parts <= kMostBlocks; parts *= 2)
            for (int split = Shape::kWarps; split >= 1; split /= 2) {
                const FewPlan plan(tiles, group, all, rows, split, parts);
                if (group % plan.places() == 0 && plan.cost() < best.cost()) best = plan;
            }
        return best;
    }
};

// ---------------------------------------------------------------- activations

// Activation rows of a block in shared memory, `vectors` of eight columns each: fp16 times a power of
// two (gemv.cuh), or bf16 where the weights are.
template <class Policy> struct Activations {
    static constexpr bool kHalf = !std::is_same_v<Policy, Bf16>;
    static constexpr int kVectors = Policy::kChunk / 8;  // of a chunk
    static constexpr int kWarps = FewShape<Policy>::kWarps;
    uint4* at;
    uint32_t* peak;  // [rows] float bits of the largest finite magnitude
    int rows, vectors;

    // Where vector v of row r lies: no two of the eight threads that read together share a bank.
    __device__ static int swizzled(int r, int v) {
        return v ^ r % 2 * (kVectors == 2 ? 1 : 4);
    }
    __device__ const uint4& vector(int r, int v) const { return at[r * vectors + swizzled(r, v)]; }

    // From bf16 rows `stride` apart: `columns` elements, zeros behind them. All threads of the block,
    // with a barrier at the end.
    __device__ void fill(const bf16* x, int64_t stride, int columns) {
        constexpr int kKept = 4;  // vectors a thread; what is more is read twice
        const int present = min(columns / 8, vectors), warp = threadIdx.x / 32;
        const int each = (vectors + 31) / 32, units = rows * each;  // a warp's
        auto place = [&](int unit, int& r, int& v) {
            r = unit / each, v = unit % each * 32 + threadIdx.x % 32;
        };
        auto load = [&](int unit) {
            int r, v;
            place(unit, r, v);
            return unit < units && v < present ? *(const uint4*)(x + r * stride + v * 8)
                                               : make_uint4(0, 0, 0, 0);
        };
        auto raise = [&](const uint4& value, int unit) {
            if (unit >= units) return;
            const uint32_t most = __reduce_max_sync(~0u, largest_of(value));
            if (threadIdx.x % 32 == 0) atomicMax(&peak[unit / each], most);
        };
        auto store = [&](int unit, const uint4& value) {
            int r, v;
            place(unit, r, v);
            if (unit < units && v < vectors) at[r * vectors + swizzled(r, v)] = ordered(value, r);
        };
        uint4 kept[kKept];
#pragma unroll
        for (int i = 0; i < kKept; i++) kept[i] = load(warp + i * kWarps);
        if constexpr (kHalf) {
#pragma unroll
            for (int i = 0; i < kKept; i++) raise(kept[i], warp + i * kWarps);
            for (int u = warp + kKept * kWarps; u < units; u += kWarps) raise(load(u), u);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kKept; i++) store(warp + i * kWarps, kept[i]);
        for (int u = warp + kKept * kWarps; u < units; u += kWarps) store(u, load(u));
        __syncthreads();
    }

    __device__ uint4 ordered(const uint4& v, int r) const {
        if constexpr (kHalf) return to_halves<Half<Policy>::kPermuted>(v, HalfRows::exponent_of(peak[r]));
        else return v;
    }
    __device__ float restored(float sum, int r) const {
        if constexpr (kHalf) return HalfRows::undo(sum, HalfRows::exponent_of(peak[r]));
        else return sum;
    }
};

// ---------------------------------------------------------------- products

// Sums of a tile. Without the format's factor, the global scale and the activations' exponents.
template <class Policy> struct TileSums {
    static constexpr int kVectors = Policy::kChunk / 8;
    static constexpr bool kFourBits = kScaleWords<Policy> > 0;
    float sum[4] = {};
    Lane lane;

    // The columns of a stage begin at vector `first`. `scale` is the stage's, where it has one.
    __device__ void add(const Piece<Policy>& piece, const Activations<Policy>& x, int first,
                        float scale) {
        first += lane.member * kVectors;
        if constexpr (kFourBits) add_scaled_columns(piece, x, first);
        else add_rows(piece, x, first, scale);
    }

    // One row. A block of 4-bit codes is not multiplied by its scale: seven of the eight columns of the
    // second operand are free, so each of the eight blocks of a step gets a column to itself (column
    // 2 m + p: half p of member m's chunk), and its scale multiplies the sum.
    __device__ void add_scaled_columns(const Piece<Policy>& piece, const Activations<Policy>& x,
                                       int first) {
        const bool mine[2] = {lane.group == 2 * lane.member, lane.group == 2 * lane.member + 1};
#pragma unroll
        for (int s = 0; s < 2; s++) {
            float c[4] = {};
            const uint4 &low = piece.codes[s][0], &high = piece.codes[s][1];
            const uint32_t words[2][4] = {{low.x, low.y, low.z, low.w},
                                          {high.x, high.y, high.z, high.w}};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint4 b = make_uint4(0, 0, 0, 0);
                if (mine[i / 2]) b = x.vector(0, first + s * 4 * kVectors + i);
                uint32_t a[2][4];
                Half<Policy>::operand(words[0][i], a[0]);
                Half<Policy>::operand(words[1][i], a[1]);
                mma_half(c, a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                mma_half(c, a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
            }
            const float2 s0 = Half<Policy>::scales(piece.scales[s][0]);
            const float2 s1 = Half<Policy>::scales(piece.scales[s][1]);
            sum[0] += c[0] * s0.x + c[1] * s0.y;
            sum[2] += c[2] * s1.x + c[3] * s1.y;
        }
    }

    // Column t of the second operand: activation row t.
    __device__ void add_rows(const Piece<Policy>& piece, const Activations<Policy>& x, int first,
                             float scale) {
        float c[2][4] = {};  // one a step
#pragma unroll
        for (int i = 0; i < 2 * kVectors; i++) {
            const int s = i / kVectors, v = i % kVectors;
            uint4 b = make_uint4(0, 0, 0, 0);
            if (lane.group < x.rows) b = x.vector(lane.group, first + s * 4 * kVectors + v);
            const uint4 &low = piece.codes[s][0], &high = piece.codes[s][1];
            if constexpr (Policy::kBlockScale) {
                uint32_t a[2][4];
                halves(v == 1 ? low.z : low.x, v == 1 ? low.w : low.y, a[0]);
                halves(v == 1 ? high.z : high.x, v == 1 ? high.w : high.y, a[1]);
                mma_half(c[s], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                mma_half(c[s], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
            } else {
                mma(c[s], low.x, high.x, low.y, high.y, b.x, b.y);
                mma(c[s], low.z, high.z, low.w, high.w, b.z, b.w);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += (c[0][i] + c[1][i]) * scale;
    }
    __device__ static void halves(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
        uint32_t pair[2];
        Half<Policy>::operand(low, pair);
        a[0] = pair[0], a[1] = pair[1];
        Half<Policy>::operand(high, pair);
        a[2] = pair[0], a[3] = pair[1];
    }

    // Writes the sums to `to` [rows][16]. One warp.
    __device__ void keep(float* to, const Activations<Policy>& x) {
        if constexpr (kFourBits) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
                sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 2 * lane.member + i % 2;
            if (row < x.rows) to[row * 16 + lane.group + i / 2 * 8] = x.restored(sum[i], row);
        }
    }
};

// ---------------------------------------------------------------- kernel

// What the elements of the first operand are too small by.
template <class Policy> constexpr float kFewFactor = Half<Policy>::kFactor;
template <> inline constexpr float kFewFactor<Bf16> = 1;

// Adds up what warps and blocks of a cluster left, [tile][split][rows][16], and writes it: each block
// a part of it.
template <class Y, class Plan>
__device__ void write_few_sums(const Product& p, const Plan& plan, const float* sums, float factor) {
    if (plan.parts > 1) cluster_barrier();
    else __syncthreads();
    const int rows = plan.rows, values = plan.tiles() * rows * 16;
    for (int i = blockIdx.z * blockDim.x + threadIdx.x; i < values; i += plan.parts * blockDim.x) {
        const int tile = i / (rows * 16), row = i / 16 % rows;
        const int64_t n = (blockIdx.x * (int64_t)plan.tiles() + tile) * 16 + i % 16;
        if (n >= p.w.n) continue;
        float total = 0;
        for (int c = 0; c < plan.parts; c++)
            for (int s = 0; s < plan.split; s++) {
                const float* at = sums + ((tile * plan.split + s) * rows + row) * 16 + i % 16;
                total += plan.parts == 1 ? *at : load_from_block(at, c);
            }
        total *= factor;
        ((Y*)p.y)[row * p.y_stride + n] = from_float<Y>(total * p.w.global_scale);
    }
    if (plan.parts > 1) cluster_barrier();  // the sums are read before their block ends
}

// All tiles of a block are in one group.
template <class Policy, class Y>
__global__ void __launch_bounds__(FewShape<Policy>::kThreads, FewShape<Policy>::kResident)
    few_kernel(const Product p, const FewPlan<Policy> plan) {
    using Shape = FewShape<Policy>;
    extern __shared__ __align__(16) char memory[];
    __shared__ uint32_t peaks[kFewRows];
    let_next_start();
    auto* slots = (Slot<Policy>*)memory;
    auto* vectors = (uint4*)(slots + Shape::kWarps * Shape::kDepth);
    auto* sums = (float*)(vectors + plan.rows * plan.vectors);
    const int warp = threadIdx.x / 32, place = warp / plan.split, s = warp % plan.split;
    const int64_t tile0 = blockIdx.x * (int64_t)plan.tiles();
    const int left = max((int)((p.w.n + 15) / 16 - tile0) - place, 0);  // tiles: the last block's
    const int begin = blockIdx.z * plan.stages, end = min(begin + plan.stages, plan.all);
    const Strip strip{(tile0 + place) * 16, plan.places() * 16,
                      min(plan.rounds, (left + plan.places() - 1) / plan.places()), begin + s, end,
                      plan.split};
    if (threadIdx.x < kFewRows) peaks[threadIdx.x] = 0;
    Ring<Policy, Shape::kDepth> ring(p.w, slots + warp * Shape::kDepth, strip);
    StageScales<Policy> scales(p.w, strip);
    __syncthreads();
    wait_for_previous();

    const int64_t column = (int64_t)begin * kStageChunks * Policy::kChunk;
    const bool any = tile0 * 16 < p.w.n;
    Activations<Policy> x{vectors, peaks, any ? plan.rows : 0, plan.vectors};
    x.fill((const bf16*)p.x + tile0 * 16 / p.per_group * p.w.k + column, p.x_stride,
           (int)(p.w.k - column));
    for (int t = 0; t < strip.tiles; t++) {
        TileSums<Policy> tile;
        for (int stage = strip.first; stage < strip.last; stage += strip.step) {
            const Piece<Policy> piece(ring.oldest(), tile.lane);
            __syncwarp();
            ring.fill();
            tile.add(piece, x, (stage - begin) * Policy::kChunk, scales.next());
        }
        tile.keep(sums + ((t * plan.places() + place) * plan.split + s) * plan.rows * 16, x);
    }
    write_few_sums<Y>(p, plan, sums, kFewFactor<Policy>);
}

// kUnsupported for more rows than the kernel takes, if a tile would span groups, or if rows of scales do
// not start at words.
template <class Policy, class Y> int few_rows(const Product& p, void* stream) {
    constexpr int kWords = kScaleWords<Policy>;
    const int64_t chunks = p.w.k / Policy::kChunk;
    const int64_t group = p.per_group < p.w.n ? p.per_group / 16 : 0;
    if (p.m > (kWords > 0 ? 1 : kFewRows) || chunks * kWords / 2 % 4 || (group && p.per_group % 16))
        return kUnsupported;
    const auto plan = FewPlan<Policy>::best(ceil_div(p.w.n, 16), group,
                                            (int)ceil_div(chunks, kStageChunks), (int)p.m);
    if (plan.bytes() > kFewShared) return kUnsupported;
    auto kernel = few_kernel<Policy, Y>;
    const int status = allow_shared(kernel, plan.bytes());
    if (status != cudaSuccess) return status;
    // One block a multiprocessor, even if it has no tile: else some get two of the next kernel's.
    const bool fill = plan.parts == 1 && plan.blocks < kProcessors;
    return launch_clusters(plan.parts, kernel, dim3(fill ? kProcessors : plan.blocks, 1, plan.parts),
                           plan.kThreads, plan.bytes(), stream, p, plan);
}

}  // namespace dsv4
