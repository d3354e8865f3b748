// Experts of many pairs, 4-bit formats: tiles of 256 weight rows times up to kMostPairs pairs of one
// expert, on the tensor cores' asynchronous products.
//
// A block is persistent. Four producing warps copy a step (256 columns, or 128) of codes, scales and
// gathered activation rows into a ring in shared memory. The consuming warps decode their weight rows into
// registers and multiply them with the activations in shared memory; while some words of eight codes are
// being multiplied, the next ones are decoded. NVFP4 is multiplied in fp16, which takes fewer instructions to
// decode.
//
// A thread decodes the 32 columns of its own 16 bytes, so the four threads of a quad bring columns from
// four different places to a product. The activations are held in that order: place_of. For the hidden
// vector, a warp's 16 rows are eight of w1 above the same eight of w3.
#pragma once

#include "experts_columns.cuh"
#include "wgmma.cuh"

namespace dsv4 {

constexpr int kManyRows = 256;

// An 8 x 8 matrix of 16-bit values, two of a row in each thread: transposed.
__device__ inline uint32_t transposed(uint32_t pair) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(pair));
    return r;
}

// Whether weights are multiplied in fp16 (experts_columns.cuh).
template <class Policy> constexpr bool kInFp16 = std::is_same_v<Policy, Nvfp4>;

// kTiles: 64-row products of a consuming warpgroup.
template <class Policy, bool kGated, int kMostPairs, int kTiles> struct Many {
    static constexpr int kConsumers = kManyRows / 64 / kTiles * 128;
    static constexpr int kProducers = 128;
    static constexpr int kThreads = kConsumers + kProducers;
    static constexpr bool kHalves = kInFp16<Policy>;
    static constexpr int kColumns = kTiles == 1 ? 256 : 128;   // of a step
    static constexpr int kUnits = kColumns / 32;               // of 16 bytes, of a row of codes
    using Scale = typename Policy::Scale;
    using Operand = ManyOperand<Policy, kHalves>;
    struct alignas(1024) Stage {
        bf16 x[kColumns / 64][kMostPairs][64];  // swizzled
        uint4 codes[kManyRows][kUnits];         // at unit_of
        Scale scales[kManyRows][kUnits];
    };
    static constexpr int kStages = 220 * 1024 / sizeof(Stage) < 8 ? 220 * 1024 / sizeof(Stage) : 8;
    // What the consumers need of an item besides its products.
    struct alignas(16) Item {
        float weights[kMostPairs], factors[2];  // of the pairs; of the sums of gate and up, or of down
        float undo[kMostPairs];                 // of the activations' powers of two
        int pairs[kMostPairs], count;
    };
    static constexpr int kItems = kStages + 2;  // producers are ahead by one step or more an item
    struct Shared {
        Stage stages[kStages];
        uint64_t full[kStages], empty[kStages];
        Item items[kItems];
        uint32_t sources[kMostPairs];  // where activation rows of the producers' item begin, in 16 bytes
    };
    static constexpr int kOutputs = kGated ? kManyRows / 2 : kManyRows;  // rows of the result
    static constexpr int kRowsAtOnce = kProducers / kUnits;  // of a tile, that the producers copy
    static constexpr int kRowsApart = kGated ? kRowsAtOnce / 2 : kRowsAtOnce;  // the same in the matrix

    const Moe& m;
    Shared& s;
    const bf16* x;  // with columns in places
    int columns, rows, steps, tiles, total;

    __device__ Many(const Moe& m, const bf16* x, Shared& s)
        : m(m), s(s), x(x), columns(kGated ? m.d : m.inner), rows(kGated ? m.inner : m.d),
          steps(columns / kColumns), tiles(rows / kOutputs), total(m.piece_count() * tiles) {}

    // The matrix row that lies in row r of a tile. Rows of the hidden vector are exchanged so that a
    // thread's two are neighbours by place_of.
    __device__ int64_t weight_row(int tile, int r) const {
        if (!kGated) return tile * kOutputs + r;
        return tile * kOutputs + r / 16 * 8 + r % 8 / 2 + r % 2 * 4;
    }
    __device__ const dsv4_weight& matrix(const Work& work, int r) const {
        const Expert& e = m.table[work.expert];
        return kGated ? (r % 16 < 8 ? e.w1 : e.w3) : e.w2;
    }

    // Rows of 128 bytes would otherwise share their banks with their neighbours.
    __device__ static int unit_of(int row, int unit) { return kUnits == 8 ? unit ^ row % 2 * 4 : unit; }

    // ---- producers

    __device__ void produce() const {
        const int thread = threadIdx.x - kConsumers;
        Turn turn;
        Facts next;
        for (int part = 0; part < 3; part++) look_up(next, blockIdx.x, part, thread);
        for (int item = blockIdx.x, slot = 0; item < total; item += gridDim.x) {
            const Facts now = next;
            announce(now, s.items[slot], thread);
            slot = slot == kItems - 1 ? 0 : slot + 1;
            for (int step = 0; step < steps; step++, turn.next(kStages)) {
                Stage& stage = s.stages[turn.stage];
                barrier_wait(&s.empty[turn.stage], turn.parity ^ 1);
                copy_weights(stage, now, step, thread);
                copy_x(stage, now.work.count, step, thread);
                copy_arrive(&s.full[turn.stage]);
                if (thread == 0) barrier_arrive(&s.full[turn.stage]);  // for what was announced
                for (int part = 0; part < 3; part++)
                    if (step == part * steps / 3) look_up(next, item + gridDim.x, part, thread);
            }
        }
        copy_commit();
        copy_wait<0>();
    }

    // What a producing thread has to know of an item: the piece, one of its pairs, its own weight rows.
    struct Facts {
        Work work;
        int pair;
        float weight, factor, undo;
        const char* codes;
        const Scale* scales;
    };

    __device__ void copy_weights(Stage& stage, const Facts& facts, int step, int thread) const {
        const int r = thread / kUnits, unit = thread % kUnits;  // of rows r, r + kRowsAtOnce, ...
        const uint32_t pitch = kRowsApart * (columns / 2);
        const uint32_t scale_pitch = kUnits * kRowsApart * (columns / Policy::kChunk) * sizeof(Scale);
        const char* codes = facts.codes + step * (kColumns / 2);
        const char* scales = (const char*)(facts.scales + step * kUnits);
#pragma unroll
        for (int i = 0; i < kManyRows / kRowsAtOnce; i++)
            copy_async(&stage.codes[r + kRowsAtOnce * i][unit_of(r, unit)], codes + (uint64_t)pitch * i,
                       true);
#pragma unroll
        for (int i = 0; i < kManyRows / kProducers; i++)
            copy_small<kUnits * sizeof(Scale)>(stage.scales[r + kRowsAtOnce * (unit + kUnits * i)],
                                               scales + (uint64_t)scale_pitch * i);
    }

    // In three parts, each of which needs what the one before has loaded; none waits for its loads.
    __device__ void look_up(Facts& facts, int item, int part, int thread) const {
        if (item >= total) return;
        if (part == 0) {
            facts.work = m.work_of(item / tiles);
        } else if (part == 1) {
            const int r = thread / kUnits, unit = thread % kUnits;
            const dsv4_weight& w = matrix(facts.work, r);
            const int64_t row = weight_row(item % tiles, r);
            facts.codes = (const char*)w.data + row * (columns / 2) + unit * 16;
            facts.scales = Policy::scale_row(w, row + unit * kRowsApart);
            facts.factor = matrix(facts.work, thread % 2 * 8).global_scale;
            facts.pair = thread < facts.work.count ? m.pair(facts.work.first + thread) : 0;
        } else {
            if (kGated) facts.weight = m.weight_of(facts.pair);
            if (kHalves) facts.undo = m.undo[kGated ? facts.pair / (int)m.k : facts.pair];
        }
    }

    __device__ void announce(const Facts& facts, Item& item, int thread) const {
        named_barrier(1, kProducers);  // the sources of the item before are no longer used
        if (thread < facts.work.count) {
            item.pairs[thread] = facts.pair;
            s.sources[thread] = (kGated ? facts.pair / (int)m.k : facts.pair) * (uint32_t)(columns / 8);
            if (kGated) item.weights[thread] = facts.weight;
            if (kHalves) item.undo[thread] = facts.undo;
        }
        if (thread < 2) {
            item.factors[thread] = Operand::kFactor * facts.factor;
            item.count = facts.work.count;
        }
        named_barrier(1, kProducers);
    }

    // Rows from `count` on are left as they are: their results are not used.
    __device__ void copy_x(Stage& stage, int count, int step, int thread) const {
        const int row = thread / 16, unit = thread % 16;
        const uint32_t to = shared_address(stage.x[unit / 8][row]) + ((unit % 8 ^ row % 8) << 4);
        const uint4* from = (const uint4*)x + step * (kColumns / 8) + unit;
#pragma unroll 4
        for (int i = 0; i < count - row; i += kProducers / 16) {
            const uint4* row_of = from + s.sources[row + i];
#pragma unroll
            for (int block = 0; block < kColumns / 128; block++)
                copy16(to + i * 128 + block * 2 * sizeof(stage.x[0]), row_of + block * 16, true);
        }
    }

    // ---- consumers

    __device__ void consume() const {
        Turn turn;
        for (int at = blockIdx.x, slot = 0; at < total; at += gridDim.x) {
            wait_for_stage(turn);
            const Item& item = s.items[slot];
            const int tile = at % tiles;
            if (kHalves && item.count <= 8) multiply<kHalves ? 4 : 16>(turn, item, tile);
            else if (kHalves && item.count <= 16) multiply<kHalves ? 8 : 16>(turn, item, tile);
            else if (kHalves && item.count <= 24) multiply<kHalves ? 12 : 16>(turn, item, tile);
            else if (item.count <= 32) multiply<16>(turn, item, tile);
            else if (item.count <= 64) multiply<32>(turn, item, tile);
            else if (item.count <= 96) multiply<kMostPairs < 96 ? 32 : 48>(turn, item, tile);
            else multiply<kMostPairs < 128 ? 32 : 64>(turn, item, tile);
            slot = slot == kItems - 1 ? 0 : slot + 1;
        }
    }

    // The products read shared memory through another proxy than the copies wrote it.
    __device__ void wait_for_stage(const Turn& turn) const {
        barrier_wait(&s.full[turn.stage], turn.parity);
        fence_async_proxy();
    }

    // The row of a tile that holds this thread's first of 64-row product t; its second is 8 below.
    __device__ static int first_row(int t) {
        return (threadIdx.x / 128 * kTiles + t) * 64 + threadIdx.x % 128 / 32 * 16 +
               threadIdx.x % 32 / 4;
    }

    // This thread's weights of 128 columns of a stage: of each product, word by word, two rows.
    struct Weights {
        uint32_t codes[kTiles][2][4];
        Scale scales[kTiles][2];

        __device__ void load(const Stage& stage, int block) {
#pragma unroll
            for (int i = 0; i < 2 * kTiles; i++) {
                const int row = first_row(i / 2) + i % 2 * 8, unit = block * 4 + threadIdx.x % 4;
                const uint4 v = stage.codes[row][unit_of(row, unit)];
                codes[i / 2][i % 2][0] = v.x, codes[i / 2][i % 2][1] = v.y;
                codes[i / 2][i % 2][2] = v.z, codes[i / 2][i % 2][3] = v.w;
                scales[i / 2][i % 2] = stage.scales[row][unit];
            }
        }
        // Operands [row][step][register] of words from i on, word i / kTiles of product i % kTiles.
        template <int kWords> __device__ void decode(int i, uint32_t (&a)[kWords][2][2][2]) const {
#pragma unroll
            for (int w = 0; w < kWords; w++, i++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    Operand::decode(codes[i % kTiles][h][i / kTiles],
                                    Operand::factor(scales[i % kTiles][h], i / kTiles / 2), a[w][h]);
        }
    };

    // The two products of word i of 128 columns.
    template <int kSums>
    __device__ static void multiply_word(float (&sum)[kTiles][kSums], int block, int i,
                                         const uint32_t (&a)[2][2][2], uint64_t b) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int k = block * 8 + i / kTiles * 2 + j;
            const uint64_t at = b + ((k / 4 * sizeof(Stage::x[0]) + k % 4 * 32) >> 4);
            if constexpr (kHalves)
                wgmma_halves(sum[i % kTiles], a[0][j][0], a[1][j][0], a[0][j][1], a[1][j][1], at);
            else wgmma(sum[i % kTiles], a[0][j][0], a[1][j][0], a[0][j][1], a[1][j][1], at);
        }
    }

    // The first stage of the item has landed.
    template <int kSums>
    __device__ void multiply(Turn& turn, const Item& item, int tile) const {
        constexpr int kWords = kHalves ? 2 : 1;  // decoded while others multiply
        constexpr int kBlockGroups = 4 * kTiles / kWords, kGroups = kColumns / 128 * kBlockGroups;
        float sum[kTiles][kSums] = {};
        uint32_t a[2][kWords][2][2][2];  // of this group of words and the one before
        Weights weights;
        weights.load(s.stages[turn.stage], 0);
        weights.decode(0, a[0]);
        for (int step = 0; step < steps; step++) {
            const Stage& stage = s.stages[turn.stage];
            const uint64_t b = matrix_descriptor(shared_address(stage.x), 16, 1024);
#pragma unroll
            for (int g = 0; g < kGroups; g++) {
                const int first = g % kBlockGroups * kWords;
                if (g > 0) {
                    wgmma_wait<1>();
                    weights.decode(first, a[g % 2]);
                }
                if (first + kWords == 4 * kTiles && g + 1 < kGroups)
                    weights.load(stage, g / kBlockGroups + 1);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < kWords; i++)
                    multiply_word(sum, g / kBlockGroups, first + i, a[g % 2][i], b);
                wgmma_commit();
            }
            uint64_t* const used = &s.empty[turn.stage];
            turn.next(kStages);
            if (step + 1 < steps) {
                wait_for_stage(turn);
                weights.load(s.stages[turn.stage], 0);
                wgmma_wait<1>();
                weights.decode(0, a[0]);
            }
            wgmma_wait<0>();  // ptxas keeps no operands in flight from one round of a loop to the next
            if (threadIdx.x % 32 == 0) barrier_arrive(used);
        }
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
            if constexpr (kGated) finish_hidden(sum[t], item, tile, first_row(t) / 16);
            else finish_down(sum[t], item, tile, first_row(t));
        }
    }

    template <int kSums>
    __device__ void finish_hidden(const float (&sum)[kSums], const Item& item, int tile,
                                  int sixteen) const {
        const int member = threadIdx.x % 4;
        bf16* to = m.hidden + tile * kOutputs + place_of(sixteen * 8 + member);
#pragma unroll
        for (int j = 0; j < kSums / 4; j++) {
            const float2 weights = *(const float2*)&item.weights[8 * j + 2 * member];
            const float2 undo = undo_of(item, 8 * j + 2 * member);
            float value[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float power = i == 0 ? undo.x : undo.y;
                float gate = rounded(sum[4 * j + i] * item.factors[0] * power);
                float up = rounded(sum[4 * j + 2 + i] * item.factors[1] * power);
                value[i] = swiglu(gate, up, m.limit) * (i == 0 ? weights.x : weights.y);
            }
            uint32_t rows_of_pair = transposed(pack_bf16(value[0], value[1]));
            int at = 8 * j + threadIdx.x % 32 / 4;
            if (at < item.count)
                *(uint32_t*)(to + item.pairs[at] * (int64_t)rows) = rows_of_pair;
        }
    }

    template <int kSums>
    __device__ void finish_down(const float (&sum)[kSums], const Item& item, int tile,
                                int row) const {
        const float factor = item.factors[0];
        float* to = m.partial + tile * kOutputs + row;
#pragma unroll
        for (int j = 0; j < kSums / 4; j++) {
            const float2 undo = undo_of(item, 8 * j + 2 * (threadIdx.x % 4));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = 8 * j + 2 * (threadIdx.x % 4) + i;
                if (at >= item.count) continue;
                float* row_of = to + item.pairs[at] * (int64_t)rows;
                const float power = i == 0 ? undo.x : undo.y;
                row_of[0] = sum[4 * j + i] * factor * power;
                row_of[8] = sum[4 * j + 2 + i] * factor * power;
            }
        }
    }

    // Of two pairs of an item.
    __device__ static float2 undo_of(const Item& item, int at) {
        return kHalves ? *(const float2*)&item.undo[at] : make_float2(1, 1);
    }
};

template <class Policy, bool kGated, int kMostPairs, int kTiles>
__global__ void
    __launch_bounds__(Many<Policy, kGated, kMostPairs, kTiles>::kThreads, 1)
    many_kernel(const Moe m, const bf16* x) {
    using Kernel = Many<Policy, kGated, kMostPairs, kTiles>;
    extern __shared__ char memory[];
    auto& s = *reinterpret_cast<typename Kernel::Shared*>(
        memory + (1024 - shared_address(memory) % 1024) % 1024);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Kernel::kStages; i++) {
            barrier_init(&s.full[i], Kernel::kProducers + 1);
            barrier_init(&s.empty[i], Kernel::kConsumers / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous();
    let_next_start();
    const Kernel kernel(m, x, s);
    if (threadIdx.x >= Kernel::kConsumers) {
        fewer_registers<56>();
        kernel.produce();
    } else {
        more_registers<kTiles == 1 ? 104 : 224>();
        kernel.consume();
    }
}

template <class Policy> constexpr bool kHasMany = std::is_base_of_v<Fp4Chunk, Policy>;

// columns: of a step.
inline bool many_fits(const Moe& m, int columns) {
    return m.d % kManyRows == 0 && m.d % columns == 0 && m.inner % columns == 0;
}

template <class Policy, bool kGated, int kMostPairs, int kTiles>
int launch_many(const Moe& m, const bf16* x, int blocks, void* stream) {
    auto kernel = many_kernel<Policy, kGated, kMostPairs, kTiles>;
    using Kernel = Many<Policy, kGated, kMostPairs, kTiles>;
    constexpr size_t kShared = sizeof(typename Kernel::Shared) + 1024;
    int status = allow_shared(kernel, kShared);
    if (status != cudaSuccess) return status;
    return launch(kernel, blocks, Kernel::kThreads, kShared, stream, m, x);
}

// hidden, then partial. x: the activations with their columns in places.
template <class Policy, int kMostPairs, int kTiles>
int many_pairs(const Moe& m, const bf16* x, int blocks, void* stream) {
    int status = launch_many<Policy, true, kMostPairs, kTiles>(m, x, blocks, stream);
    if (status == cudaSuccess && kInFp16<Policy>)
        status = launch(halve_kernel, ceil_div(m.n * m.k, kRowsOfBlock), 32 * kRowsOfBlock, 0, stream,
                        m.hidden, m.undo, m.n * m.k, (int)m.inner);
    if (status != cudaSuccess) return status;
    return launch_many<Policy, false, kMostPairs, kTiles>(m, m.hidden, blocks, stream);
}

}  // namespace dsv4
