// Experts of few pairs: every weight row in use is streamed from memory once, at the memory's pace.
//
// A block is persistent and walks over its share of all (piece, row tile) items. One warp keeps a ring
// in shared memory filled by the copy engine: a stage holds 1024 bytes of each of 16 weight rows and
// their scales. Sixteen warps share the columns of a stage, 64 bytes of every row each, and multiply
// them with up to eight activation rows, which lie in shared memory as the matrix unit wants them. Two
// warps in turn add up the sixteen sums of an item and finish it, while the others go on.
//
// For the hidden vector, a tile is eight rows of w1 above the same eight of w3.
#pragma once

#include <type_traits>

#include "experts.cuh"
#include "stream.cuh"

namespace dsv4 {

constexpr int kMultipliers = 16, kFinishers = 2;  // warps
constexpr int kFewThreads = (kMultipliers + kFinishers + 1) * 32;
constexpr int kFewPairs = 8, kMostStages = 12;
constexpr int kSlice = kMultipliers * 64, kRowStride = kSlice + 64;  // 64: rows on unlike banks
constexpr int kSumStride = 20;                                       // floats from pair to pair

enum class Product { kHidden, kDown, kDownToken };  // the last: all experts of the only token

template <class Policy> constexpr bool kRowScales = std::is_base_of_v<Fp4Chunk, Policy>;

// Shared memory of one stage, and what the scales of a row take in it.
template <class Policy> struct Stage {
    static constexpr int kScales =
        kRowScales<Policy> ? kSlice / 16 * (int)sizeof(typename Policy::Scale) : 0;
    static constexpr int kScaleStride = kScales + 16;
    static constexpr int kBytes = 16 * (kRowStride + (kScales ? kScaleStride : 0));
};

struct FewShared {
    uint64_t full[kMostStages], empty[kMostStages], summed[kFinishers], taken[kFinishers];
    float sums[kFinishers][kMultipliers][kFewPairs * kSumStride];
};

// One kernel's view of its matrices. Rows of a tile: 0 ... 15.
template <class Policy, Product kProduct> struct Few {
    static constexpr bool kGated = kProduct == Product::kHidden;
    static constexpr bool kTogether = kProduct == Product::kDownToken;
    static constexpr int kOutputs = kGated ? 8 : 16;          // rows of the result
    static constexpr int kVectors = Policy::kChunk / 8;        // 16 bytes of activations, a chunk

    const Moe& m;
    FewShared& s;
    uint4* x;      // activations: [step][vector][lane]
    uint4* zeros;  // [vector][lane], the first of each vector for all lanes without a pair
    char* ring;    // [stages]
    int stages, rows, chunks, slices, tiles, experts;  // experts: of an item
    Items items;

    __device__ Few(const Moe& m, FewShared& s, char* memory, int stages)
        : m(m), s(s), x((uint4*)memory), stages(stages), rows(kGated ? m.inner : m.d),
          chunks((kGated ? m.d : m.inner) / Policy::kChunk), slices((chunks + 63) / 64),
          tiles((rows + kOutputs - 1) / kOutputs), experts(kTogether ? (int)m.k : 1),
          items((kTogether ? 1 : m.piece_count()) * tiles) {
        ring = memory + x_bytes(chunks);
        zeros = (uint4*)ring - kVectors * 32;
    }

    // Activations and zeros.
    __host__ __device__ static size_t x_bytes(int chunks) {
        return ((chunks + 3) / 4 + 1) * (size_t)kVectors * 32 * sizeof(uint4);
    }

    __device__ const Expert& expert(const Work& work, int i) const {
        return m.table[kTogether ? m.expert_of(i) : work.expert];
    }
    __device__ const dsv4_weight& matrix(const Expert& e, int row) const {
        return kGated ? (row < 8 ? e.w1 : e.w3) : e.w2;
    }
    __device__ int64_t weight_row(int tile, int row) const {
        int r = tile * kOutputs + (kGated ? row % 8 : row);
        return r < rows ? r : rows - 1;
    }
    // Rows of scales that the copy engine cannot take are read where they are needed.
    __device__ bool scales_staged() const {
        return kRowScales<Policy> && chunks * sizeof(typename Policy::Scale) % 16 == 0;
    }

    // body(piece, tile, number) for each item of this block.
    template <class Body> __device__ void for_each_item(Body body) const {
        int piece = items.first / tiles, tile = items.first % tiles;
        for (int i = items.first; i < items.last; i++) {
            body(piece, tile, i - items.first);
            if (++tile == tiles) tile = 0, piece++;
        }
    }
    __device__ Work work_of(int piece) const {
        return kTogether ? Work{0, 0, (int)m.k} : m.work_of(piece);
    }

    // ---- the copying warp: lane r copies row r's codes, lane 16 + r its scales

    __device__ void copy() const {
        const int lane = threadIdx.x % 32, row = lane % 16;
        const bool scales = lane >= 16, staged = scales_staged();
        const int unit = scales ? (int)sizeof(typename Policy::Scale) : 16;  // bytes of a chunk
        Turn turn;
        Work work;
        int known = -1;
        for_each_item([&](int piece, int tile, int) {
            if (piece != known) work = work_of(piece), known = piece;
            for (int e = 0; e < experts; e++) {
                const dsv4_weight& w = matrix(expert(work, e), row);
                const char* from = (const char*)(scales ? w.scale : w.data) +
                                   weight_row(tile, row) * chunks * unit;
                for (int slice = 0; slice < slices; slice++, turn.next(stages)) {
                    int count = min(64, chunks - slice * 64);
                    char* to = ring + turn.stage * Stage<Policy>::kBytes +
                               (scales ? 16 * kRowStride + row * Stage<Policy>::kScaleStride
                                       : row * kRowStride);
                    barrier_wait(&s.empty[turn.stage], turn.parity ^ 1);
                    if (lane == 0) {
                        int each = 16 + (staged ? (int)sizeof(typename Policy::Scale) : 0);
                        barrier_expect(&s.full[turn.stage], 16 * count * each);
                    }
                    __syncwarp();
                    if (!scales || staged)
                        bulk_load(to, from + slice * 64 * unit, count * unit, &s.full[turn.stage]);
                }
            }
        });
    }

    // ---- the multiplying warps

    // Activation rows of a piece, zeros behind the last column.
    __device__ void stage_x(const Work& work) const {
        named_barrier(1, kMultipliers * 32);
        if (threadIdx.x < kVectors * 32) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
        int units = (chunks + 3) / 4 * 4 * kVectors, present = chunks * kVectors;
        for (int t = 0; t < work.count; t++) {
            int pair = m.pair(work.first + t);
            const bf16* from = kGated ? m.x_of(pair) : m.hidden_of(pair);
#pragma unroll 4
            for (int u = threadIdx.x; u < units; u += kMultipliers * 32) {
                int chunk = u / kVectors, at = chunk / 4 * kVectors + u % kVectors;
                uint4 v = u < present ? *(const uint4*)(from + u * 8) : make_uint4(0, 0, 0, 0);
                x[at * 32 + t * 4 + chunk % 4] = operand_order(v);
            }
        }
        named_barrier(1, kMultipliers * 32);
    }

    // Eight columns in the order of the products that Policy::operand makes.
    __device__ static uint4 operand_order(const uint4& v) {
        if constexpr (!kRowScales<Policy>) return v;
        else {
            const uint4 twice[2] = {v, v};
            uint32_t b[Policy::kProducts][2];
            Policy::column(twice, b);
            return make_uint4(b[0][0], b[0][1], b[1][0], b[1][1]);
        }
    }

    using Scale = typename Policy::Scale;

    // Where a thread finds its part of every stage, and its activations of the first step.
    struct Place {
        Lane lane;
        int warp = threadIdx.x / 32;
        int codes = lane.group * kRowStride + (warp * 4 + lane.member) * 16;
        int scales = 16 * kRowStride + lane.group * Stage<Policy>::kScaleStride +
                     (warp * 4 + lane.member) * (int)sizeof(Scale);
    };

    __device__ void multiply() const {
        const Place place;
        Turn turn;
        Work work;
        int known = -1;
        for_each_item([&](int piece, int tile, int number) {
            if (piece != known) {
                work = work_of(piece), known = piece;
                stage_x(work);
            }
            float sum[4] = {};
            for (int e = 0; e < experts; e++) {
                bool mine = kTogether ? place.lane.group == e : place.lane.group < work.count;
                const uint4* from = mine ? x + place.warp * kVectors * 32 + threadIdx.x % 32 : zeros;
                for (int slice = 0; slice < slices; slice++, turn.next(stages)) {
                    multiply_stage(place, turn, slice, tile, expert(work, e), from, sum);
                    from += mine ? kMultipliers * kVectors * 32 : 0;
                }
            }
            keep_sums(sum, number, work.count);
        });
    }

    __device__ void multiply_stage(const Place& place, const Turn& turn, int slice, int tile,
                                   const Expert& e, const uint4* from, float (&sum)[4]) const {
        const int first = slice * 64 + place.warp * 4, chunk = first + place.lane.member;
        const bool valid = chunk < chunks, staged = scales_staged();
        const char* stage = ring + turn.stage * Stage<Policy>::kBytes;
        uint4 codes[2];
        Scale scales[2] = {};
        if (!staged && first < chunks)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const auto* row = Policy::scale_row(matrix(e, 8 * h),
                                                    weight_row(tile, place.lane.group + 8 * h));
                if (valid || Policy::kBlockScale)
                    scales[h] = Policy::load_scale(row, valid ? chunk : first);
            }
        barrier_wait(&s.full[turn.stage], turn.parity);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            codes[h] = valid ? *(const uint4*)(stage + place.codes + h * 8 * kRowStride)
                             : make_uint4(0, 0, 0, 0);
            if (staged && valid)
                scales[h] = *(const Scale*)(stage + place.scales +
                                            h * 8 * Stage<Policy>::kScaleStride);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[turn.stage]);
        if (first < chunks) multiply_codes(codes, scales, from, sum);
    }

    __device__ static void multiply_codes(const uint4 (&codes)[2], const Scale (&scales)[2],
                                          const uint4* from, float (&sum)[4]) {
        float part[4] = {};
        uint4 b[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; v++) b[v] = from[v * 32];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[2][Policy::kProducts][2];
#pragma unroll
            for (int h = 0; h < 2; h++)
                Policy::operand(half == 0 ? make_uint2(codes[h].x, codes[h].y)
                                          : make_uint2(codes[h].z, codes[h].w),
                                scales[h], half, a[h]);
#pragma unroll
            for (int j = 0; j < Policy::kProducts; j++) {
                int p = half * Policy::kProducts + j;
                const uint4& v = b[p / 2];
                mma(Policy::kBlockScale ? part : sum, a[0][j][0], a[1][j][0], a[0][j][1],
                    a[1][j][1], p % 2 ? v.z : v.x, p % 2 ? v.w : v.y);
            }
        }
        if constexpr (Policy::kBlockScale)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += part[i] * scales[i / 2];
    }

    // Leaves a warp's sums with the finisher of this item.
    __device__ void keep_sums(const float (&sum)[4], int number, int count) const {
        const int warp = threadIdx.x / 32, buffer = number % kFinishers;
        const Lane lane;
        barrier_wait(&s.taken[buffer], number / kFinishers % 2 ^ 1);
        float* to = s.sums[buffer][warp];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int pair = 2 * lane.member + i % 2;
            if (pair < count) to[pair * kSumStride + lane.group + i / 2 * 8] = sum[i];
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&s.summed[buffer]);
    }

    // ---- the finishing warps

    __device__ void finish(int me) const {
        Work work;
        int known = -1;
        for_each_item([&](int piece, int tile, int number) {
            if (number % kFinishers != me) return;
            if (piece != known) work = work_of(piece), known = piece;
            barrier_wait(&s.summed[me], number / kFinishers % 2);
            int values = kTogether ? kOutputs : kOutputs * work.count;
            for (int i = threadIdx.x % 32; i < values; i += 32) {
                int64_t row = tile * kOutputs + i % kOutputs;
                if (row < rows) finish_value(work, me, row, i % kOutputs, i / kOutputs);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(&s.taken[me]);
        });
    }

    __device__ float total(int buffer, int pair, int row) const {
        float total = 0;
#pragma unroll
        for (int w = 0; w < kMultipliers; w++)
            total += s.sums[buffer][w][pair * kSumStride + row];
        return total;
    }

    __device__ void finish_value(const Work& work, int me, int64_t row, int at, int which) const {
        if constexpr (kTogether) {
            float y = 0;
            for (int e = 0; e < experts; e++)
                y += total(me, e, at) * Policy::kFactor * expert(work, e).w2.global_scale;
            m.y[row] = y;
        } else {
            int64_t pair = m.pair(work.first + which);
            const Expert& e = expert(work, 0);
            if constexpr (kGated)
                m.hidden[pair * rows + row] = __float2bfloat16_rn(
                    hidden_value(e, Policy::kFactor, total(me, which, at), total(me, which, at + 8),
                                 m.limit, m.weight_of(pair)));
            else
                m.partial[pair * rows + row] =
                    total(me, which, at) * Policy::kFactor * e.w2.global_scale;
        }
    }
};

template <class Policy, Product kProduct>
__global__ void __launch_bounds__(kFewThreads, 1) few_kernel(const Moe m, int stages) {
    extern __shared__ __align__(128) char memory[];
    __shared__ FewShared s;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], kMultipliers);
        }
        for (int i = 0; i < kFinishers; i++) {
            barrier_init(&s.summed[i], kMultipliers);
            barrier_init(&s.taken[i], 1);
        }
        fence_barrier_init();
    }
    __syncthreads();
    // The next product starts only once this one has waited, so the list is complete by then, and the
    // weights may be copied before the hidden vectors are.
    const bool copies = warp == kMultipliers + kFinishers;
    if (!copies || kProduct == Product::kHidden) wait_for_previous();
    let_next_start();
    const Few<Policy, kProduct> few(m, s, memory, stages);
    if (copies) few.copy();
    else if (warp < kMultipliers) few.multiply();
    else few.finish(warp - kMultipliers);
}

// As many stages as fit; kUnsupported where two do not.
template <class Policy, Product kProduct> int launch_few(const Moe& m, int blocks, void* stream) {
    constexpr bool kGated = kProduct == Product::kHidden;
    constexpr int kRoom = 227 * 1024 - (int)sizeof(FewShared);
    int chunks = (int)((kGated ? m.d : m.inner) / Policy::kChunk);
    int64_t x = Few<Policy, kProduct>::x_bytes(chunks);
    int64_t stages = x < kRoom ? (kRoom - x) / Stage<Policy>::kBytes : 0;
    if (stages < 2) return kUnsupported;
    stages = stages < kMostStages ? stages : kMostStages;
    size_t shared = x + stages * Stage<Policy>::kBytes;
    int status = allow_shared(few_kernel<Policy, kProduct>, shared);
    if (status != cudaSuccess) return status;
    return launch(few_kernel<Policy, kProduct>, blocks, kFewThreads, shared, stream, m, (int)stages);
}

}  // namespace dsv4
