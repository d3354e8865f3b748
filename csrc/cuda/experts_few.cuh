// Experts of few pairs: every weight row in use is streamed from memory once, at the memory's pace.
//
// A block is persistent and walks over its share of all (piece, row tile) items. Sixteen warps share the
// columns: a stage is 64 bytes of each of 32 weight rows a warp, 1024 bytes of a row in all. Every warp
// keeps a ring of stages of its own in shared memory, copied ahead of the products, so that nothing but
// the end of an item makes warps wait for one another. The activations of up to eight pairs lie in shared
// memory as the matrix unit wants them. Two more warps in turn add up the sixteen sums of an item and
// finish it, while the others go on.
//
// For the hidden vector, 16 rows of a tile are eight rows of w1 above the same eight of w3.
#pragma once

#include <type_traits>

#include "experts.cuh"
#include "halves.cuh"

namespace dsv4 {

constexpr int kMultipliers = 16, kFinishers = 2;  // warps
constexpr int kFewThreads = (kMultipliers + 4) * 32;  // whole warpgroups, for their registers
constexpr int kFewPairs = 8, kDepth = 3;             // of a piece; stages of a ring
constexpr int kPeaks = kFinishers + 2;               // pieces of which finishers may be behind
constexpr int kGroups = 2, kFewRows = 16 * kGroups;  // of a tile: 16-row products
constexpr int kSumStride = kFewRows + 4;             // floats from pair to pair

enum class Product { kHidden, kDown, kDownToken };  // the last: all experts of the only token

// NVFP4 is multiplied in fp16, which takes fewer instructions: e2m1 * 2^-14 * e4m3 is exact there, and
// activations are as halves.cuh says. The scales of MXFP4 have too wide a range.
template <class Policy> constexpr bool kInHalves = std::is_same_v<Policy, Nvfp4>;

template <class Policy> constexpr bool kRowScales = std::is_base_of_v<Fp4Chunk, Policy>;

// A warp's part of a stage.
template <class Policy> struct Stage {
    uint4 codes[2 * kGroups][32];  // [8 rows][lane]
    typename Policy::Scale scales[kRowScales<Policy> ? kFewRows : 1][4];  // of every chunk
};

struct FewShared {
    uint64_t summed[kFinishers], taken[kFinishers];
    uint32_t peaks[kPeaks][kFewPairs];  // bits of the largest finite activation of each pair
    float scales[kFewPairs];            // kDownToken: the global scales of the token's experts
};

// One kernel's view of its matrices.
template <class Policy, Product kProduct> struct Few {
    static constexpr bool kGated = kProduct == Product::kHidden;
    static constexpr bool kTogether = kProduct == Product::kDownToken;
    static constexpr int kOutputs = kGated ? kFewRows / 2 : kFewRows;  // rows of the result
    static constexpr float kFactor = kInHalves<Policy> ? HalfFp4::kFactor : Policy::kFactor;
    static constexpr int kVectors = Policy::kChunk / 8;  // 16 bytes of activations, a chunk
    static constexpr int kMostSplit = kInHalves<Policy> ? 2 : 0;  // pairs of a piece with split sums

    const Moe& m;
    FewShared& s;
    const int lanes = 4 * m.most;  // of a warp that have a pair
    uint4* x;                      // activations: [step][vector][lane]
    uint4* zeros;                  // [vector][lane], one of each vector for all other lanes
    float* sums;                   // [finisher][multiplier][column]
    Stage<Policy>* ring;           // [multiplier][kDepth]
    int rows, chunks, slices, tiles, experts;  // experts: of an item
    Items items;

    __device__ Few(const Moe& m, FewShared& s, char* memory)
        : m(m), s(s), x((uint4*)memory), rows(kGated ? m.inner : m.d),
          chunks((kGated ? m.d : m.inner) / Policy::kChunk), slices((chunks + 63) / 64),
          tiles((rows + kOutputs - 1) / kOutputs), experts(kTogether ? (int)m.k : 1),
          items((kTogether ? 1 : m.piece_count()) * tiles) {
        zeros = x + (chunks + 3) / 4 * kVectors * lanes;
        sums = (float*)(zeros + kVectors * lanes);
        ring = (Stage<Policy>*)(memory + fixed_bytes(chunks, m.most));
    }

    // All but the ring.
    __host__ __device__ static int fixed_bytes(int chunks, int most) {
        return ((chunks + 3) / 4 + 1) * kVectors * 4 * most * (int)sizeof(uint4) +
               kFinishers * kMultipliers * columns(most) * kSumStride * (int)sizeof(float);
    }
    // Of the products' second operand: a pair each, or each member of a quad beside a pair.
    __host__ __device__ static int columns(int most) { return kInHalves<Policy> ? 8 : most; }
    __device__ bool split(const Work& work) const {
        return kTogether ? kInHalves<Policy> : work.count <= kMostSplit;
    }
    __device__ float* sums_of(int buffer, int warp) const {
        return sums + (buffer * kMultipliers + warp) * columns(m.most) * kSumStride;
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
    // Rows of scales that do not start at a whole step are read where they are needed.
    __device__ bool scales_staged() const { return kRowScales<Policy> && chunks % 4 == 0; }

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

    // ---- the multiplying warps: copies

    using Scale = typename Policy::Scale;

    // The stage that is copied next, and this thread's part of it: 16 bytes of row lane.group of every
    // eight, and the scales of row lane.group + 8 * lane.member.
    struct Ahead {
        const Lane lane;
        int item, piece, tile, e = 0, slice = 0, own;  // own: slices in which this thread has a chunk
        int expert;
        const char *codes[2 * kGroups], *scales;

        __device__ explicit Ahead(const Few& few)
            : item(few.items.first), piece(item / few.tiles), tile(item % few.tiles),
              own(few.slices_of(lane.member)) {
            if (item < few.items.last) {
                expert = few.work_of(piece).expert;
                find(few);
            } else {
                own = 0;
            }
        }
        // The first stage of the current tile of the current expert.
        __device__ void find(const Few& few) {
            const Expert& expert = few.m.table[kTogether ? few.m.expert_of(e) : this->expert];
            const int warp = threadIdx.x / 32, row = lane.group + 8 * lane.member;
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++)
                codes[i] = (const char*)few.matrix(expert, 8 * i).data +
                           (few.weight_row(tile, lane.group + 8 * i) * few.chunks + warp * 4 +
                            lane.member) * 16;
            scales = (const char*)few.matrix(expert, row).scale +
                     (few.weight_row(tile, row) * few.chunks + warp * 4) * sizeof(Scale);
        }
        __device__ void skip(int chunks) {
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++) codes[i] += chunks * 16;
            scales += chunks * (int)sizeof(Scale);
        }
        __device__ void next(const Few& few) {
            if (++slice < few.slices) return skip(64);
            slice = 0;
            if (++e == few.experts) {
                e = 0, item++, tile++;
                if (item >= few.items.last) {
                    own = 0;
                    return;
                }
                if (!kTogether && (tile + 1) * kOutputs <= few.rows)  // no row is beyond the last
                    return skip(kOutputs * few.chunks - 64 * (few.slices - 1));
                if (tile == few.tiles) tile = 0, expert = few.work_of(++piece).expert;
            }
            find(few);
        }
    };

    // Of a row, as far as this warp has a chunk of them for member `member` of a quad.
    __device__ int slices_of(int member) const {
        return (chunks - (int)threadIdx.x / 32 * 4 - member + 63) / 64;
    }

    __device__ void copy(Ahead& ahead, Stage<Policy>& to) const {
        const bool valid = ahead.slice < ahead.own;
#pragma unroll
        for (int i = 0; i < 2 * kGroups; i++)
            copy_async(&to.codes[i][threadIdx.x % 32], ahead.codes[i], valid);
        if constexpr (kRowScales<Policy>)
            copy_small<4 * sizeof(Scale)>(to.scales[ahead.lane.group + 8 * ahead.lane.member],
                                          ahead.scales, valid && scales_staged());
        ahead.next(*this);
        copy_commit();
    }

    // ---- the multiplying warps: activations

    __device__ static void meet() { named_barrier(1, kMultipliers * 32); }

    __device__ const bf16* activations(const Work& work, int t) const {
        int pair = m.pair(work.first + t);
        return kGated ? m.x_of(pair) : m.hidden_of(pair);
    }

    // Where vector v of a chunk of pair t lies: the vectors of a chunk side by side if split, else those
    // that a warp reads together.
    __device__ int place_of_x(bool split, int chunk, int v, int t) const {
        const int lane = t * 4 + chunk % 4;
        return split ? (chunk / 4 * lanes + lane) * kVectors + v
                     : (chunk / 4 * kVectors + v) * lanes + lane;
    }

    // Activation rows of a piece, zeros behind the last column.
    __device__ void stage_x(const Work& work, uint32_t (&peaks)[kFewPairs]) const {
        meet();
        if constexpr (kInHalves<Policy>) find_peaks(work, peaks);
        if (threadIdx.x < kVectors * lanes) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
        if (kTogether && threadIdx.x < experts)
            s.scales[threadIdx.x] = expert(work, threadIdx.x).w2.global_scale;
        int units = (chunks + 3) / 4 * 4 * kVectors, present = chunks * kVectors;
        for (int t = 0; t < work.count; t++) {
            const bf16* from = activations(work, t);
#pragma unroll 2
            for (int u = threadIdx.x; u < units; u += kMultipliers * 32) {
                uint4 v = u < present ? *(const uint4*)(from + u * 8) : make_uint4(0, 0, 0, 0);
                x[place_of_x(split(work), u / kVectors, u % kVectors, t)] =
                    operand_order(v, peaks[t]);
            }
        }
        meet();
    }

    __device__ void find_peaks(const Work& work, uint32_t (&peaks)[kFewPairs]) const {
        if (threadIdx.x < kFewPairs) peaks[threadIdx.x] = 0;
        meet();
        for (int t = 0; t < work.count; t++) {
            const bf16* from = activations(work, t);
            uint32_t most = 0;
#pragma unroll 2
            for (int u = threadIdx.x; u < chunks * kVectors; u += kMultipliers * 32)
                most = max(most, largest_of(*(const uint4*)(from + u * 8)));
            most = __reduce_max_sync(~0u, most);
            if (threadIdx.x % 32 == 0) atomicMax(&peaks[t], most);
        }
        meet();
    }

    // Eight columns of a pair in the order of the products.
    __device__ static uint4 operand_order(const uint4& v, uint32_t peak) {
        if constexpr (kInHalves<Policy>) {
            return to_halves<true>(v, RowScale::exponent_of(peak));
        } else if constexpr (kRowScales<Policy>) {
            const uint4 twice[2] = {v, v};
            uint32_t b[Policy::kProducts][2];
            Policy::column(twice, b);
            return make_uint4(b[0][0], b[0][1], b[1][0], b[1][1]);
        } else {
            return v;
        }
    }

    // ---- the multiplying warps: products

    __device__ void multiply() const {
        Turn turn{ring + threadIdx.x / 32 * kDepth, 0};
        Ahead ahead(*this);
        for (int d = 0; d < kDepth - 1; d++) copy(ahead, turn.first[d]);
        if (!kGated) wait_for_previous();
        Work work;
        int known = -1, generation = 0;
        for_each_item([&](int piece, int tile, int number) {
            if (piece != known) {
                work = work_of(piece), known = piece;
                stage_x(work, s.peaks[generation++ % kPeaks]);
            }
            if constexpr (kInHalves<Policy>)
                if (split(work)) return multiply_item<true>(ahead, turn, tile, number, work);
            multiply_item<false>(ahead, turn, tile, number, work);
        });
        copy_wait<0>();
    }

    // A warp's ring: the stage that is multiplied next.
    struct Turn {
        Stage<Policy>* first;
        int now;
        __device__ Stage<Policy>& stage(int ahead) const {
            return first[now + ahead < kDepth ? now + ahead : now + ahead - kDepth];
        }
        __device__ void next() { now = now == kDepth - 1 ? 0 : now + 1; }
    };

    template <bool kSplit>
    __device__ void multiply_item(Ahead& ahead, Turn& turn, int tile, int number,
                                  const Work& work) const {
        const Lane lane;
        const int warp = threadIdx.x / 32, present = slices_of(0);
        const int step = kMultipliers * kVectors * lanes;
        float sum[kGroups][4] = {}, all[kGroups][4] = {};
        for (int e = 0; e < experts; e++) {
            const int column = kSplit ? lane.group % 2 : lane.group;
            const bool has = (!kSplit || lane.group / 2 == lane.member) &&
                             (kTogether ? column == (kSplit ? 0 : e) : column < work.count);
            const int t = kTogether ? e : column;
            const uint4* from = has ? x + place_of_x(kSplit, warp * 4 + lane.member, 0, t) : zeros;
            for (int slice = 0; slice < slices; slice++) {
                copy_wait<kDepth - 2>();
                __syncwarp();
                copy(ahead, turn.stage(kDepth - 1));
                if (slice < present)
                    multiply_stage<kSplit>(turn.stage(0), slice, tile, work, e, from, sum);
                from += has ? step : 0;
                turn.next();
            }
            if (kTogether && kSplit) add_expert(e, sum, all);
        }
        keep_sums<kSplit>(kTogether && kSplit ? all : sum, number, work.count);
    }

    // all += an expert's sums with its scales, and sums anew.
    __device__ void add_expert(int e, float (&sum)[kGroups][4], float (&all)[kGroups][4]) const {
        const int exponent = RowScale::exponent_of(s.peaks[0][e]);
        const float scale = s.scales[e];
#pragma unroll
        for (int i = 0; i < 4 * kGroups; i++) {
            float& value = sum[i / 4][i % 4];
            all[i / 4][i % 4] += RowScale::undo(value, exponent) * scale;
            value = 0;
        }
    }

    template <bool kSplit>
    __device__ void multiply_stage(const Stage<Policy>& stage, int slice, int tile,
                                   const Work& work, int e, const uint4* from,
                                   float (&sum)[kGroups][4]) const {
        const Lane lane;
        Scale scales[kGroups][2];
        if (scales_staged())
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++)
                scales[i / 2][i % 2] = stage.scales[lane.group + 8 * i][lane.member];
        else
#pragma unroll
            for (int i = 0; i < 2 * kGroups; i++) {
                // A tile's rows of one matrix have one block scale.
                const bool known = Policy::kBlockScale && i >= (kGated ? 2 : 1);
                scales[i / 2][i % 2] =
                    known ? scales[0][kGated ? i % 2 : 0]
                          : scale_of(matrix(expert(work, e), 8 * i),
                                     weight_row(tile, lane.group + 8 * i), slice);
            }
        uint4 b[kVectors];
#pragma unroll
        for (int v = 0; v < kVectors; v++) b[v] = from[kSplit ? v : v * lanes];
#pragma unroll
        for (int q = 0; q < kGroups; q++) {
            const uint4 codes[2] = {stage.codes[2 * q][threadIdx.x % 32],
                                    stage.codes[2 * q + 1][threadIdx.x % 32]};
            if constexpr (kSplit) multiply_split(codes, scales[q], b, sum[q]);
            else if constexpr (kInHalves<Policy>) multiply_halves(codes, scales[q], b, sum[q]);
            else multiply_codes(codes, scales[q], b, sum[q]);
        }
    }

    __device__ Scale scale_of(const dsv4_weight& w, int64_t row, int slice) const {
        const int first = slice * 64 + threadIdx.x / 32 * 4, chunk = first + threadIdx.x % 4;
        if (chunk >= chunks && !Policy::kBlockScale) return Scale{};
        return Policy::load_scale(Policy::scale_row(w, row), chunk < chunks ? chunk : first);
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
    // Column 2 m + t of the second operand has pair t's activations for the chunk of member m and zeros
    // for the others, so that a thread's sums are those of its own chunk, whose scales multiply them.
    __device__ static void multiply_split(const uint4 (&codes)[2], const Scale (&scales)[2],
                                          const uint4 (&b)[kVectors], float (&sum)[4]) {
        const uint32_t words[2][4] = {{codes[0].x, codes[0].y, codes[0].z, codes[0].w},
                                      {codes[1].x, codes[1].y, codes[1].z, codes[1].w}};
        const float2 both[2] = {Half<Policy>::scales(scales[0]), Half<Policy>::scales(scales[1])};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float part[4] = {};
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; i++) {
                uint32_t a[2][4];
                HalfFp4::operand(words[0][i], a[0]);
                HalfFp4::operand(words[1][i], a[1]);
                mma_half(part, a[0][0], a[1][0], a[0][1], a[1][1], b[i].x, b[i].y);
                mma_half(part, a[0][2], a[1][2], a[0][3], a[1][3], b[i].z, b[i].w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[i] += part[i] * (half == 0 ? both[i / 2].x : both[i / 2].y);
        }
    }

    __device__ static uint32_t multiply_halves(uint32_t a, uint32_t b) {
        uint32_t r;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
        return r;
    }

    // Leaves a warp's sums with the finisher of this item.
    template <bool kSplit>
    __device__ void keep_sums(const float (&sum)[kGroups][4], int number, int count) const {
        const int warp = threadIdx.x / 32, buffer = number % kFinishers;
        const Lane lane;
        barrier_wait(&s.taken[buffer], number / kFinishers % 2 ^ 1);
        float* to = sums_of(buffer, warp) + 2 * lane.member * kSumStride + lane.group;
#pragma unroll
        for (int p = 0; p < 2; p++)
            if (kSplit ? p < (kTogether ? 1 : count) : 2 * lane.member + p < count)
#pragma unroll
                for (int i = 0; i < 2 * kGroups; i++)
                    to[p * kSumStride + 8 * i] = sum[i / 2][i % 2 * 2 + p];
        barrier_arrive(&s.summed[buffer]);
    }

    // ---- the finishing warps

    __device__ void finish(int me) const {
        Work work;
        int known = -1, generation = -1;
        for_each_item([&](int piece, int tile, int number) {
            if (piece != known) work = work_of(piece), known = piece, generation++;
            if (number % kFinishers != me) return;
            const uint32_t(&peaks)[kFewPairs] = s.peaks[generation % kPeaks];
            barrier_wait(&s.summed[me], number / kFinishers % 2);
            int values = kTogether ? kOutputs : kOutputs * work.count;
            for (int i = threadIdx.x % 32; i < values; i += 32) {
                int64_t row = tile * kOutputs + i % kOutputs;
                if (row < rows) finish_value(work, me, row, i % kOutputs, i / kOutputs, peaks);
            }
            barrier_arrive(&s.taken[me]);
        });
    }

    // Of row `row` of a tile and a pair: all warps' sums, but for the global scale.
    __device__ float total(const Work& work, int buffer, int pair, int row,
                           const uint32_t (&peaks)[kFewPairs]) const {
        float total = 0;
        const float* from = sums_of(buffer, 0) + row;
        if (split(work)) {
#pragma unroll 4
            for (int w = 0; w < kMultipliers; w++)
#pragma unroll
                for (int member = 0; member < 4; member++)
                    total += from[(8 * w + 2 * member + pair) * kSumStride];
        } else {
#pragma unroll
            for (int w = 0; w < kMultipliers; w++)
                total += from[(columns(m.most) * w + pair) * kSumStride];
        }
        if (kInHalves<Policy> && !kTogether)
            total = RowScale::undo(total, RowScale::exponent_of(peaks[pair]));
        return total * kFactor;
    }

    __device__ void finish_value(const Work& work, int me, int64_t row, int at, int which,
                                 const uint32_t (&peaks)[kFewPairs]) const {
        if constexpr (kTogether) {
            float y = 0;
            if (kInHalves<Policy>) y = total(work, me, 0, at, peaks);
            else
                for (int e = 0; e < experts; e++)
                    y += total(work, me, e, at, peaks) * expert(work, e).w2.global_scale;
            m.y[row] = y;
        } else {
            const int64_t pair = m.pair(work.first + which);
            const Expert& e = expert(work, 0);
            if constexpr (kGated) {
                const int gate = at / 8 * 16 + at % 8;
                const float g = rounded(total(work, me, which, gate, peaks) * e.w1.global_scale);
                const float u = rounded(total(work, me, which, gate + 8, peaks) * e.w3.global_scale);
                m.hidden[pair * rows + row] =
                    __float2bfloat16_rn(swiglu(g, u, m.limit) * m.weight_of(pair));
            } else {
                m.partial[pair * rows + row] = total(work, me, which, at, peaks) * e.w2.global_scale;
            }
        }
    }
};

template <class Policy, Product kProduct>
__global__ void __launch_bounds__(kFewThreads, 1) few_kernel(const Moe m) {
    extern __shared__ __align__(128) char memory[];
    __shared__ FewShared s;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kFinishers; i++) {
            barrier_init(&s.summed[i], kMultipliers * 32);
            barrier_init(&s.taken[i], 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    // The second product may start only once the first one has waited: the list is complete by then, and
    // the weights are copied before the hidden vectors are there.
    if (kProduct == Product::kHidden) wait_for_previous();
    let_next_start();
    const Few<Policy, kProduct> few(m, s, memory);
    const int warp = threadIdx.x / 32;
    if (warp < kMultipliers) {
        more_registers<104>();
        few.multiply();
    } else {
        fewer_registers<64>();
        wait_for_previous();
        if (warp < kMultipliers + kFinishers) few.finish(warp - kMultipliers);
    }
}

// Shared memory of a block, beside FewShared.
template <class Policy, Product kProduct> int64_t few_bytes(const Moe& m) {
    const int64_t chunks = (kProduct == Product::kHidden ? m.d : m.inner) / Policy::kChunk;
    return Few<Policy, kProduct>::fixed_bytes((int)chunks, m.most) +
           kDepth * kMultipliers * (int64_t)sizeof(Stage<Policy>);
}

template <class Policy> bool few_fits(const Moe& m) {
    constexpr int64_t kRoom = 227 * 1024 - sizeof(FewShared);
    return m.d < 1 << 20 && m.inner < 1 << 20 && few_bytes<Policy, Product::kHidden>(m) <= kRoom &&
           few_bytes<Policy, Product::kDown>(m) <= kRoom;
}

template <class Policy, Product kProduct> int launch_few(const Moe& m, int blocks, void* stream) {
    auto kernel = few_kernel<Policy, kProduct>;
    const size_t shared = few_bytes<Policy, kProduct>(m);
    int status = allow_shared(kernel, shared);
    if (status != cudaSuccess) return status;
    return launch(kernel, blocks, kFewThreads, shared, stream, m);
}

}  // namespace dsv4
