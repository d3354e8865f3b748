// Experts of one token, and the shared expert of up to eight: weights through a ring of every warp (ring.cuh).
//
// A launch is one product. A tile is 16 weight rows; for the hidden vector, eight of w1 above the same
// eight of w3. A team of kWarps warps shares a tile's columns, every kWarps-th stage each, and goes over its
// share of all (expert, tile) items; where results are summed, a tile of all experts is one item. Every warp
// holds its own columns of the activations and waits for nobody; in the end the block adds up what its
// warps have. Blocks of the second product begin to fill their rings where those of the first have ended.
//
// Scales of 4-bit blocks multiply sums: a step of the matrix unit has eight blocks of a row, and each has
// one of the eight columns of the second operand to itself. FP8 and bf16 have a column for each token.
#pragma once

#include "experts.cuh"
#include "ring.cuh"

namespace dsv4 {

constexpr int kRingWarps = 8, kRingThreads = kRingWarps * 32;
constexpr int kRingDepth = 3, kRingResident = 2;  // stages of a ring; most blocks of a multiprocessor
constexpr int kRingRows = 8;  // most tokens of the shared expert, and experts of the only token
constexpr int64_t kRingShared = 228 * 1024, kBlockShared = 1152;  // bytes; the latter: of a block besides

template <class Policy> constexpr bool kScaledColumns = kScaleWords<Policy> > 0;
// What the elements of the first operand are too small by.
template <class Policy> constexpr float kRingFactor = Half<Policy>::kFactor;
template <> inline constexpr float kRingFactor<Bf16> = 1;

// ---------------------------------------------------------------- the work of a team

template <class Policy, Product kProduct, int kTeamWarps> struct Team {
    static constexpr bool kGated = kProduct == Product::kHidden;
    static constexpr bool kTogether = kProduct == Product::kDownToken;  // all experts are one item
    static constexpr int kWarps = kTeamWarps, kTeams = kRingWarps / kWarps;  // of a block
    static constexpr int kOutputs = kGated ? 8 : 16;                         // rows of the result, a tile
    const Moe& m;
    int tiles, stages, experts, total;  // of a matrix; of a row; of an item; items
    int team, warp;                     // of this block; of the team

    __host__ __device__ static int64_t rows(const Moe& m) { return kGated ? m.inner : m.d; }
    __host__ __device__ static int64_t columns(const Moe& m) { return kGated ? m.d : m.inner; }
    __host__ __device__ static int stages_of(const Moe& m) {
        return (int)(columns(m) / Policy::kChunk / kStageChunks);
    }
    // Stages of a row that a warp has, at most.
    __host__ __device__ static int own_of(const Moe& m) {
        return (stages_of(m) + kWarps - 1) / kWarps;
    }
    __host__ __device__ static int total_of(const Moe& m) {
        return (int)(rows(m) / kOutputs) * (kTogether || m.ids == nullptr ? 1 : (int)m.k);
    }
    // Activation rows that a warp holds; results for a weight row.
    __host__ __device__ static int held(const Moe& m) { return kTogether ? (int)m.k : m.most; }
    __host__ __device__ static int results(const Moe& m) { return kTogether ? 1 : m.most; }
    // The most items of a team.
    __host__ __device__ static int rounds(const Moe& m, int blocks) {
        return (total_of(m) + blocks * kTeams - 1) / (blocks * kTeams);
    }

    __device__ explicit Team(const Moe& m)
        : m(m), tiles((int)(rows(m) / kOutputs)), stages(stages_of(m)),
          experts(kTogether ? (int)m.k : 1), total(total_of(m)), team(threadIdx.x / 32 / kWarps),
          warp(threadIdx.x / 32 % kWarps) {}

    // The first item of a team of this block; that of the team behind the last is the end.
    __device__ int first_of(int team) const {
        return (uint32_t)total * (blockIdx.x * kTeams + team) / (gridDim.x * kTeams);
    }
    __device__ int own() const { return stages > warp ? (stages - warp + kWarps - 1) / kWarps : 0; }
    // The matrix of the upper (0) or lower eight rows of a tile, and where they begin in it.
    __device__ const dsv4_weight& matrix(int expert, int half) const {
        const Expert& all = m.table[expert];
        return kGated ? (half == 0 ? all.w1 : all.w3) : all.w2;
    }
    __device__ static int row(int tile, int half) { return tile * kOutputs + (kGated ? 0 : half * 8); }
    __device__ const bf16* activations(int pair) const {
        return kGated ? m.x_of(pair) : m.hidden_of(pair);
    }
};

// ---------------------------------------------------------------- weights

// The ring of one warp over the items of its team. `ids`: the experts, in shared memory.
template <class Policy, class Of> struct TeamRing {
    static constexpr int kWords = kScaleWords<Policy>;
    static constexpr int kScaleHalves = kWords == 4 ? 2 : 1;  // that a thread copies a word of
    static constexpr uint32_t kBytes = kRingDepth * sizeof(Slot<Policy>);

    const Of& t;
    const int* ids;
    uint32_t to_codes, to_scales = 0, offset = 0;  // shared addresses in slot 0; the next slot
    // This thread's of the next stage: where the matrices begin, and how far behind. Apart, so that nothing
    // waits for the former before the copies do.
    const char *codes[2], *scales[2];
    uint32_t code_at, scale_at, code_pitch, scale_pitch;
    int left, slot, tile, e = 0, stage;  // left: items; slot: expert of the item

    __device__ TeamRing(const Of& t, Slot<Policy>* slots, const int* ids)
        : t(t), ids(ids), code_pitch((uint32_t)(Of::columns(t.m) / Policy::kChunk) * 16),
          scale_pitch((uint32_t)(Of::columns(t.m) / Policy::kChunk) * kWords / 2) {
        const int lane = threadIdx.x % 32, first = t.first_of(t.team);
        to_codes = shared_address(&slots->codes[lane / 8][Slot<Policy>::place(lane / 8, lane % 8)]);
        if constexpr (kWords > 0) to_scales = shared_address(&slots->scales[lane]);
        left = t.own() > 0 ? t.first_of(t.team + 1) - first : 0;
        slot = first / t.tiles, tile = first % t.tiles, stage = t.warp;
        if (left > 0) find();
    }

    // Starts the copies of the next stage, if there is one, into the next slot.
    __device__ void fill() {
        if (left > 0) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = Of::kGated ? j % 2 * 4 : j * 4;
                asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                                 to_codes + offset + j * 512),
                             "l"(advanced(codes[j / 2] + code_at, code_pitch, row))
                             : "memory");
            }
            if constexpr (kWords > 0)
#pragma unroll
                for (int h = 0; h < kScaleHalves; h++)
                    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                                     to_scales + offset + h * 128),
                                 "l"(advanced(scales[h] + scale_at, scale_pitch, Of::kGated ? 0 : h * 8))
                                 : "memory");
            go();
        }
        commit_copies();
        offset = offset + sizeof(Slot<Policy>) == kBytes ? 0 : offset + sizeof(Slot<Policy>);
    }

    // Waits for the oldest stage, and returns where its slot begins after slot 0; then fill() may reuse
    // it after a __syncwarp().
    __device__ uint32_t oldest() const {
        wait_for_copies<kRingDepth - 1>();
        __syncwarp();
        return offset;
    }

  private:
    __device__ void go() {
        stage += Of::kWarps;
        if (stage < t.stages) {
            code_at += Of::kWarps * 128;
            scale_at += Of::kWarps * kWords * 4;
            return;
        }
        stage = t.warp;
        if (++e == t.experts) {
            e = 0, left--;
            if (++tile == t.tiles) tile = 0, slot++;
        }
        if (left > 0) find();
    }
    // The first stage of the tile.
    __device__ void find() {
        const int lane = threadIdx.x % 32, expert = ids[Of::kTogether ? e : slot];
        codes[0] = (const char*)t.matrix(expert, 0).data;
        codes[1] = (const char*)t.matrix(expert, 1).data;
        code_at = (Of::row(tile, 0) + lane / 8) * code_pitch + stage * 128 + lane % 8 * 16;
        if constexpr (kWords > 0) {
            const int row = lane / kWords;  // of a half, or of both
            scales[0] = (const char*)t.matrix(expert, row / 8).scale;
            if constexpr (kScaleHalves == 2) scales[1] = (const char*)t.matrix(expert, 1).scale;
            scale_at = (Of::row(tile, 0) + (Of::kGated ? row % 8 : row)) * scale_pitch +
                       (stage * kWords + lane % kWords) * 4;
        }
    }
};

// Where a block of 128 x 128 has a scale: each thread holds that of one of the warp's stages, in the
// upper or the lower half of a tile, for this and the next turn; a turn is an expert of an item.
template <class Policy, class Of> struct TurnScales {
    static constexpr int kMost = 16;  // stages of a warp
    const Of& t;
    const int* ids;
    float now = 1, later = 1;
    int turn = 0, turns = 0;

    __device__ TurnScales(const Of& t, const int* ids) : t(t), ids(ids) {
        if constexpr (Policy::kBlockScale) {
            turns = (t.first_of(t.team + 1) - t.first_of(t.team)) * t.experts;
            now = load(0), later = load(1);
        }
    }
    __device__ float load(int turn) const {
        const int lane = threadIdx.x % 32, h = lane / kMost;
        const int stage = t.warp + lane % kMost * Of::kWarps;
        if (turn >= turns || stage >= t.stages) return 0;
        const int item = t.first_of(t.team) + turn / t.experts;
        const dsv4_weight& w = t.matrix(ids[Of::kTogether ? turn % t.experts : item / t.tiles], h);
        return Policy::load_scale(Policy::scale_row(w, Of::row(item % t.tiles, h)), stage * kStageChunks);
    }
    // Of the warp's i-th stage.
    __device__ float of(int i, int h) const {
        if constexpr (Policy::kBlockScale) return __shfl_sync(~0u, now, h * kMost + i);
        else return 1;
    }
    __device__ void next() {
        if constexpr (Policy::kBlockScale) {
            now = later;
            later = load(++turn + 1);
        }
    }
};

// ---------------------------------------------------------------- activations

// A warp's columns of activation rows in shared memory, by its stages: fp16 times a power of two for each
// row and stage (gemv.cuh), or bf16 where the weights are.
template <class Policy> struct OwnRows {
    static constexpr bool kHalf = !std::is_same_v<Policy, Bf16>;
    static constexpr int kVectors = Policy::kChunk / 8;  // of eight columns, in a chunk
    static constexpr int kStage = kStageChunks * kVectors;
    uint4* at;        // [stage][row][place]
    float2* factors;  // [stage][row]: both undo the power of two
    int rows;         // of a stage, of which some may hold nothing

    // In the order in which threads read them, so that no two that read together share a bank.
    __device__ static int place(int row, int v) {
        const int chunk = v / kVectors, inner = v % kVectors, member = chunk / 2, step = chunk % 2;
        if (kScaledColumns<Policy>)
            return step * 16 + inner % 2 * 8 + inner / 2 * 4 + member;
        return (step * 4 * kVectors + inner * 4 + member) ^ row % 2 * 4;
    }

    // The warp's `own` stages of `count` rows, row_of(0) and on: every step-th from `first` on. Calls
    // between() once the first loads are under way. kSide: loads of a thread side by side in as many rows.
    template <int kSide, class RowOf, class Between>
    __device__ void fill(int count, int own, int first, int step, RowOf row_of, Between between) const {
        constexpr int kAtOnce = kSide < 4 ? 4 : kSide;
        constexpr int kAcross = 32 / kStage, kStages = kAtOnce / kSide * kAcross;
        const int lane = threadIdx.x % 32, v = lane % kStage;
        const bf16* from[kSide];
#pragma unroll
        for (int r = 0; r < kSide; r++)
            from[r] = row_of(r < count ? r : 0) + (first * kStage + v) * 8;
#pragma unroll 1
        for (int done = 0; done == 0 || done < own; done += kStages) {
            const int base = done + lane / kStage;
            uint4 now[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; j++) {
                const int r = j % kSide, i = base + j / kSide * kAcross;
                now[j] = r < count && i < own ? *(const uint4*)(from[r] + i * step * kStage * 8)
                                              : make_uint4(0, 0, 0, 0);
            }
            if (done == 0) between();
            __syncwarp();  // what lies there is no longer used
#pragma unroll
            for (int j = 0; j < kAtOnce; j++) {
                const int r = j % kSide, i = base + j / kSide * kAcross;
                keep(i * rows + r, r, v, now[j], r < count && i < own);
            }
        }
        __syncwarp();
    }
    __device__ void keep(int unit, int r, int v, const uint4& x, bool valid) const {
        int exponent = 0;
        if constexpr (kHalf) {
            uint32_t most = largest_of(x);
#pragma unroll
            for (int j = 1; j < kStage; j *= 2) most = max(most, __shfl_xor_sync(~0u, most, j));
            exponent = RowScale::exponent_of(most);
        }
        if (!valid) return;
        at[unit * kStage + place(r, v)] = stored(x, exponent);
        if (v == 0)
            factors[unit] = make_float2(RowScale::power(-(exponent / 2)),
                                        RowScale::power(-(exponent - exponent / 2)));
    }
    __device__ static uint4 stored(const uint4& v, int exponent) {
        if constexpr (kHalf) return to_halves<Half<Policy>::kPermuted>(v, exponent);
        else return v;
    }
};

// ---------------------------------------------------------------- products

// 16 bytes from shared memory where `mine`, else zeros.
__device__ inline uint4 load_own(uint32_t address, bool mine) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile(
        "{\n.reg .pred mine;\nsetp.ne.s32 mine, %5, 0;\n"
        "@mine ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "r"(address), "r"((int)mine));
    return v;
}

// Sums of a tile. Without the format's factor and global scales.
template <class Policy, bool = kScaledColumns<Policy>> struct TeamSums;

// 4-bit codes, one activation row. Column 2 m + p of the second operand is half p of member m's chunk: the
// sum in it is right in the products of halves p only, and is not used in others.
template <class Policy> struct TeamSums<Policy, true> {
    Lane lane;
    float sum[2] = {};  // [row / 8], over this member's chunks

    // x: row `row`, in the warp's i-th stage; `weight` multiplies the stage's sums.
    __device__ void add(const Piece<Policy>& piece, const OwnRows<Policy>& x, int i, int row, int,
                        float, float, float weight) {
        const int unit = i * x.rows + row;
        const bool mine = lane.group / 2 == lane.member;
        const uint32_t from = shared_address(x.at) +
                              (unit * x.kStage + lane.group % 2 * 4 + lane.member) * 16;
        float part[2] = {};
#pragma unroll
        for (int s = 0; s < 2; s++) {
            float c[2][4] = {};
            const uint4 &low = piece.codes[s][0], &high = piece.codes[s][1];
            const uint32_t words[2][4] = {{low.x, low.y, low.z, low.w},
                                          {high.x, high.y, high.z, high.w}};
            const uint4 b[2] = {load_own(from + s * 256, mine), load_own(from + s * 256 + 128, mine)};
#pragma unroll
            for (int q = 0; q < 4; q++) {
                uint32_t a[2][4];
                Half<Policy>::operand(words[0][q], a[0]);
                Half<Policy>::operand(words[1][q], a[1]);
                mma_half(c[q / 2], a[0][0], a[1][0], a[0][1], a[1][1], b[q % 2].x, b[q % 2].y);
                mma_half(c[q / 2], a[0][2], a[1][2], a[0][3], a[1][3], b[q % 2].z, b[q % 2].w);
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float2 scales = piece.scale(s, h);
                part[h] += c[0][2 * h] * scales.x;
                part[h] += c[1][2 * h + 1] * scales.y;
            }
        }
        const float2 factor = x.factors[unit];
#pragma unroll
        for (int h = 0; h < 2; h++) sum[h] += part[h] * factor.x * factor.y * weight;
    }
    // Writes the sums to `to` [16]. One warp.
    __device__ void keep(float* to, int) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
            if (lane.member == 0) to[lane.group + h * 8] = sum[h];
        }
    }
};

// FP8 and bf16: column t of the second operand is pair t.
template <class Policy> struct TeamSums<Policy, false> {
    Lane lane;
    float sum[4] = {};

    // x: `pairs` rows from `row` on, in the warp's i-th stage. upper, lower: scales of the tile's halves.
    __device__ void add(const Piece<Policy>& piece, const OwnRows<Policy>& x, int i, int row, int pairs,
                        float upper, float lower, float weight) {
        constexpr int kVectors = OwnRows<Policy>::kVectors;
        const bool mine = lane.group < pairs;
        const int r = row + (mine ? lane.group : 0), unit = i * x.rows + row;
        const uint32_t from = shared_address(x.at) + (i * x.rows + r) * x.kStage * 16;
        float c[2][4] = {};  // one a step
#pragma unroll
        for (int j = 0; j < 2 * kVectors; j++) {
            const int s = j / kVectors, v = j % kVectors;
            const uint4 &low = piece.codes[s][0], &high = piece.codes[s][1];
            const uint4 b = load_own(from + ((4 * j + lane.member) ^ r % 2 * 4) * 16, mine);
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
        for (int j = 0; j < 4; j++) {
            const float part = (c[0][j] + c[1][j]) * (j < 2 ? upper : lower);
            const int column = 2 * lane.member + j % 2;
            const float2 factor = x.factors[unit + (column < pairs ? column : 0)];
            sum[j] += part * factor.x * factor.y * weight;
        }
    }
    __device__ void keep(float* to, int pairs) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = 2 * lane.member + i % 2;
            if (column < pairs) to[column * 16 + lane.group + i / 2 * 8] = sum[i];
        }
    }
};

// ---------------------------------------------------------------- a block

template <class Policy, class Of> struct RingBlock : Of {
    using Of::kGated, Of::kTogether, Of::kOutputs, Of::kTeams, Of::m, Of::experts, Of::tiles;
    static constexpr int kHeldBytes = OwnRows<Policy>::kStage * sizeof(uint4) + sizeof(float2);

    const int* ids;
    Slot<Policy>* slots;
    float* sums;  // [round][warp of the block][result][16]
    OwnRows<Policy> x;
    const int own = Of::own();

    __host__ static int64_t bytes(const Moe& m, int blocks) {
        return kRingWarps * (kRingDepth * (int64_t)sizeof(Slot<Policy>) +
                             Of::own_of(m) * Of::held(m) * (int64_t)kHeldBytes +
                             Of::rounds(m, blocks) * Of::results(m) * 16 * (int64_t)sizeof(float));
    }
    __device__ RingBlock(const Moe& m, char* memory, const int* ids) : Of(m), ids(ids) {
        const int warp = threadIdx.x / 32, units = Of::own_of(m) * Of::held(m);
        slots = (Slot<Policy>*)memory;
        auto* vectors = (uint4*)(slots + kRingWarps * kRingDepth);
        auto* factors = (float2*)(vectors + kRingWarps * units * x.kStage);
        sums = (float*)(factors + kRingWarps * units);
        slots += warp * kRingDepth;
        x = {vectors + warp * units * x.kStage, factors + warp * units, Of::held(m)};
    }

    // ready(): what the activations need is there.
    template <class Ready> __device__ void run(Ready ready) {
        const int first = this->first_of(this->team);
        const int mine = this->first_of(this->team + 1) - first;
        TeamRing<Policy, Of> ring(*this, slots, ids);
        TurnScales<Policy, Of> scales(*this, ids);
        const auto start = [&] {
#pragma unroll 1
            for (int i = 0; i < kRingDepth; i++) ring.fill();
        };
        if (!kGated) start();
        ready();
        // Loads queue up behind the copies of a block: those of the activations come first.
        if (kGated) stage_x(start);
        else if (mine > 0) stage_x([] {});
#pragma unroll 1
        for (int r = 0; r < mine; r++) {
            TeamSums<Policy> of;
            for (int e = 0; e < experts; e++) {
                const float weight = kTogether ? m.table[ids[e]].w2.global_scale : 1.0f;
#pragma unroll 1
                for (int i = 0; i < own; i++) {
                    const auto* stage = (const Slot<Policy>*)((const char*)slots + ring.oldest());
                    const Piece<Policy> piece(*stage, of.lane);
                    __syncwarp();
                    ring.fill();
                    of.add(piece, x, i, e, Of::results(m), scales.of(i, 0), scales.of(i, 1), weight);
                }
                scales.next();
            }
            of.keep(sums + (r * kRingWarps + threadIdx.x / 32) * Of::results(m) * 16, Of::results(m));
        }
        wait_for_copies<0>();
        __syncthreads();
        finish();
    }

    template <class Between> __device__ void stage_x(Between between) const {
        const auto row_of = [&](int r) { return this->activations(r); };
        if constexpr (kTogether || !kScaledColumns<Policy>) {
            if (Of::held(m) > 1)
                return x.template fill<kRingRows>(Of::held(m), own, this->warp, Of::kWarps, row_of, between);
        }
        x.template fill<1>(1, own, this->warp, Of::kWarps, row_of, between);
    }

    // Adds up what all warps have, and writes the results. All threads.
    __device__ void finish() const {
        const int results = Of::results(m), rounds = Of::rounds(m, gridDim.x);
        for (int i = threadIdx.x; i < rounds * kTeams * results * kOutputs; i += kRingThreads) {
            const int row = i % kOutputs, t = i / kOutputs % results, at = i / kOutputs / results;
            const int team = at % kTeams, r = at / kTeams, item = this->first_of(team) + r;
            if (item >= this->first_of(team + 1)) continue;
            const float* of = sums + ((r * kRingWarps + team * Of::kWarps) * results + t) * 16 + row;
            write(item / tiles, t, (int64_t)(item % tiles) * kOutputs + row, total(of),
                  kGated ? total(of + 8) : 0);
        }
    }
    __device__ float total(const float* of) const {
        float total = 0;
#pragma unroll
        for (int w = 0; w < Of::kWarps; w++) total += of[w * Of::results(m) * 16];
        return total * kRingFactor<Policy>;
    }
    __device__ void write(int slot, int t, int64_t row, float sum, float other) const {
        const Expert& e = m.table[ids[slot]];
        const int64_t pair = slot + t;
        if constexpr (kGated)
            m.hidden[pair * m.inner + row] = __float2bfloat16_rn(
                swiglu(rounded(sum * e.w1.global_scale), rounded(other * e.w3.global_scale), m.limit) *
                m.weight_of(pair));
        else m.y[pair * m.d + row] = kTogether ? sum : sum * e.w2.global_scale;
    }
};

template <class Policy, class Of>
__global__ void __launch_bounds__(kRingThreads, 2) ring_kernel(const __grid_constant__ Moe m) {
    extern __shared__ __align__(128) char memory[];
    __shared__ int ids[kRingRows];
    if (Of::kGated) wait_for_previous();
    if (threadIdx.x < m.k) ids[threadIdx.x] = m.expert_of(threadIdx.x);
    __syncthreads();
    // The second product may start only once the first one has waited: the ids are complete by then, and the
    // weights are copied before the hidden vectors are there.
    let_next_start();
    RingBlock<Policy, Of>(m, memory, ids).run([] {
        if (!Of::kGated) wait_for_previous();
    });
}

// ---------------------------------------------------------------- launches

// One product; its blocks: as many as fit on all multiprocessors at once, or one each.
template <class Policy, class Of> struct RingLaunch {
    int blocks;
    int64_t bytes;

    RingLaunch(const Moe& m, int processors) {
        // The shared expert runs beside the gate, and two of its blocks would leave that no registers.
        for (int resident = m.ids == nullptr ? 1 : kRingResident; resident > 0; resident--) {
            blocks = resident * processors;
            bytes = RingBlock<Policy, Of>::bytes(m, blocks);
            if (resident * (bytes + kBlockShared) <= kRingShared) return;
        }
        blocks = 0;
    }
    int run(const Moe& m, void* stream) const {
        const auto kernel = ring_kernel<Policy, Of>;
        const int status = allow_shared(kernel, bytes);
        return status == cudaSuccess ? launch(kernel, blocks, kRingThreads, bytes, stream, m) : status;
    }
};

template <class Policy, Product kFirst, int kFirstWarps, Product kSecond>
int ring_products(const Moe& m, int processors, void* stream) {
    const RingLaunch<Policy, Team<Policy, kFirst, kFirstWarps>> first(m, processors);
    const RingLaunch<Policy, Team<Policy, kSecond, kRingWarps>> second(m, processors);
    if (first.blocks == 0 || second.blocks == 0) return kUnsupported;
    const int status = first.run(m, stream);
    return status == cudaSuccess ? second.run(m, stream) : status;
}

// Both products. kUnsupported for more tokens or experts, and for sizes that are no whole stages or have no
// room: a warp has at most TurnScales::kMost stages of a row.
template <class Policy> int by_rings(Moe m, int processors, void* stream) {
    constexpr int kStage = Policy::kChunk * kStageChunks;
    if (m.d % kStage || m.inner % kStage || m.d > 1 << 13 || m.inner > 1 << 13) return kUnsupported;
    if (m.ids != nullptr) {
        if (m.n > 1 || m.k > kRingRows) return kUnsupported;
        m.most = 1;
        // Many items: a smaller team has fewer ends of them.
        return ring_products<Policy, Product::kHidden, kRingWarps / 2, Product::kDownToken>(
            m, processors, stream);
    }
    if (m.n > (kScaledColumns<Policy> ? 1 : kRingRows)) return kUnsupported;
    m.most = (int)m.n;
    return ring_products<Policy, Product::kHidden, kRingWarps, Product::kDown>(m, processors, stream);
}

}  // namespace dsv4
