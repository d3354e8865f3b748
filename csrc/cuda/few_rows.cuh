// linear for one to four activation rows: the stream of weights from memory sets the pace.
//
// Every warp multiplies its tiles of 16 weight rows out of its own ring. `split` warps of a block share
// a tile's columns, every split-th stage each, and each holds its own columns of the activations in
// shared memory; the sums meet in the end. The rings begin to fill while the kernel before still runs.
#pragma once

#include "halves.cuh"
#include "linear.cuh"
#include "ring.cuh"

namespace dsv4 {

// How blocks are made. kDepth: stages of a ring, kEarly of them asked for before the activations.
struct FewShape {
    static constexpr int kWarps = 8, kThreads = kWarps * 32, kDepth = 5, kEarly = 2, kMostRounds = 8;
};
constexpr int kFewRows = 4;
constexpr size_t kFewShared = 226 * 1024;  // bytes, of all blocks on a multiprocessor

// Blocks that a multiprocessor has room for. With two, that of the next kernel fills its rings early. With
// one, no two of a launch share a multiprocessor where a small kernel before it takes another's place.
template <class Policy> constexpr int kFewResident = kScaleWords<Policy> > 0 ? 2 : 1;

// What each of `blocks` asks for that needs `bytes`. More blocks than multiprocessors fill all places.
template <class Policy> size_t few_shared(size_t bytes, int64_t blocks) {
    constexpr size_t kMoreThanHalf = kFewShared / 2 + 1024;
    const bool alone = kFewResident<Policy> == 1 && blocks <= kProcessors;
    return alone && bytes < kMoreThanHalf ? kMoreThanHalf : bytes;
}

// ---------------------------------------------------------------- how the work is divided

// What a block does: `rounds` tiles of a matrix at each of its kWarps / split places. A warp goes over
// `own` of the `all` stages of their columns.
template <class Policy> struct FewBlock : FewShape {
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
        return rounds * (own + 0.25) * (scattered ? 1.5 : 1);
    }
};

// All blocks of a matrix.
template <class Policy> struct FewPlan : FewBlock<Policy> {
    using Base = FewBlock<Policy>;
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
        const bool alone = kFewResident<Policy> == 2 && this->bytes() > kFewShared / 2 - 1024;
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

// ---------------------------------------------------------------- activations

// A warp's own columns of the activation rows in shared memory, `vectors` of eight columns a row: fp16
// times a power of two for each row (halves.cuh), or bf16 where the weights are. Vector v of stage i lies
// in the order that the steps of the matrix unit take: [stage][step][vector of a chunk][member].
template <class Policy> struct OwnColumns {
    static constexpr bool kHalf = !std::is_same_v<Policy, Bf16>;
    static constexpr int kStage = Policy::kChunk;        // vectors of a stage
    static constexpr int kVectors = Policy::kChunk / 8;  // of a chunk
    static constexpr int kBatch = 4;                     // vectors that a thread loads at once
    using Batch = uint4[kBatch];
    uint4* at;
    int rows, vectors, exponent = 0;  // thread r: row r's

    // Of vector v of row r; the eight threads that read together share no bank.
    __device__ static int place(int r, int v) {
        const int chunk = v / kVectors % kStageChunks, inner = v % kVectors;
        const int ordered = chunk % 2 * (4 * kVectors) + inner * 4 + chunk / 2;
        return v / kStage * kStage + (ordered ^ r % 2 * 4);
    }

    // From bf16 rows `stride` apart with `columns` elements: every step-th stage from `first` on, zeros
    // behind the last column. Calls between() once the first loads are under way. One warp.
    template <class Between>
    __device__ void fill(const bf16* x, int64_t stride, int columns, int first, int step,
                         Between between) {
        const int lane = threadIdx.x % 32, present = columns / 8;
        auto load = [&](int r, int base, Batch& batch) {
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                const int v = base + i * 32 + lane;
                const int from = (first + v / kStage * step) * kStage + v % kStage;
                batch[i] = r < rows && v < vectors && from < present
                               ? *(const uint4*)(x + r * stride + from * 8)
                               : make_uint4(0, 0, 0, 0);
            }
        };
        Batch kept, next;
        load(0, 0, kept);
        between();
#pragma unroll 1
        for (int r = 0; r < rows; r++) {
            load(r + 1, 0, next);
            int e = 0;
            if constexpr (kHalf) {
                uint32_t most = largest(kept);
#pragma unroll 1
                for (int base = kBatch * 32; base < vectors; base += kBatch * 32) {
                    Batch more;
                    load(r, base, more);
                    most = max(most, largest(more));
                }
                e = RowScale::exponent_of(__reduce_max_sync(~0u, most));
                if (lane == r) exponent = e;
            }
#pragma unroll 1
            for (int base = 0; base < vectors; base += kBatch * 32) {
                if (base > 0) load(r, base, kept);
#pragma unroll
                for (int i = 0; i < kBatch; i++) {
                    const int v = base + i * 32 + lane;
                    if (v < vectors) at[r * vectors + place(r, v)] = stored(kept[i], e);
                }
            }
#pragma unroll
            for (int i = 0; i < kBatch; i++) kept[i] = next[i];
        }
        __syncwarp();
    }
    __device__ static uint32_t largest(const Batch& batch) {
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < kBatch; i++) most = max(most, largest_of(batch[i]));
        return most;
    }
    __device__ static uint4 stored(const uint4& v, int e) {
        if constexpr (kHalf) return to_halves<Half<Policy>::kPermuted>(v, e);
        else return v;
    }
    // All threads of the warp.
    __device__ float restored(float sum, int row) const {
        if constexpr (kHalf) return RowScale::undo(sum, __shfl_sync(~0u, exponent, row));
        else return sum;
    }
};

// Second operands of a stage's products: columns are activation rows, or, with a scale for each block
// of 4-bit codes, blocks (TileSums). Only some threads have a part in them; the others hold zeros.
template <class Policy> struct Columns {
    static constexpr int kVectors = Policy::kChunk / 8;
    static constexpr bool kFourBits = kScaleWords<Policy> > 0;
    static constexpr int kCount = kVectors == 1 ? 2 : 4;  // vectors of a thread
    uint32_t at[2];  // shared addresses in stage 0
    int mine;
    uint4 vector[kCount] = {};

    __device__ Columns(const OwnColumns<Policy>& x, const Lane& lane) {
        const uint32_t base = (uint32_t)__cvta_generic_to_shared(x.at);
        if constexpr (kFourBits) {
            mine = x.rows > 0 && lane.group / 2 == lane.member;
            at[0] = base + (lane.group % 2 * (2 * kVectors) + lane.member) * 16;
            at[1] = at[0] + 64;
        } else {
            mine = lane.group < x.rows;
            const int r = mine ? lane.group : 0;
#pragma unroll
            for (int i = 0; i < 2; i++)
                at[i] = base + (r * x.vectors + ((4 * i + lane.member) ^ r % 2 * 4)) * 16;
        }
    }
    // Those of the warp's i-th stage; [step][vector] of a chunk, of half a chunk for 4-bit codes.
    __device__ void load(int i) {
        const uint32_t skip = i * Policy::kChunk * 16;
#pragma unroll
        for (int v = 0; v < kCount; v++)
            asm volatile(
                "{\n.reg .pred mine;\nsetp.ne.s32 mine, %5, 0;\n"
                "@mine ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                : "+r"(vector[v].x), "+r"(vector[v].y), "+r"(vector[v].z), "+r"(vector[v].w)
                : "r"(at[v % 2] + skip + v / 2 * 64 * kVectors), "r"(mine));
    }
};

// ---------------------------------------------------------------- products

// Sums of a tile. Without the format's factor, the global scale and the activations' exponents.
template <class Policy> struct TileSums {
    static constexpr int kVectors = Policy::kChunk / 8;
    static constexpr bool kFourBits = kScaleWords<Policy> > 0;
    float sum[4] = {};
    Lane lane;

    // `scale` is the stage's, where it has one.
    __device__ void add(const Piece<Policy>& piece, const Columns<Policy>& x, float scale) {
        if constexpr (kFourBits) add_scaled_columns(piece, x);
        else add_rows(piece, x, scale);
    }

    // One row. A block of 4-bit codes is not multiplied by its scale: seven of the eight columns of the
    // second operand are free, so each of the eight blocks of a step gets a column to itself (column
    // 2 m + p: half p of member m's chunk), and its scale multiplies the sum. c[p] is right in the
    // columns of halves p only; the others are not used.
    __device__ void add_scaled_columns(const Piece<Policy>& piece, const Columns<Policy>& x) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            float c[2][4] = {};
            const uint4 &low = piece.codes[s][0], &high = piece.codes[s][1];
            const uint32_t words[2][4] = {{low.x, low.y, low.z, low.w},
                                          {high.x, high.y, high.z, high.w}};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4& b = x.vector[2 * s + i % 2];
                uint32_t a[2][4];
                Half<Policy>::operand(words[0][i], a[0]);
                Half<Policy>::operand(words[1][i], a[1]);
                mma_half(c[i / 2], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                mma_half(c[i / 2], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float2 scales = piece.scale(s, h);
                sum[2 * h] += c[0][2 * h] * scales.x;
                sum[2 * h] += c[1][2 * h + 1] * scales.y;
            }
        }
    }

    // Column t of the second operand: activation row t.
    __device__ void add_rows(const Piece<Policy>& piece, const Columns<Policy>& x, float scale) {
        float c[2][4] = {};  // one a step
#pragma unroll
        for (int i = 0; i < 2 * kVectors; i++) {
            const int s = i / kVectors, v = i % kVectors;
            const uint4 &low = piece.codes[s][0], &high = piece.codes[s][1], &b = x.vector[i];
            if constexpr (Policy::kBlockScale) {
                uint32_t a[2][2][2];  // [half of eight columns][row / 8]
                Half<Policy>::operand(v == 0 ? low.x : low.z, a[0][0]);
                Half<Policy>::operand(v == 0 ? high.x : high.z, a[0][1]);
                Half<Policy>::operand(v == 0 ? low.y : low.w, a[1][0]);
                Half<Policy>::operand(v == 0 ? high.y : high.w, a[1][1]);
                mma_half(c[s], a[0][0][0], a[0][1][0], a[0][0][1], a[0][1][1], b.x, b.y);
                mma_half(c[s], a[1][0][0], a[1][1][0], a[1][0][1], a[1][1][1], b.z, b.w);
            } else {
                mma(c[s], low.x, high.x, low.y, high.y, b.x, b.y);
                mma(c[s], low.z, high.z, low.w, high.w, b.z, b.w);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += (c[0][i] + c[1][i]) * scale;
    }

    // Writes the sums to `to` [rows][16]. One warp.
    __device__ void keep(float* to, const OwnColumns<Policy>& x) {
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
            const float total = x.restored(sum[i], row);
            if (row < x.rows) to[row * 16 + lane.group + i / 2 * 8] = total;
        }
    }
};

// ---------------------------------------------------------------- kernel

// What the elements of the first operand are too small by.
template <class Policy> constexpr float kFewFactor = Half<Policy>::kFactor;
template <> inline constexpr float kFewFactor<Bf16> = 1;

// Adds up what warps left, [tile][split][rows][16], and stores it. All threads of the block.
template <class Policy, class Store>
__device__ void store_few_sums(const dsv4_weight& w, int64_t row0, const FewBlock<Policy>& block,
                               const float* sums, Store store) {
    __syncthreads();
    const int rows = block.rows;
    for (int i = threadIdx.x; i < block.tiles() * rows * 16; i += blockDim.x) {
        const int tile = i / (rows * 16), row = i / 16 % rows;
        const int64_t n = row0 + tile * 16 + i % 16;
        if (n >= w.n) continue;
        float total = 0;
#pragma unroll
        for (int s = 0; s < FewShape::kWarps; s++)
            if (s < block.split) total += sums[((tile * block.split + s) * rows + row) * 16 + i % 16];
        total *= kFewFactor<Policy>;
        store(row, n, total * w.global_scale);
    }
}

// One block: weight rows from row0 on, as many as its tiles have, times activation rows `stride` apart;
// store(activation row, weight row, product). `memory` has block.bytes().
template <class Policy, class Store>
__device__ void multiply_few(const dsv4_weight& w, int64_t row0, const FewBlock<Policy>& block,
                             const bf16* x, int64_t stride, char* memory, Store store) {
    using Shape = FewShape;
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
    const int rows = row0 < w.n ? block.rows : 0;
    OwnColumns<Policy> own_x{vectors + warp * block.rows * block.vectors(), rows, block.vectors()};
    own_x.fill(x, stride, (int)w.k, s, block.split, [&] {
#pragma unroll 1
        for (int i = Shape::kEarly; i < Shape::kDepth; i++) ring.fill();
    });
    Columns<Policy> columns(own_x, Lane());
    const int own = strip.stages();
    for (int t = 0; t < strip.tiles; t++) {
        TileSums<Policy> tile;
        for (int i = 0; i < own; i++) {
            const Piece<Policy> piece(*(const Slot<Policy>*)((const char*)slots + ring.oldest()),
                                      tile.lane);
            __syncwarp();
            ring.fill();
            columns.load(i);
            tile.add(piece, columns, scales.of(i));
        }
        tile.keep(sums + ((t * block.places() + place) * block.split + s) * block.rows * 16, own_x);
        scales.next_tile();
    }
    store_few_sums(w, row0, block, sums, store);
}

// All tiles of a block are in one group.
template <class Policy, class Y>
__global__ void __launch_bounds__(FewShape::kThreads, 2)
    few_kernel(const Product p, const FewBlock<Policy> block) {
    extern __shared__ __align__(16) char memory[];
    let_next_start();
    const int64_t row0 = blockIdx.x * (int64_t)block.tiles() * 16;
    const bf16* x = (const bf16*)p.x + row0 / p.per_group * p.w.k;
    multiply_few(p.w, row0, block, x, p.x_stride, memory, [&](int row, int64_t n, float value) {
        ((Y*)p.y)[row * p.y_stride + n] = from_float<Y>(value);
    });
}

// kUnsupported for more rows than the kernel takes, if a tile would span groups, or if rows of scales do
// not start at words.
template <class Policy, class Y> int few_rows(const Product& p, void* stream) {
    constexpr int kWords = kScaleWords<Policy>;
    const int64_t chunks = p.w.k / Policy::kChunk;
    const int64_t group = p.per_group < p.w.n ? p.per_group / 16 : 0;
    if (p.m > (kWords > 0 ? 1 : kFewRows) || chunks * kWords / 2 % 4 || (group && p.per_group % 16))
        return kUnsupported;
    const auto plan = FewPlan<Policy>::best(ceil_div(p.w.n, 16), group, p.w.k, (int)p.m);
    if (plan.bytes() > kFewShared) return kUnsupported;
    auto kernel = few_kernel<Policy, Y>;
    const size_t shared = few_shared<Policy>(plan.bytes(), plan.blocks);
    const int status = allow_shared(kernel, shared);
    if (status != cudaSuccess) return status;
    // One block a multiprocessor, even if it has no tile: else some get two of the next kernel's.
    const int64_t blocks = plan.blocks < kProcessors ? kProcessors : plan.blocks;
    return launch(kernel, dim3(blocks), plan.kThreads, shared, stream, p, (FewBlock<Policy>)plan);
}

}  // namespace dsv4
