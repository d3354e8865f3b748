// linear for a few to 64 activation rows: weights streamed once, decoded into registers, multiplied by wgmma.
//
// Three kernels. The first writes the activations in the order in which products take them, so that
// contiguous bytes are what a block needs for a stage (128 bytes of every weight row). The second
// multiplies: a block of 16 warps has a tile of 256 weight rows; each warp streams 16 of them through a ring
// of its own (ring.cuh), four warps make a 64-row product. `parts` blocks take the stages of a tile in turn.
// The third adds up their sums, always in the same order; it is not needed where there is one part.
#pragma once

#include "linear.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

namespace dsv4 {

constexpr int kSkinnyWarps = 16, kSkinnyThreads = 32 * kSkinnyWarps, kSkinnyRows = 16 * kSkinnyWarps;
constexpr int kResidentColumns = 1024;        // of the activations, in shared memory
constexpr int kEarlyStages = 2;               // of weights, asked for before activations
constexpr size_t kSkinnyShared = 226 * 1024;  // bytes of a block, which has a multiprocessor to itself

// ---------------------------------------------------------------- activations

// kTokens activation rows at the columns of one stage, as the second operands of its products.
template <class Policy, int kTokens> struct alignas(1024) StageColumns {
    static constexpr int kColumns = kStageChunks * Policy::kChunk;
    static constexpr int kVectors = kColumns / 8;      // of 16 bytes, of a row
    static constexpr int kInner = Policy::kChunk / 8;  // of them, of a chunk
    static constexpr int kPanel = 64 * sizeof(bf16);   // bytes of a row that lie together

    char panels[kColumns / 64][kTokens][kPanel];  // swizzled

    // The products of half a chunk, j of them: a thread's weights are of chunks 2 member and 2 member + 1 of
    // a row, which `step` tells apart.
    __host__ __device__ static constexpr int product(int step, int half, int j) {
        return kInner == 4 ? step * 8 + j % 2 * 4 + half * 2 + j / 2
               : kInner == 2 ? j * 4 + step * 2 + half
                             : step * 2 + half;
    }
    // The second operand of a product: what to add to the descriptor of the stage, in its units.
    __host__ __device__ static constexpr uint32_t operand(int product) {
        return (product / 4 * kTokens * kPanel + product % 4 * 32) >> 4;
    }
    // Where columns 2 member and 2 member + 1 (e = 0) or + 8 and + 9 (e = 1) of a product lie.
    __host__ __device__ static constexpr int offset(int product, int token, int member, int e) {
        return (product / 4 * kTokens + token) * kPanel + ((product % 4 * 2 + e) ^ token % 8) * 16 +
               member * 4;
    }

    // Vector v of a row, as it is in memory.
    __host__ __device__ void put(int token, int v, const uint4& x) {
        const int chunk = v / kInner, inner = v % kInner, member = chunk / 2, step = chunk % 2;
        uint32_t words[4] = {x.x, x.y, x.z, x.w};
        if constexpr (kInner == 4) {  // codes i and i + 4 are decoded into one register
            words[0] = select_bytes(x.x, x.z, 0x5410), words[1] = select_bytes(x.x, x.z, 0x7632);
            words[2] = select_bytes(x.y, x.w, 0x5410), words[3] = select_bytes(x.y, x.w, 0x7632);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = kInner == 4   ? product(step, inner / 2, inner % 2 * 2 + i / 2)
                           : kInner == 2 ? product(step, inner, i / 2)
                                         : product(step, i / 2, 0);
            *(uint32_t*)((char*)panels + offset(at, token, member, i % 2)) = words[i];
        }
    }
};

// to[group][block of kTokens rows][stage] from x; zeros beyond the last row and column. A thread has one
// vector; blockIdx.y: block of rows, blockIdx.z: group.
template <class Policy, int kTokens>
__global__ void __launch_bounds__(256)
    place_columns_kernel(const Product p, int stages, StageColumns<Policy, kTokens>* to) {
    using Stage = StageColumns<Policy, kTokens>;
    let_next_start();
    wait_for_previous();
    const int i = blockIdx.x * 256 + threadIdx.x, v = i % Stage::kVectors;
    const int token = i / Stage::kVectors % kTokens, stage = i / (Stage::kVectors * kTokens);
    if (stage >= stages) return;
    const int64_t row = blockIdx.y * (int64_t)kTokens + token, column = stage * (int64_t)Stage::kColumns + 8 * v;
    const bf16* x = (const bf16*)p.x + row * p.x_stride + blockIdx.z * p.w.k + column;
    to[(blockIdx.z * (int64_t)gridDim.y + blockIdx.y) * stages + stage].put(
        token, v, row < p.m && column < p.w.k ? *(const uint4*)x : make_uint4(0, 0, 0, 0));
}

// ---------------------------------------------------------------- products

template <class Policy, int kTokens> struct SkinnyMemory {
    using Stage = StageColumns<Policy, kTokens>;
    static constexpr int kSlots = kResidentColumns / Stage::kColumns;
    static constexpr size_t kRings = kSkinnyShared - kSlots * sizeof(Stage) - 1024;
    static constexpr int kFits = kRings / (kSkinnyWarps * sizeof(Slot<Policy>)), kDepth = kFits < 5 ? kFits : 5;

    Stage x[kSlots];
    Slot<Policy> slots[kSkinnyWarps][kDepth];
    uint64_t full[kSlots], empty[kSlots];
};

// A block's stages of activations: one a turn.
template <class Policy, int kTokens> struct Feed {
    using Memory = SkinnyMemory<Policy, kTokens>;
    Memory& s;
    const typename Memory::Stage* from;
    int stages;

    __device__ static int slot(int turn) { return turn % Memory::kSlots; }
    __device__ static int parity(int turn) { return turn / Memory::kSlots & 1; }

    // One thread.
    __device__ void load(int turn) const {
        const int stage = turn * gridDim.z + blockIdx.z, at = slot(turn);
        if (stage >= stages) return;
        if (turn >= Memory::kSlots) barrier_wait(&s.empty[at], parity(turn - Memory::kSlots));
        barrier_expect(&s.full[at], sizeof(s.x[at]));
        bulk_load(&s.x[at], from + stage, sizeof(s.x[at]), &s.full[at]);
    }
};

// This thread's sums of a 64-row product: element 4 j + i is row `group` + i / 2 * 8 of its warp's 16, token
// 8 j + 2 * member + i % 2.
template <class Policy, int kTokens> struct SkinnySums {
    static constexpr int kSums = kTokens / 2;
    using Stage = StageColumns<Policy, kTokens>;
    using Scale = typename Policy::Scale;
    static constexpr uint64_t kUpper = 1ull << 62 | 1024ull >> 4 << 32;  // of matrix_descriptor
    float sum[kSums] = {};

    // The matrix unit cuts off what it adds to a sum of larger size, so it adds up one stage only. `scale`
    // is the stage's, where it has one.
    __device__ void add(const Slot<Policy>& slot, const Stage& x, float scale) {
        float part[kSums];
        const uint32_t b = (uint32_t)matrix_descriptor(shared_address(x.panels), 16, 1024);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int step = i / 2, half = i % 2;
            uint32_t a[2][Policy::kProducts][2];
            decode(slot, step, half, a);
            const uint32_t at = b + Stage::operand(Stage::product(step, half, 0));
            wgmma_fence();
#pragma unroll
            for (int j = 0; j < Policy::kProducts; j++)
                wgmma(part, a[0][j][0], a[1][j][0], a[0][j][1], a[1][j][1],
                      kUpper | (at + Stage::operand(Stage::product(0, 0, j))), i + j > 0);
            wgmma_commit();
            wgmma_wait<0>();
        }
#pragma unroll
        for (int i = 0; i < kSums; i++) sum[i] += Policy::kBlockScale ? part[i] * scale : part[i];
    }

  private:
    // The operands of half a chunk, for both rows of this thread.
    __device__ static void decode(const Slot<Policy>& slot, int step, int half,
                                  uint32_t (&a)[2][Policy::kProducts][2]) {
        const Lane lane;
        const int chunk = 2 * lane.member + step;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = lane.group + 8 * h;
            Scale scale{};
            if constexpr (kScaleWords<Policy> > 0) scale = ((const Scale*)slot.scales)[row * kStageChunks + chunk];
            Policy::operand(((const uint2*)&slot.codes[row][Slot<Policy>::place(row, chunk)])[half], scale, half,
                            a[h]);
        }
    }
};

// Where sums go. `partial` [part][m][pitch] where a product has more than one part, else null: y.
struct SkinnyOutput {
    float* partial;
    int64_t pitch;
    bool to_bf16;
};

template <class Policy, int kTokens>
__device__ void write_sums(const SkinnySums<Policy, kTokens>& sums, const Product& p, const SkinnyOutput& out,
                           int64_t token0, int64_t n) {
    const Lane lane;
    const int tokens = (int)min(p.m - token0, (int64_t)kTokens);
#pragma unroll
    for (int i = 0; i < sums.kSums; i++) {
        const int token = i / 4 * 8 + 2 * lane.member + i % 2;
        const int64_t row = n + lane.group + i % 4 / 2 * 8;
        if (token >= tokens) continue;
        if (out.partial != nullptr) {
            out.partial[(blockIdx.z * p.m + token0 + token) * out.pitch + row] = sums.sum[i];
        } else if (row < p.w.n) {
            const float value = sums.sum[i] * Policy::kFactor * p.w.global_scale;
            const int64_t to = (token0 + token) * p.y_stride + row;
            if (out.to_bf16) ((bf16*)p.y)[to] = __float2bfloat16_rn(value);
            else ((float*)p.y)[to] = value;
        }
    }
}

// blockIdx.x: tile, blockIdx.y: block of kTokens rows, blockIdx.z: part.
template <class Policy, int kTokens>
__global__ void __launch_bounds__(kSkinnyThreads, 1)
    skinny_kernel(const Product p, const StageColumns<Policy, kTokens>* columns,
                  const SkinnyOutput out) {
    using Memory = SkinnyMemory<Policy, kTokens>;
    extern __shared__ char memory[];
    auto& s = *reinterpret_cast<Memory*>(memory + (1024 - shared_address(memory) % 1024) % 1024);
    let_next_start();
    const int warp = threadIdx.x / 32;
    const int stages = (int)((p.w.k + Memory::Stage::kColumns - 1) / Memory::Stage::kColumns);
    const auto row = [&] { return blockIdx.x * (int64_t)kSkinnyRows + warp * 16; };
    const int64_t group = blockIdx.x * (int64_t)kSkinnyRows / p.per_group;
    const Feed<Policy, kTokens> feed{s, columns + (group * gridDim.y + blockIdx.y) * stages, stages};
    const Strip strip{row(), 0, row() < p.w.n, (int)blockIdx.z, stages, (int)gridDim.z};
    Ring<Policy, Memory::kDepth> ring(p.w, s.slots[warp], strip);
    static_assert(Memory::kDepth >= kEarlyStages);
#pragma unroll 1
    for (int i = 0; i < kEarlyStages; i++) ring.fill();
    StageScales<Policy> scales(p.w, strip);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Memory::kSlots; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], kSkinnyWarps);
        }
        fence_barrier_init();
        wait_for_previous();
        for (int turn = 0; turn < Memory::kSlots; turn++) feed.load(turn);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = kEarlyStages; i < Memory::kDepth; i++) ring.fill();

    SkinnySums<Policy, kTokens> sums;
    const int own = strip.stages();
#pragma unroll 1
    for (int turn = 0; turn < own; turn++) {
        const auto& weights = *(const Slot<Policy>*)((const char*)s.slots[warp] + ring.oldest());
        const int slot = feed.slot(turn);
        barrier_wait(&s.full[slot], feed.parity(turn));
        sums.add(weights, s.x[slot], scales.of(turn));
        __syncwarp();
        ring.fill();
        if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[slot]);
        // One turn late, as one thread waits there for all warps to have read the slot.
        if (threadIdx.x == 0 && turn > 0) feed.load(turn - 1 + Memory::kSlots);
        __syncwarp();
    }
    wait_for_copies<0>();
    wait_for_previous();  // before results overwrite what an earlier kernel may still read
    write_sums(sums, p, out, blockIdx.y * (int64_t)kTokens, row());
}

// y = factor * the sum of `parts` partial results. A thread has four weight rows; blockIdx.y: activation row.
template <class Y>
__global__ void __launch_bounds__(128)
    sum_parts_kernel(const Product p, const SkinnyOutput out, int parts, float factor) {
    let_next_start();
    wait_for_previous();
    const int64_t n = (blockIdx.x * 128 + threadIdx.x) * 4;
    if (n >= p.w.n) return;
    constexpr int kBatch = 8;
    const float* from = out.partial + blockIdx.y * out.pitch + n;
    float total[4] = {};
    for (int base = 0; base < parts; base += kBatch) {
        float4 part[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; b++)
            if (base + b < parts) part[b] = *(const float4*)(from + (base + b) * p.m * out.pitch);
#pragma unroll
        for (int b = 0; b < kBatch; b++)
            if (base + b < parts)
                total[0] += part[b].x, total[1] += part[b].y, total[2] += part[b].z, total[3] += part[b].w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (n + i < p.w.n)
            ((Y*)p.y)[blockIdx.y * p.y_stride + n + i] = from_float<Y>(total[i] * factor * p.w.global_scale);
}

// ---------------------------------------------------------------- launches

// workspace: the activations in their order, then the partial results; see dsv4_skinny.
template <class Policy, int kTokens>
int launch_skinny(const Product& p, int64_t groups, int parts, bool to_bf16, void* workspace, void* stream) {
    using Memory = SkinnyMemory<Policy, kTokens>;
    using Stage = typename Memory::Stage;
    constexpr size_t kShared = sizeof(Memory) + 1024;
    const int64_t blocks = ceil_div(p.m, kTokens), tiles = ceil_div(p.w.n, kSkinnyRows);
    const int stages = (int)ceil_div(p.w.k, Stage::kColumns);
    auto* columns = (Stage*)(((uintptr_t)workspace + alignof(Stage) - 1) / alignof(Stage) * alignof(Stage));
    float* partial = parts > 1 ? (float*)(columns + groups * blocks * stages) : nullptr;
    const SkinnyOutput out = {partial, tiles * kSkinnyRows, to_bf16};
    auto kernel = skinny_kernel<Policy, kTokens>;
    int status = allow_shared(kernel, kShared);
    if (status == cudaSuccess)
        status = launch(place_columns_kernel<Policy, kTokens>,
                        dim3(ceil_div((int64_t)stages * Stage::kVectors * kTokens, 256), blocks, groups), 256, 0,
                        stream, p, stages, columns);
    if (status == cudaSuccess)
        status = launch(kernel, dim3(tiles, blocks, parts), kSkinnyThreads, kShared, stream, p,
                        (const Stage*)columns, out);
    if (status != cudaSuccess || parts == 1) return status;
    const dim3 grid(ceil_div(p.w.n, 512), p.m);
    const float factor = Policy::kFactor;
    return to_bf16 ? launch(sum_parts_kernel<bf16>, grid, 128, 0, stream, p, out, parts, factor)
                   : launch(sum_parts_kernel<float>, grid, 128, 0, stream, p, out, parts, factor);
}

}  // namespace dsv4
