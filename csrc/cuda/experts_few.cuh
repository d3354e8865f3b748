// Experts of few pairs: every weight row in use is streamed from memory once, at the memory's pace.
//
// A block is persistent and walks over its share of all (piece, row tile) items. One warp keeps a ring
// in shared memory filled by the copy engine: a stage holds 1024 bytes of each of 32 weight rows and
// their scales. Sixteen warps share the columns of a stage, 64 bytes of every row each, and multiply
// them with up to eight activation rows, which lie in shared memory as the matrix unit wants them. Two
// warps in turn add up the sixteen sums of an item and finish it, while the others go on.
//
// For the hidden vector, 16 rows of a tile are eight rows of w1 above the same eight of w3.
#pragma once

#include <type_traits>

#include "experts.cuh"
#include "gemv.cuh"

namespace dsv4 {

constexpr int kMultipliers = 16, kFinishers = 2;  // warps
constexpr int kFewThreads = (kMultipliers + kFinishers + 1) * 32;
constexpr int kFewPairs = 8, kMostStages = 12;
constexpr int kGroups = 2, kFewRows = 16 * kGroups;                  // of a tile: 16-row products
constexpr int kSlice = kMultipliers * 64, kRowStride = kSlice + 64;  // 64: rows on unlike banks
constexpr int kSumStride = kFewRows + 4;                             // floats from pair to pair

enum class Product { kHidden, kDown, kDownToken };  // the last: all experts of the only token

// NVFP4 is multiplied in fp16, which takes fewer instructions: e2m1 * 2^-14 * e4m3 is exact there, and
// activations are as gemv.cuh says. The scales of MXFP4 have too wide a range.
template <class Policy> constexpr bool kInHalves = std::is_same_v<Policy, Nvfp4>;

template <class Policy> constexpr bool kRowScales = std::is_base_of_v<Fp4Chunk, Policy>;

// Shared memory of one stage, and what the scales of a row take in it.
template <class Policy> struct Stage {
    static constexpr int kScales =
        kRowScales<Policy> ? kSlice / 16 * (int)sizeof(typename Policy::Scale) : 0;
    static constexpr int kScaleStride = kScales + 16;
    static constexpr int kBytes = kFewRows * (kRowStride + (kScales ? kScaleStride : 0));
};

struct FewShared {
    uint64_t full[kMostStages], empty[kMostStages], summed[kFinishers], taken[kFinishers];
    uint32_t peak[kFewPairs];  // bits of the largest finite activation of each pair
};

// One kernel's view of its matrices.
template <class Policy, Product kProduct> struct Few {
    static constexpr bool kGated = kProduct == Product::kHidden;
    static constexpr bool kTogether = kProduct == Product::kDownToken;
    static constexpr int kOutputs = kGated ? kFewRows / 2 : kFewRows;  // rows of the result
    static constexpr float kFactor = kInHalves<Policy> ? HalfFp4::kFactor : Policy::kFactor;
    static constexpr int kVectors = Policy::kChunk / 8;                // 16 bytes of activations, a chunk

    const Moe& m;
    FewShared& s;
    const int lanes = 4 * m.most;  // of a warp that have a pair
    uint4* x;                      // activations: [step][vector][lane]
    uint4* zeros;                  // [vector][lane], one of each vector for all other lanes
    float* sums;                   // [finisher][multiplier][pair]
    char* ring;                    // [stages]
    int stages, rows, chunks, slices, tiles, experts;  // experts: of an item
    Items items;

    __device__ Few(const Moe& m, FewShared& s, char* memory, int stages)
        : m(m), s(s), x((uint4*)memory), stages(stages), rows(kGated ? m.inner : m.d),
          chunks((kGated ? m.d : m.inner) / Policy::kChunk), slices((chunks + 63) / 64),
          tiles((rows + kOutputs - 1) / kOutputs), experts(kTogether ? (int)m.k : 1),
          items((kTogether ? 1 : m.piece_count()) * tiles) {
        zeros = x + (chunks + 3) / 4 * kVectors * lanes;
        sums = (float*)(zeros + kVectors * lanes);
        ring = memory + fixed_bytes(chunks, m.most);
    }

    // All but the ring.
    __host__ __device__ static int fixed_bytes(int chunks, int most) {
        return ((chunks + 3) / 4 + 1) * kVectors * 4 * most * (int)sizeof(uint4) +
               kFinishers * kMultipliers * most * kSumStride * (int)sizeof(float);
    }
    __device__ float* sums_of(int buffer, int warp) const {
        return sums + (buffer * kMultipliers + warp) * m.most * kSumStride;
    }

    __device__ const Expert& expert(const Work& work, int i) const {
        return m.table[kTogether ? m.expert_of(i) : work.expert];
    }
    __device__ const dsv4_weight& matrix(const Expert& e, int row) const {
        return kGated ? (row % 16 < 8 ? e.w1 : e.w3) : e.w2;
    }
    __device__ int64_t weight_row(int tile, int row) const {
        int r = tile * kOutputs + (kGated ? row / 16 * 8 + row % 8 : row);
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

    // ---- the copying warp: a lane copies a row and its scales

    __device__ void copy() const {
        static_assert(kFewRows == 32);
        constexpr int kScale = sizeof(typename Policy::Scale);
        const int row = threadIdx.x % 32;
        const bool staged = scales_staged();
        Turn turn;
        Work work;
        int known = -1;
        for_each_item([&](int piece, int tile, int) {
            if (piece != known) work = work_of(piece), known = piece;
            for (int e = 0; e < experts; e++) {
                const dsv4_weight& w = matrix(expert(work, e), row);
                const int64_t at = weight_row(tile, row) * chunks;
                const char *codes = (const char*)w.data + at * 16,
                           *scales = (const char*)w.scale + at * kScale;
                for (int first = 0; first < chunks; first += 64, turn.next(stages)) {
                    const int count = min(64, chunks - first);
                    char* stage = ring + turn.stage * Stage<Policy>::kBytes;
                    uint64_t* full = &s.full[turn.stage];
                    barrier_wait(&s.empty[turn.stage], turn.parity ^ 1);
                    if (row == 0)
                        barrier_expect(full, kFewRows * count * (16 + (staged ? kScale : 0)));
                    __syncwarp();
                    bulk_load(stage + row * kRowStride, codes + first * 16, count * 16, full);
                    if (staged)
                        bulk_load(stage + kFewRows * kRowStride + row * Stage<Policy>::kScaleStride,
                                  scales + first * kScale, count * kScale, full);
                }
            }
        });
    }

    // ---- the multiplying warps

    __device__ static void meet() { named_barrier(1, kMultipliers * 32); }

    __device__ const bf16* activations(const Work& work, int t) const {
        int pair = m.pair(work.first + t);
        return kGated ? m.x_of(pair) : m.hidden_of(pair);
    }

    // Activation rows of a piece, zeros behind the last column.
    __device__ void stage_x(const Work& work) const {
        meet();
        if constexpr (kInHalves<Policy>) find_peaks(work);
        if (threadIdx.x < kVectors * lanes) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
        int units = (chunks + 3) / 4 * 4 * kVectors, present = chunks * kVectors;
        for (int t = 0; t < work.count; t++) {
            const bf16* from = activations(work, t);
#pragma unroll 4
            for (int u = threadIdx.x; u < units; u += kMultipliers * 32) {
                int chunk = u / kVectors, at = chunk / 4 * kVectors + u % kVectors;
                uint4 v = u < present ? *(const uint4*)(from + u * 8) : make_uint4(0, 0, 0, 0);
                x[at * lanes + t * 4 + chunk % 4] = operand_order(v, t);
            }
        }
        meet();
    }

    __device__ void find_peaks(const Work& work) const {
        if (threadIdx.x < kFewPairs) s.peak[threadIdx.x] = 0;
        meet();
        for (int t = 0; t < work.count; t++) {
            const bf16* from = activations(work, t);
            uint32_t most = 0;
#pragma unroll 4
            for (int u = threadIdx.x; u < chunks * kVectors; u += kMultipliers * 32)
                most = max(most, largest_of(*(const uint4*)(from + u * 8)));
            most = __reduce_max_sync(~0u, most);
            if (threadIdx.x % 32 == 0) atomicMax(&s.peak[t], most);
        }
        meet();
    }

    // Eight columns of pair t in the order of the products.
    __device__ uint4 operand_order(const uint4& v, int t) const {
        if constexpr (kInHalves<Policy>) {
            return to_halves<true>(v, HalfRows::exponent_of(s.peak[t]));
        } else if constexpr (kRowScales<Policy>) {
            const uint4 twice[2] = {v, v};
            uint32_t b[Policy::kProducts][2];
            Policy::column(twice, b);
            return make_uint4(b[0][0], b[0][1], b[1][0], b[1][1]);
        } else {
            return v;
        }
    }

    using Scale = typename Policy::Scale;

    // Where a thread finds its part of every stage, and its activations of the first step.
    struct Place {
        Lane lane;
        int warp = threadIdx.x / 32;
        int codes = lane.group * kRowStride + (warp * 4 + lane.member) * 16;
        int scales = kFewRows * kRowStride + lane.group * Stage<Policy>::kScaleStride +
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
            float sum[kGroups][4] = {};
            for (int e = 0; e < experts; e++) {
                bool mine = kTogether ? place.lane.group == e : place.lane.group < work.count;
                const uint4* from = mine ? x + place.warp * kVectors * lanes + threadIdx.x % 32 : zeros;
                for (int slice = 0; slice < slices; slice++, turn.next(stages)) {
                    multiply_stage(place, turn, slice, tile, expert(work, e), from, sum);
                    from += mine ? kMultipliers * kVectors * lanes : 0;
                }
            }
            keep_sums(sum, number, work.count);
        });
    }

    __device__ void multiply_stage(const Place& place, const Turn& turn, int slice, int tile,
                                   const Expert& e, const uint4* from,
                                   float (&sum)[kGroups][4]) const {
        const int first = slice * 64 + place.warp * 4, chunk = first + place.lane.member;
        const bool valid = chunk < chunks, staged = scales_staged();
        const char* stage = ring + turn.stage * Stage<Policy>::kBytes;
        uint4 codes[kGroups][2];
        Scale scales[kGroups][2] = {};
        if (!staged && first < chunks)
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++) {
                const auto* row = Policy::scale_row(matrix(e, 8 * i),
                                                    weight_row(tile, place.lane.group + 8 * i));
                if (valid || Policy::kBlockScale)
                    scales[i / 2][i % 2] = Policy::load_scale(row, valid ? chunk : first);
            }
        barrier_wait(&s.full[turn.stage], turn.parity);
#pragma unroll
        for (int i = 0; i < 2 * kGroups; i++) {
            codes[i / 2][i % 2] = valid ? *(const uint4*)(stage + place.codes + i * 8 * kRowStride)
                                        : make_uint4(0, 0, 0, 0);
            if (staged && valid)
                scales[i / 2][i % 2] = *(const Scale*)(stage + place.scales +
                                                       i * 8 * Stage<Policy>::kScaleStride);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&s.empty[turn.stage]);
        if (first >= chunks) return;
        uint4 b[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; v++) b[v] = from[v * lanes];
#pragma unroll
        for (int q = 0; q < kGroups; q++) {
            if constexpr (kInHalves<Policy>) multiply_halves(codes[q], scales[q], b, sum[q]);
            else multiply_codes(codes[q], scales[q], b, sum[q]);
        }
    }

    __device__ static void multiply_codes(const uint4 (&codes)[2], const Scale (&scales)[2],
                                          const uint4 (&b)[kVectors], float (&sum)[4]) {
        float part[4] = {};
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

    __device__ static void multiply_halves(const uint4 (&codes)[2], const uint16_t (&scales)[2],
                                           const uint4 (&b)[kVectors], float (&sum)[4]) {
        uint32_t factors[2][2];  // [row][half of the chunk]
        const uint32_t words[2][4] = {{codes[0].x, codes[0].y, codes[0].z, codes[0].w},
                                      {codes[1].x, codes[1].y, codes[1].z, codes[1].w}};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t both = e4m3_halves(scales[h]);
            factors[h][0] = select_bytes(both, both, 0x1010);
            factors[h][1] = select_bytes(both, both, 0x3232);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                HalfFp4::operand(words[h][i], a[h]);
#pragma unroll
                for (int j = 0; j < 4; j++) a[h][j] = multiply_halves(a[h][j], factors[h][i / 2]);
            }
            mma_half(sum, a[0][0], a[1][0], a[0][1], a[1][1], b[i].x, b[i].y);
            mma_half(sum, a[0][2], a[1][2], a[0][3], a[1][3], b[i].z, b[i].w);
        }
    }
    __device__ static uint32_t multiply_halves(uint32_t a, uint32_t b) {
        uint32_t r;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }

    // Leaves a warp's sums with the finisher of this item.
    __device__ void keep_sums(const float (&sum)[kGroups][4], int number, int count) const {
        const int warp = threadIdx.x / 32, buffer = number % kFinishers;
        const Lane lane;
        barrier_wait(&s.taken[buffer], number / kFinishers % 2 ^ 1);
        float* to = sums_of(buffer, warp);
#pragma unroll
        for (int i = 0; i < 4 * kGroups; i++) {
            int pair = 2 * lane.member + i % 2, row = lane.group + i / 2 * 8;
            if (pair >= count) continue;
            float value = sum[i / 4][i % 4];
            if (kInHalves<Policy>)
                value = HalfRows::undo(value, HalfRows::exponent_of(s.peak[pair]));
            to[pair * kSumStride + row] = value;
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
            total += sums_of(buffer, w)[pair * kSumStride + row];
        return total;
    }

    __device__ void finish_value(const Work& work, int me, int64_t row, int at, int which) const {
        if constexpr (kTogether) {
            float y = 0;
            for (int e = 0; e < experts; e++)
                y += total(me, e, at) * kFactor * expert(work, e).w2.global_scale;
            m.y[row] = y;
        } else {
            int64_t pair = m.pair(work.first + which);
            const Expert& e = expert(work, 0);
            if constexpr (kGated) {
                const int gate = at / 8 * 16 + at % 8;
                m.hidden[pair * rows + row] = __float2bfloat16_rn(
                    hidden_value(e, kFactor, total(me, which, gate),
                                 total(me, which, gate + 8), m.limit, m.weight_of(pair)));
            } else
                m.partial[pair * rows + row] =
                    total(me, which, at) * kFactor * e.w2.global_scale;
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
    int fixed = Few<Policy, kProduct>::fixed_bytes(chunks, m.most);
    int stages = (kRoom - fixed) / Stage<Policy>::kBytes;
    if (chunks > 64 * 1024 || stages < 2) return kUnsupported;
    stages = stages < kMostStages ? stages : kMostStages;
    size_t shared = fixed + stages * Stage<Policy>::kBytes;
    int status = allow_shared(few_kernel<Policy, kProduct>, shared);
    if (status != cudaSuccess) return status;
    return launch(few_kernel<Policy, kProduct>, blocks, kFewThreads, shared, stream, m, stages);
}

}  // namespace dsv4
