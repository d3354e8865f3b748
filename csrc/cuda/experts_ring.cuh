// Experts of one token, and the shared expert of up to eight: weights through a ring of every warp (ring.cuh).
//
// A launch is one product. A tile is 16 weight rows; for the hidden vector, eight of w1 above the same
// eight of w3. A team of kWarps warps shares a tile's columns, every kWarps-th stage each, and goes over its
// share of all (expert, tile) items; where results are summed, a tile of all experts is one item. Every warp
// holds its own columns of the activations and waits for nobody; in the end the block adds up what its
// warps have. Blocks of the second product begin to fill their rings where those of the first have ended.
#pragma once

#include "experts.cuh"
#include "stage_products.cuh"

namespace dsv4 {

constexpr int kRingWarps = 8, kRingThreads = kRingWarps * 32;
constexpr int kRingDepth = 3, kRingResident = 2;  // stages of a ring; most blocks of a multiprocessor
constexpr int64_t kRingShared = 228 * 1024, kBlockShared = 1152;  // bytes; the latter: of a block besides

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
    // Row 0, and the distance of the others.
    __device__ const bf16* activations() const { return kGated ? m.x : m.hidden; }
};

// ---------------------------------------------------------------- weights

// The ring of one warp over the items of its team. `ids`: the experts, in shared memory.
template <class Policy, class Of> struct TeamRing {
    static constexpr int kWords = kScaleWords<Policy>;
    static constexpr uint32_t kBytes = kRingDepth * sizeof(Slot<Policy>);

    const Of& t;
    const int* ids;
    uint32_t to_codes, to_scales = 0, offset = 0;  // shared addresses in slot 0; the next slot
    // This thread's of the next stage: where the matrices begin, and how far behind. Apart, so that nothing
    // waits for the former before the copies do.
    const char *codes[2], *scales;
    uint32_t code_at, scale_at, code_pitch, scale_pitch;
    int left, slot, tile, e = 0, stage, lane = threadIdx.x % 32;  // left: items; slot: expert of the item

    __device__ TeamRing(const Of& t, Slot<Policy>* slots, const int* ids)
        : t(t), ids(ids), code_pitch((uint32_t)(Of::columns(t.m) / Policy::kChunk) * 16),
          scale_pitch((uint32_t)(Of::columns(t.m) / Policy::kChunk) * kWords / 2) {
        const int first = t.first_of(t.team);
        to_codes = shared_address(&slots->codes[lane / 8][Slot<Policy>::place(lane / 8, lane % 8)]);
        if constexpr (kWords > 0) to_scales = shared_address(slots->scales) + lane * kWords * 2;
        keep_in_register(to_codes);
        keep_in_register(to_scales);
        keep_in_register(lane);
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
            if constexpr (kWords > 0) copy_scales<kWords * 2>(to_scales + offset, scales + scale_at);
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
        const int expert = ids[Of::kTogether ? e : slot];
        codes[0] = (const char*)t.matrix(expert, 0).data;
        codes[1] = (const char*)t.matrix(expert, 1).data;
        code_at = (Of::row(tile, 0) + lane / 8) * code_pitch + stage * 128 + lane % 8 * 16;
        if constexpr (kWords > 0) {
            const int half = lane / 16, row = lane / 2 % 8;
            scales = (const char*)t.matrix(expert, half).scale;
            scale_at = (Of::row(tile, half) + row) * scale_pitch + (2 * stage + lane % 2) * kWords * 2;
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

// ---------------------------------------------------------------- a block

template <class Policy, class Of> struct RingBlock : Of {
    using Of::kGated, Of::kTogether, Of::kOutputs, Of::kTeams, Of::m, Of::experts, Of::tiles;
    static constexpr bool kBlocks = kFourBits<Policy>;
    using X = OwnColumns<Policy, kBlocks>;

    const int* ids;
    Slot<Policy>* slots;
    float* sums;  // [round][warp of the block][result][16]
    X x;          // a row a token, or an expert of the only one
    const int own = Of::own();
    float weight = 1;  // thread e: what the sums of expert e are multiplied by

    __host__ static int64_t bytes(const Moe& m, int blocks) {
        return kRingWarps * (kRingDepth * (int64_t)sizeof(Slot<Policy>) +
                             Of::held(m) * Of::own_of(m) * X::kStage * (int64_t)sizeof(uint4) +
                             Of::rounds(m, blocks) * Of::results(m) * 16 * (int64_t)sizeof(float));
    }
    __device__ RingBlock(const Moe& m, char* memory, const int* ids) : Of(m), ids(ids) {
        const int warp = threadIdx.x / 32, vectors = Of::own_of(m) * X::kStage;
        slots = (Slot<Policy>*)memory;
        auto* held = (uint4*)(slots + kRingWarps * kRingDepth);
        sums = (float*)(held + kRingWarps * Of::held(m) * vectors);
        slots += warp * kRingDepth;
        x = {held + warp * Of::held(m) * vectors, Of::held(m), vectors};
    }

    __device__ void run() {
        const int mine = this->first_of(this->team + 1) - this->first_of(this->team);
        TeamRing<Policy, Of> ring(*this, slots, ids);
        TurnScales<Policy, Of> scales(*this, ids);
        if (kTogether && threadIdx.x % 32 < experts) weight = m.table[ids[threadIdx.x % 32]].w2.global_scale;
        if (!kGated) {
            start(ring);
            wait_for_previous();
        }
        const int columns = (int)Of::columns(m);
        x.copy(this->activations(), columns, columns, this->warp, Of::kWarps);
        if (kGated) start(ring);  // loads queue up behind the copies of a block: the activations come first
        wait_for_copies<kGated ? kRingDepth : 0>();
        x.template settle<kBlocks && !kTogether ? 1 : kMostColumns>();
#pragma unroll 1
        for (int r = 0; r < mine; r++) {
            TileSums<Policy, kBlocks> tile;
            for (int e = 0; e < experts; e++) {
                tile.add(of_expert(ring, scales, e));
                scales.next();
            }
            tile.keep(sums + (r * kRingWarps + threadIdx.x / 32) * Of::results(m) * 16, Of::results(m));
        }
        wait_for_copies<0>();
        __syncthreads();
        finish();
    }
    __device__ static void start(TeamRing<Policy, Of>& ring) {
#pragma unroll 1
        for (int i = 0; i < kRingDepth; i++) ring.fill();
    }
    __device__ TileSums<Policy, kBlocks> of_expert(TeamRing<Policy, Of>& ring, const TurnScales<Policy, Of>& scales,
                                                   int e) const {
        Columns<Policy, kBlocks> columns(x, e, Of::results(m));
        TileSums<Policy, kBlocks> sums;
#pragma unroll 1
        for (int i = 0; i < own; i++) {
            const Piece<Policy> piece(*(const Slot<Policy>*)((const char*)slots + ring.oldest()), sums.lane);
            __syncwarp();
            ring.fill();
            columns.load(i);
            sums.add(piece, columns, scales.of(i, 0), scales.of(i, 1));
        }
        sums.restore(x, e, kTogether ? __shfl_sync(~0u, weight, e) : 1.0f);
        return sums;
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
        return total * product_factor<Policy, kBlocks>();
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
    __shared__ int ids[kMostColumns];
    if (Of::kGated) {
        prefetch_share(m.x, m.n * m.d * sizeof(bf16));
        prefetch_share(m.table, m.count * sizeof(Expert));
        prefetch_share(m.ids, m.ids == nullptr ? 0 : m.n * m.k * sizeof(int32_t));
        prefetch_share(m.routing, m.routing == nullptr ? 0 : m.n * m.k * sizeof(float));
        wait_for_previous();
    }
    if (threadIdx.x < m.k) ids[threadIdx.x] = m.expert_of(threadIdx.x);
    __syncthreads();
    // The second product may start only once the first one has waited: the ids are complete by then, and the
    // weights are copied before the hidden vectors are there.
    let_next_start();
    RingBlock<Policy, Of>(m, memory, ids).run();
}

// ---------------------------------------------------------------- launches

// One product; its blocks: as many as fit on all multiprocessors at once.
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
        if (m.n > 1 || m.k > kMostColumns) return kUnsupported;
        m.most = 1;
        // Many items: a smaller team has fewer ends of them.
        return ring_products<Policy, Product::kHidden, kRingWarps / 2, Product::kDownToken>(
            m, processors, stream);
    }
    if (m.n > (kFourBits<Policy> ? 1 : kMostColumns)) return kUnsupported;
    m.most = (int)m.n;
    return ring_products<Policy, Product::kHidden, kRingWarps, Product::kDown>(m, processors, stream);
}

}  // namespace dsv4
