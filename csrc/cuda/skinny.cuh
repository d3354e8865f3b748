// linear for a few to 64 activation rows: weights streamed once, decoded into registers, multiplied by wgmma.
//
// A block of 16 warps has a tile of 64, 128 or 256 weight rows. Each warp streams 16 rows of it through a
// ring of its own (ring.cuh); four warps make a 64-row product. Warpgroups beyond the rows of the tile, and
// the blocks of a cluster, take columns in turn, a stage (128 bytes of a weight row) each; their sums meet
// in shared memory, always in the same order.
//
// The block's columns of the activations lie in shared memory, kResidentColumns at a time, in the order in
// which threads hold decoded weights: product `place` of a stage multiplies two columns of each of four
// chunks, twice.
#pragma once

#include "linear.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

namespace dsv4 {

constexpr int kSkinnyWarps = 16, kSkinnyThreads = 32 * kSkinnyWarps, kSkinnyGroups = kSkinnyWarps / 4;
constexpr int kResidentColumns = 1024;
constexpr size_t kSkinnyShared = 226 * 1024;  // bytes of a block, which has a multiprocessor to itself

// How the work is divided: see Plan in engine/cuda/linear.py.
struct Division {
    int row_groups;     // 64-row products of a tile
    int column_groups;  // warpgroups that share the columns of a product: all are kSkinnyGroups
    int rows;           // of the tile
    __device__ Division(int row_groups)
        : row_groups(row_groups), column_groups(kSkinnyGroups / row_groups), rows(64 * row_groups) {}
    // Who takes columns in turn.
    __device__ int parts() const { return gridDim.z * column_groups; }
    __device__ int first_part() const { return blockIdx.z * column_groups; }
};

// ---------------------------------------------------------------- activations

// kTokens activation rows at the columns of one stage, as the second operands of its products.
template <class Policy, int kTokens> struct alignas(1024) Columns64 {
    static constexpr int kColumns = kStageChunks * Policy::kChunk;
    static constexpr int kVectors = kColumns / 8;        // of 16 bytes, of a row
    static constexpr int kInner = Policy::kChunk / 8;    // of them, of a chunk
    static constexpr int kPanel = 64 * sizeof(bf16);     // bytes of a row that lie together

    char panels[kColumns / 64][kTokens][kPanel];  // swizzled

    // The product (of 16 columns) that takes words q of vector `inner` of the chunks of a step.
    __host__ __device__ static constexpr int place(int step, int inner, int q) {
        return kInner == 4 ? step * 8 + q * 4 + inner
               : kInner == 2 ? q * 4 + step * 2 + inner
                             : step * 2 + q;
    }
    // The same by what Policy::operand gives: product j of half a chunk.
    __host__ __device__ static constexpr int product(int step, int half, int j) {
        return kInner == 4 ? place(step, half * 2 + j / 2, j % 2)
               : kInner == 2 ? place(step, half, j)
                             : place(step, 0, half);
    }
    // Where columns 2 member and 2 member + 1 (e = 0) or + 8 and + 9 (e = 1) of a product lie after the
    // beginning of a token's row; eighth: token % 8.
    __host__ __device__ static constexpr int offset(int product, int eighth, int member, int e) {
        return product / 4 * kTokens * kPanel + ((product % 4 * 2 + e) ^ eighth) * 16 + member * 4;
    }

    // Vector v of a row, as it is in memory. No two threads of a warp with consecutive v, then consecutive
    // tokens, share a bank.
    __host__ __device__ void put(int token, int eighth, int v, const uint4& x) {
        const int chunk = v / kInner, inner = v % kInner, member = chunk / 2, step = chunk % 2;
        uint32_t words[4] = {x.x, x.y, x.z, x.w};
        if constexpr (kInner == 4) {
            words[0] = select_bytes(x.x, x.z, 0x5410), words[1] = select_bytes(x.x, x.z, 0x7632);
            words[2] = select_bytes(x.y, x.w, 0x5410), words[3] = select_bytes(x.y, x.w, 0x7632);
        }
        char* const row = panels[0][token];
#pragma unroll
        for (int q = 0; q < 2; q++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int e = i ^ step;
                *(uint32_t*)(row + offset(place(step, inner, q), eighth, member, e)) =
                    e == 0 ? words[2 * q] : words[2 * q + 1];
            }
    }
    // The second operand of a product: what to add to the descriptor of the stage, in its units.
    __device__ static constexpr uint64_t operand(int product) {
        return (product / 4 * kTokens * kPanel + product % 4 * 32) >> 4;
    }
};

// ---------------------------------------------------------------- shared memory

template <class Policy, int kTokens> struct SkinnyMemory {
    using Stage = Columns64<Policy, kTokens>;
    static constexpr int kStages = kResidentColumns / Stage::kColumns;
    static constexpr size_t kX = kStages * sizeof(Stage);
    static constexpr size_t kRing = kSkinnyWarps * sizeof(Slot<Policy>);  // for a depth of one
    static constexpr int kFits = (kSkinnyShared - kX) / kRing, kDepth = kFits < 5 ? kFits : 5;

    union {
        Stage x[kStages];
        float sums[kTokens * (4 * 64 + 4 * 4)];  // [column group][token][row of the tile + 4]
    };
    Slot<Policy> slots[kSkinnyWarps][kDepth];

    // Of the sum of a column group: rows of four are 16 bytes apart.
    __device__ static int place(const Division& d, int column_group, int token, int row) {
        return (column_group * kTokens + token) * (d.rows + 4) + row;
    }
};

// Brings round `round` of the block's columns of the activations to shared memory.
template <class Policy, int kTokens>
__device__ void stage_columns(const Product& p, const Division& d, int round, const bf16* x, int tokens,
                              SkinnyMemory<Policy, kTokens>& s) {
    using Memory = SkinnyMemory<Policy, kTokens>;
    using Stage = typename Memory::Stage;
    constexpr int kLines = kSkinnyThreads / Stage::kVectors;  // that the block brings at once
    constexpr int kAll = Memory::kStages * kTokens, kBatch = kAll / kLines < 8 ? kAll / kLines : 8;
    const int v = threadIdx.x % Stage::kVectors, columns = (int)p.w.k;
    const int first = round * (Memory::kStages / d.column_groups) * d.parts() + d.first_part();
#pragma unroll 1
    for (int base = threadIdx.x / Stage::kVectors; base < kAll; base += kBatch * kLines) {
        uint4 kept[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
            const int line = base + b * kLines, token = line % kTokens, slot = line / kTokens;
            const int stage = first + slot / d.column_groups * d.parts() + slot % d.column_groups;
            const int column = stage * Stage::kColumns + 8 * v;
            kept[b] = token < tokens && column < columns
                          ? *(const uint4*)(x + token * p.x_stride + column)
                          : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
            const int line = base + b * kLines, token = line % kTokens;
            s.x[line / kTokens].put(token, threadIdx.x / Stage::kVectors % 8, v, kept[b]);
        }
    }
}

// ---------------------------------------------------------------- products

// This thread's sums of a 64-row product: element 4 j + i is row `group` + i / 2 * 8 of its warp's 16, token
// 8 j + 2 * member + i % 2.
template <class Policy, int kTokens> struct SkinnySums {
    static constexpr int kSums = kTokens / 2;
    using Stage = Columns64<Policy, kTokens>;
    using Scale = typename Policy::Scale;
    float sum[kSums] = {};

    // `scale` is the stage's, where it has one. Products are under way until finish().
    __device__ void add(const Piece<Policy>& piece, const Stage& x, float scale) {
        if constexpr (Policy::kBlockScale) {
            float part[kSums] = {};
            multiply(part, piece, x);
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < kSums; i++) sum[i] += part[i] * scale;
        } else {
            multiply(sum, piece, x);
            wgmma_wait<0>();
        }
    }

  private:
    __device__ static Scale scale_of(const Piece<Policy>& piece, int step, int h) {
        if constexpr (kScaleWords<Policy> > 0)
            return (Scale)(piece.scales[h] >> step * 4 * kScaleWords<Policy>);
        else return Scale{};
    }

    __device__ static void multiply(float (&to)[kSums], const Piece<Policy>& piece, const Stage& x) {
        const uint64_t b = matrix_descriptor(shared_address(x.panels), 16, 1024);
        uint32_t a[2][2][Policy::kProducts][2];  // [this half and the one before][row / 8]
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int step = i / 2, half = i % 2;
            if (i > 0) wgmma_wait<1>();
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint4& v = piece.codes[step][h];
                Policy::operand(half == 0 ? make_uint2(v.x, v.y) : make_uint2(v.z, v.w),
                                scale_of(piece, step, h), half, a[i % 2][h]);
            }
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < Policy::kProducts; j++) {
                auto& now = a[i % 2];
                multiply_async(to, now[0][j][0], now[1][j][0], now[0][j][1], now[1][j][1],
                               b + Stage::operand(Stage::product(step, half, j)));
            }
            wgmma_commit();
        }
    }
};

// ---------------------------------------------------------------- results

// Adds up what the warpgroups, and the blocks of the cluster, left in s.sums; each block writes a part of
// the tile's rows. All threads of the block.
template <class Policy, int kTokens>
__device__ void write_skinny_sums(const Product& p, const Division& d, int64_t row0, int64_t token0,
                                  int tokens, bool to_bf16, SkinnyMemory<Policy, kTokens>& s) {
    const int each = d.rows / gridDim.z, first = blockIdx.z * each;
    for (int i = threadIdx.x; i < each / 4 * tokens; i += kSkinnyThreads) {
        const int row = first + i % (each / 4) * 4, token = i / (each / 4);
        float total[4] = {};
#pragma unroll 8
        for (int part = 0; part < d.parts(); part++) {
            const int at = s.place(d, part % d.column_groups, token, row);
            const float4 one = remote_load4(
                remote_address(shared_address(&s.sums[at]), part / d.column_groups));
            total[0] += one.x, total[1] += one.y, total[2] += one.z, total[3] += one.w;
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int64_t n = row0 + row + c, to = (token0 + token) * p.y_stride + n;
            const float value = total[c] * Policy::kFactor * p.w.global_scale;
            if (n >= p.w.n) continue;
            if (to_bf16) ((bf16*)p.y)[to] = __float2bfloat16_rn(value);
            else ((float*)p.y)[to] = value;
        }
    }
}

// ---------------------------------------------------------------- kernel

template <class Policy, int kTokens>
__global__ void __launch_bounds__(kSkinnyThreads, 1)
    skinny_kernel(const Product p, int row_groups, bool to_bf16) {
    using Memory = SkinnyMemory<Policy, kTokens>;
    extern __shared__ char memory[];
    auto& s = *reinterpret_cast<Memory*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
    let_next_start();
    const Division d(row_groups);
    const int warp = threadIdx.x / 32, row_group = warp / 4 % row_groups, column_group = warp / 4 / row_groups;
    const int row = row_group * 64 + warp % 4 * 16;  // of the tile
    const int64_t row0 = blockIdx.x * (int64_t)d.rows, token0 = blockIdx.y * (int64_t)kTokens;
    const int stages = (int)((p.w.k + Memory::Stage::kColumns - 1) / Memory::Stage::kColumns);
    const Strip strip{row0 + row, 0, row0 + row < p.w.n, d.first_part() + column_group, stages, d.parts()};
    Ring<Policy, Memory::kDepth> ring(p.w, s.slots[warp], strip);
    ring.fill();
    StageScales<Policy> scales(p.w, strip);
    wait_for_previous();

    const int tokens = (int)min(p.m - token0, (int64_t)kTokens);
    const bf16* x = (const bf16*)p.x + token0 * p.x_stride + row0 / p.per_group * p.w.k;
    const int own = strip.stages(), in_turn = Memory::kStages / d.column_groups;
    const int most = (stages - d.first_part() + d.parts() - 1) / d.parts();  // of any warp of the block
    SkinnySums<Policy, kTokens> sums;
#pragma unroll 1
    for (int i = 1; i < Memory::kDepth; i++) ring.fill();
#pragma unroll 1
    for (int first = 0; first < most; first += in_turn) {
        if (first > 0) __syncthreads();  // the round before is no longer read
        stage_columns(p, d, first / in_turn, x, tokens, s);
        fence_async_proxy();
        __syncthreads();
#pragma unroll 1
        for (int i = first; i < min(first + in_turn, own); i++) {
            const Piece<Policy> piece(
                *(const Slot<Policy>*)((const char*)s.slots[warp] + ring.oldest()), Lane());
            __syncwarp();
            ring.fill();
            sums.add(piece, s.x[(i - first) * d.column_groups + column_group], scales.of(i));
        }
    }
    wait_for_copies<0>();
    __syncthreads();
    const Lane lane;
#pragma unroll
    for (int i = 0; i < sums.kSums; i++)
        s.sums[s.place(d, column_group, i / 4 * 8 + 2 * lane.member + i % 2,
                       row + lane.group + i % 4 / 2 * 8)] = sums.sum[i];
    if (gridDim.z > 1) cluster_barrier();
    else __syncthreads();
    write_skinny_sums(p, d, row0, token0, tokens, to_bf16, s);
    if (gridDim.z > 1) cluster_barrier();  // the sums are read before their block ends
}

template <class Policy, int kTokens>
int launch_skinny(const Product& p, int row_groups, int splits, bool to_bf16, void* stream) {
    constexpr size_t kShared = sizeof(SkinnyMemory<Policy, kTokens>) + 1024;
    auto kernel = skinny_kernel<Policy, kTokens>;
    const int status = allow_shared(kernel, kShared);
    if (status != cudaSuccess) return status;
    const dim3 grid(ceil_div(p.w.n, 64 * row_groups), ceil_div(p.m, kTokens), splits);
    return launch_clusters(splits, kernel, grid, kSkinnyThreads, kShared, stream, p, row_groups, to_bf16);
}

}  // namespace dsv4
