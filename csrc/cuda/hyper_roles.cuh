// What each warp does when a cluster collapses the residual streams of bfloat16 tokens, reading them once.
#pragma once

#include <type_traits>

#include "dispatch.cuh"
#include "hopper.cuh"
#include "hyper_math.cuh"
#include "tensor_map.cuh"

namespace dsv4 {

// A cluster of 16 CTAs takes tiles of up to Tile tokens. CTA r owns columns [r * kSlice, ...) of all four
// streams: its part of fn stays in registers as tensor-core fragments, split into bfloat16 terms that
// add up to float32, and the streams are read from memory once, into a ring of shared-memory stages.
// For each tile it sends its share of token t's sums to CTA t, which gates them and sends the four
// pre weights back to all; then every CTA collapses its columns. Warps have roles, so that all of this
// goes on at once: workers multiply, one warp adds up and sends, one gates, movers collapse and read.
// Columns are permuted alike in both operands, to make loads 16 bytes.

constexpr int kCluster = 16;
constexpr int kCombTiles = 16;  // tiles whose Sinkhorn one warp does at once, one token two lanes
constexpr int kLine = 128;      // bytes of a stream that lie together, 64 columns
constexpr int kWorkers = 8, kWorking = 32 * kWorkers;
// Named barriers: of the movers, and of workers and sender, two and two for the two buffers of partial
// sums.
constexpr int kOfMovers = 1, kFilled = 2, kEmptied = 4, kFilling = kWorking + 32;

struct Streams {
    CUtensorMap x_map;  // of x [n, 4, d]; what was before the sublayer, if there is one
    int n;
    int tile, rows;  // tokens of a tile; that a box of the map has
    const float* fn;
    HyperParameters p;
    bf16* u;
    float *post, *comb;
    // Its output, to be mixed in first, and where the new streams go.
    struct Sublayer {
        CUtensorMap y_map;         // of y [n, d]
        const float *post, *comb;  // [n, 4], [n, 4, 4]
        bf16* x;                   // [n, 4, d]
    } sublayer;
    // Of u, by the movers that have it, where every cluster has one tile; no y: none.
    struct Norm {
        const void* weight;  // [d]
        int weight_dtype;
        float eps;
        bf16* y;  // [n, d]
    } norm;
};

// Tile: most tokens of one, 16 or 8. Groups: 32-column groups a worker. Terms: of bfloat16 a weight, 2 or 4.
// Blocks: of 8 mixes, 3 or 1. Expands: workers first turn a tile into the streams after a sublayer, in
// place, as hc_post makes them.
template <int Tile, int Groups, int Terms, int Blocks, int Stages, bool Expands = false>
struct Collapse {
    static constexpr int kTile = Tile, kStages = Stages;
    // Warps in this order: workers, movers, the sender, the gate.
    static constexpr bool kWide = Groups > 4;  // weights take most registers
    static constexpr int kMovers = kWide ? 2 : 6, kMoving = 32 * kMovers;
    static constexpr int kSender = kWorkers + kMovers, kGate = kSender + 1, kThreads = 32 * (kGate + 1);
    // Of a thread that works and of another: together no more than equal shares of 64 Ki.
    static constexpr int kWorkRegisters = kWide ? 224 : 160, kOtherRegisters = kWide ? 56 : 96;
    static constexpr int kAtOnce = kWide ? 1 : 3;  // items that a mover collapses
    static constexpr int kSlice = Groups * kWorkers * 8;  // columns of a stream a CTA
    static constexpr int kWidth = kCluster * kSlice;   // d
    static constexpr int kMix = 8 * Blocks;
    static constexpr int kSums = kMix + 4;  // the mixes, the sum of squares, three of nothing
    static constexpr int kRows = Blocks == 1 ? kStreams : kMixes;  // of fn
    static constexpr int kBox = Tile * kStreams * kLine;  // bytes of 64 columns
    static constexpr int kBoxes = kSlice / 64, kItems = kSlice / 8;  // an item: 8 columns of a token
    static constexpr int kSlots = Stages;  // exchange buffers: a tile without a stage has been gated
    using Sums = float[Tile][kSums];
    struct Sublayer {
        alignas(128) char y[Tile * 2 * kSlice];
        alignas(16) float post[Tile][kStreams], comb[Tile][kCombs];
    };
    struct Nothing {};
    struct Shared {
        alignas(1024) char x[Stages][kBoxes * kBox];
        std::conditional_t<Expands, Sublayer, Nothing> sublayer[Stages];
        alignas(16) Sums partial[2][kWorkers];  // over the columns of one warp
        alignas(16) float sums[kSlots][kCluster][kSums];  // of the token this CTA gates
        float4 pre[kSlots][Tile];
        float logits[kCombTiles][kCombs + 1];
        alignas(16) float squares[Expands ? Tile : 1][kCluster];  // sums over the columns of u of every CTA
        uint64_t loaded[Stages], expanded[Stages], summed[kSlots], gated[kSlots], normed;
    };
    static_assert(sizeof(Shared) <= 227 << 10);

    const Streams& in;
    Shared& s;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    const uint32_t rank = cluster_rank();
    uint32_t weight[Terms / 2][Blocks][Groups][2][4];

    __device__ Collapse(const Streams& in, Shared& s) : in(in), s(s) {}

    __device__ int tiles() const {  // of this cluster, at least 1
        int all = (in.n + in.tile - 1) / in.tile, clusters = gridDim.x / kCluster;
        return (all - (int)blockIdx.x / kCluster + clusters - 1) / clusters;
    }
    __device__ int tokens(int i) const {  // of tile i of this cluster, 0 if there is none
        return max(0, min(in.n - token_at(i, 0), in.tile));
    }
    __device__ int token_at(int i, int row) const {
        return (blockIdx.x / kCluster + i * (gridDim.x / kCluster)) * in.tile + row;
    }
    __device__ void init_barriers() {
        if (threadIdx.x != 0) return;
        for (int i = 0; i < Stages; i++) {
            barrier_init(&s.loaded[i], 1);
            barrier_init(&s.expanded[i], kWorking);
            barrier_init(&s.summed[i], 1);
            barrier_init(&s.gated[i], 1);
        }
        barrier_init(&s.normed, 1);
        fence_barrier_init();
        for (int i = 0; i < kSlots; i++) {
            barrier_expect(&s.summed[i], sizeof(s.sums[0]));
            expect_gates(i);
        }
    }
    __device__ void expect_gates(int i) {
        barrier_expect(&s.gated[i % kSlots], tokens(i) * sizeof(float4));
    }

    // A warp has 32 * Groups columns of one stream. Of eight rows of a fragment, those eight further on
    // are the next terms.
    __device__ void load_weights() {
        static_assert(kWorkers % kStreams == 0 && Terms % 2 == 0);
        constexpr int kShare = kWorkers / kStreams;
        const float* mine = in.fn + (int64_t)(warp / kShare) * kWidth + rank * kSlice +
                            warp % kShare * Groups * 32 + 8 * t;
#pragma unroll
        for (int block = 0; block < Blocks; block++) {
#pragma unroll
            for (int g = 0; g < Groups; g++) {
                int64_t row = 8 * block + r;
                float4 v[2] = {};
                if (kRows == kMix || row < kRows) {
                    const float* from = mine + row * kStreams * kWidth + 32 * g;
                    v[0] = *(const float4*)from;
                    v[1] = *(const float4*)(from + 4);
                }
                float rest[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
#pragma unroll
                for (int term = 0; term < Terms; term++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        uint32_t pair = pack_bf16(rest[2 * i], rest[2 * i + 1]);
                        weight[term / 2][block][g][i / 2][i % 2 * 2 + term % 2] = pair;
                        rest[2 * i] -= low_bf16(pair);
                        rest[2 * i + 1] -= high_bf16(pair);
                    }
            }
        }
    }

    // threadIdx.x, read anew each time: what follows from it would otherwise be kept in registers.
    static __device__ int thread() {
        int index;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
        return index;
    }
    // A mover's index among all movers.
    static __device__ int mover() { return thread() - kWorking; }

    // Where column `column` of a stream lies in a stage, as the copy engine swizzles it.
    static __device__ int place(int row, int stream, int column) {
        const int line = row * kStreams + stream;
        return column / 64 * kBox + line * kLine + (column % 64 / 8 ^ line % 8) * 16 + column % 8 * 2;
    }

    // One mover starts to read tile i of the cluster's `count`, if there is one.
    __device__ void start_read(int i, int count) {
        if (i >= count || mover() != 0) return;
        const int stage = i % Stages, token = token_at(i, 0), tokens = this->tokens(i);
        uint64_t* loaded = &s.loaded[stage];
        constexpr int kGates = 4 * (kStreams + kCombs);
        barrier_expect(loaded, in.rows * kSlice * 2 * (kStreams + Expands) + (Expands ? tokens * kGates : 0));
#pragma unroll
        for (int box = 0; box < kBoxes; box++)
            load_box(s.x[stage] + box * kBox, &in.x_map, rank * kSlice + 64 * box, 0, token, loaded);
        if constexpr (Expands) {
            Sublayer& to = s.sublayer[i % Stages];
            load_box(to.y, &in.sublayer.y_map, rank * kSlice, token, 0, loaded);
            bulk_load(to.post, in.sublayer.post + (int64_t)token * kStreams, tokens * 4 * kStreams, loaded);
            bulk_load(to.comb, in.sublayer.comb + (int64_t)token * kCombs, tokens * 4 * kCombs, loaded);
        }
    }

    // Workers: the streams of tile i after the sublayer, in place and to memory. A warp has a token.
    __device__ void expand(int i) {
        using Four = Vector<bf16, 4>;
        const Sublayer& from = s.sublayer[i % Stages];
        char* x = s.x[i % Stages];
        bf16* out = in.sublayer.x + (int64_t)token_at(i, 0) * kStreams * kWidth + rank * kSlice;
        barrier_wait(&s.loaded[i % Stages], i / Stages % 2);
        for (int row = warp; row < tokens(i); row += kWorkers) {
            float post[kStreams], comb[kCombs];
            *(float4*)post = *(const float4*)from.post[row];
#pragma unroll
            for (int j = 0; j < kStreams; j++)
                *(float4*)(comb + kStreams * j) = *(const float4*)(from.comb[row] + kStreams * j);
#pragma unroll 1
            for (int column = 4 * lane; column < kSlice; column += 128) {
                const Four y = *(const Four*)(from.y + 2 * (row * kSlice + column));
                Four old[kStreams];
#pragma unroll
                for (int j = 0; j < kStreams; j++) old[j] = *(const Four*)(x + place(row, j, column));
#pragma unroll
                for (int stream = 0; stream < kStreams; stream++) {
                    float value[4];
                    expand_streams(y, old, post[stream], comb + stream, value);
                    const uint2 v = {pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3])};
                    *(uint2*)(x + place(row, stream, column)) = v;
                    store8(out + (row * kStreams + stream) * kWidth + column, v.x, v.y);
                }
            }
        }
        fence_async_proxy();  // the copy engine writes there next
        barrier_arrive(&s.expanded[i % Stages]);
    }
    // Until the streams of tile i are there to be multiplied and collapsed.
    __device__ void wait_for_streams(int i) {
        barrier_wait(&(Expands ? s.expanded : s.loaded)[i % Stages], i / Stages % 2);
    }

    // A worker's columns of tile i times fn, into s.partial[i % 2]; of the first 8 * Halves tokens.
    template <int Halves> __device__ void multiply(int i) {
        constexpr int kShare = kWorkers / kStreams;
        const int stream = warp / kShare, first = warp % kShare * Groups;  // of its groups
        float acc[Blocks][Halves][4] = {};
        float square[Halves] = {};
        wait_for_streams(i);
        const uint32_t line = r * kStreams + stream, chunk = 16 * (t ^ line % 8);
        const char* x = s.x[i % Stages] + line * kLine;
#pragma unroll
        for (int g = 0; g < Groups; g++) {
            const char* from = x + (first + g) / 2 * kBox + (chunk ^ (first + g) % 2 * 64);
#pragma unroll
            for (int half = 0; half < Halves; half++) {  // tokens r and r + 8
                const uint4 v = *(const uint4*)(from + half * 8 * kStreams * kLine);
                const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int pair = Terms / 2 - 1; pair >= 0; pair--)
#pragma unroll
                    for (int k = 0; k < 2; k++)
#pragma unroll
                        for (int block = 0; block < Blocks; block++) {
                            const uint32_t(&w)[4] = weight[pair][block][g][k];
                            mma(acc[block][half], w[0], w[1], w[2], w[3], words[2 * k], words[2 * k + 1]);
                        }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float a = low_bf16(words[j]), b = high_bf16(words[j]);
                    square[half] = fmaf(b, b, fmaf(a, a, square[half]));
                }
            }
        }
        if (i >= 2) named_barrier(kEmptied + i % 2, kFilling);
        Sums& partial = s.partial[i % 2][warp];
#pragma unroll
        for (int half = 0; half < Halves; half++) {
            square[half] += __shfl_xor_sync(~0u, square[half], 1);
            square[half] += __shfl_xor_sync(~0u, square[half], 2);
            const int token = 8 * half + 2 * t;
#pragma unroll
            for (int block = 0; block < Blocks; block++) {
                const float(&sum)[4] = acc[block][half];  // rows r and r + 8: terms of one mix
                partial[token][8 * block + r] = sum[0] + sum[2];
                partial[token + 1][8 * block + r] = sum[1] + sum[3];
            }
            if (t == 0) partial[8 * half + r][kMix] = square[half];
        }
        named_barrier_arrive(kFilled + i % 2, kFilling);
    }

    // One warp: the CTA's sums of tile i, those of token `row` to CTA `row`.
    __device__ void send_sums(int i, int count) {
        constexpr int kParts = kSums / 4;
        const int slot = i % kSlots, parts = tokens(i) * kParts;
        named_barrier(kFilled + i % 2, kFilling);
#pragma unroll 1
        for (int k = lane; k < parts; k += 32) {
            const int row = k / kParts, part = k % kParts;
            float4 sum = {};
#pragma unroll
            for (int w = 0; w < kWorkers; w++) {
                const float4 v = *(const float4*)(s.partial[i % 2][w][row] + 4 * part);
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            remote_store(remote_address(shared_address(&s.sums[slot][rank][4 * part]), row), sum,
                         remote_address(shared_address(&s.summed[slot]), row));
        }
        __syncwarp();
        if (i + 2 < count) named_barrier_arrive(kEmptied + i % 2, kFilling);
    }

    // One warp: the gates of this CTA's token of tile i; pre goes to all CTAs.
    __device__ void gate(int i) {
        constexpr bool kHead = Blocks == 1;
        if (rank >= tokens(i)) return;
        float scale = 0, base = 0;  // of mix `lane`
        if (lane < kRows) {
            scale = in.p.scale[kRows == kStreams || lane < kStreams ? 0 : lane < 2 * kStreams ? 1 : 2];
            base = in.p.base[lane];
        }
        const int slot = i % kSlots;
        const int token = token_at(i, rank);
        barrier_wait(&s.summed[slot], i / kSlots % 2);
        float sum = 0;
        if (lane < kSums)
#pragma unroll
            for (int from = 0; from < kCluster; from++) sum += s.sums[slot][from][lane];
        __syncwarp();
        if (lane == 0) barrier_expect(&s.summed[slot], sizeof(s.sums[0]));
        float square = __shfl_sync(~0u, sum, kMix);
        float rho = rsqrtf(square / (float)(kStreams * kWidth) + in.p.norm_eps);
        float logit = sum * rho * scale + base;
        float gate = sigmoid(logit), pre = gate + in.p.eps;
        float4 all = {__shfl_sync(~0u, pre, 0), __shfl_sync(~0u, pre, 1), __shfl_sync(~0u, pre, 2),
                      __shfl_sync(~0u, pre, 3)};
        if (lane < kCluster)
            remote_store(remote_address(shared_address(&s.pre[slot][rank]), lane), all,
                         remote_address(shared_address(&s.gated[slot]), lane));
        if (kHead || lane >= kRows) return;
        if (lane >= kStreams && lane < 2 * kStreams)
            in.post[(int64_t)token * kStreams + lane - kStreams] = 2 * gate;
        if (lane >= 2 * kStreams) s.logits[i % kCombTiles][lane - 2 * kStreams] = logit;
    }

    // The same warp: comb of this CTA's tokens of the last tiles, up to i; half a token a lane.
    __device__ void combine(int i) {
        constexpr int kHalf = kStreams / 2;
        const int last = i % kCombTiles, tile = lane / 2, first = lane % 2 * kHalf * kStreams;
        const int token = token_at(i - last + tile, rank);
        float rows[kHalf][kStreams];
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kHalf * kStreams; k++)
            rows[k / kStreams][k % kStreams] = s.logits[tile][first + k];
        sinkhorn(rows, in.p.iters, in.p.eps);
        if (tile <= last && token < in.n) {
            float* to = in.comb + (int64_t)token * kCombs + first;
#pragma unroll
            for (int k = 0; k < kHalf; k++)
                *(float4*)(to + k * kStreams) = {rows[k][0], rows[k][1], rows[k][2], rows[k][3]};
        }
        __syncwarp();
    }

    // The same warp, of the last of `count` tiles or of any other.
    __device__ void gate(int i, int count) {
        gate(i);
        if (rank < in.tile && kRows == kMixes && (i + 1 == count || (i + 1) % kCombTiles == 0)) combine(i);
    }

    // Eight columns of the streams, weighted with pre.
    static __device__ uint4 mix(const uint4 (&v)[kStreams], float4 pre) {
        const float weights[kStreams] = {pre.x, pre.y, pre.z, pre.w};
        float value[8] = {};
#pragma unroll
        for (int stream = 0; stream < kStreams; stream++) {
            const uint32_t words[4] = {v[stream].x, v[stream].y, v[stream].z, v[stream].w};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                value[2 * w] += weights[stream] * low_bf16(words[w]);
                value[2 * w + 1] += weights[stream] * high_bf16(words[w]);
            }
        }
        return {pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]),
                pack_bf16(value[4], value[5]), pack_bf16(value[6], value[7])};
    }

    // Movers: u of tile i, this CTA's columns.
    __device__ void collapse(int i) {
        constexpr int kStep = kMoving / kItems;  // rows from an item of a thread to its next
        static_assert(kAtOnce == 1 || (kMoving % kItems == 0 && kStep % 2 == 0));  // swizzled alike
        const int slot = i % kSlots, count = tokens(i);
        const char* x = s.x[i % Stages];
        bf16* u = in.u + (int64_t)token_at(i, 0) * kWidth + rank * kSlice;
        wait_for_streams(i);
        barrier_wait(&s.gated[slot], i / kSlots % 2);
#pragma unroll 1
        for (int item = mover(); item < count * kItems; item += kAtOnce * kMoving) {
            const int row = item / kItems, column = item % kItems * 8;
            uint4 v[kAtOnce][kStreams];
#pragma unroll
            for (int j = 0; j < kAtOnce; j++)
                if (row + j * kStep < count)
#pragma unroll
                    for (int stream = 0; stream < kStreams; stream++)
                        v[j][stream] =
                            *(const uint4*)(x + place(row, stream, column) + j * kStep * kStreams * kLine);
#pragma unroll
            for (int j = 0; j < kAtOnce; j++)
                if (row + j * kStep < count) {
                    const uint4 mixed = v[j][0] = mix(v[j], s.pre[slot][row + j * kStep]);
                    store16(u + (row + j * kStep) * kWidth + column, mixed.x, mixed.y, mixed.z, mixed.w);
                }
            if constexpr (Expands)
                if (in.norm.y) normalise(i, v);
        }
        if (mover() == 0) expect_gates(i + kSlots);
    }

    template <class T> static __device__ void load_floats(const T* from, float (&to)[8]) {
        const auto v = *(const Vector<T, 8>*)from;
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = to_float(v.at[i]);
    }

    // Movers: the RMS norm of u, of which each thread has eight columns of some tokens in v[...][0]; a
    // warp has this CTA's columns of a token. Adds up as rms_norm does.
    __device__ void normalise(int i, const uint4 (&v)[kAtOnce][kStreams]) {
        static_assert(kItems == 32 && Tile * kItems <= kAtOnce * kMoving);
        const int tokens = this->tokens(i), column = rank * kSlice + 8 * lane;
        float weight[8];
        if (in.norm.weight_dtype == DSV4_BF16) load_floats((const bf16*)in.norm.weight + column, weight);
        else load_floats((const float*)in.norm.weight + column, weight);
        if (mover() == 0) barrier_expect(&s.normed, tokens * kCluster * sizeof(float));
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int row = warp - kWorkers + j * kMovers;
            if (row >= tokens) break;
            const uint32_t words[4] = {v[j][0].x, v[j][0].y, v[j][0].z, v[j][0].w};
            float sum = 0;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                sum += low_bf16(words[w]) * low_bf16(words[w]);
                sum += high_bf16(words[w]) * high_bf16(words[w]);
            }
            sum = warp_sum(sum);
            if (lane < kCluster)
                remote_store(remote_address(shared_address(&s.squares[row][rank]), lane), __float_as_uint(sum),
                             remote_address(shared_address(&s.normed), lane));
        }
        barrier_wait(&s.normed, 0);
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) {
            const int row = warp - kWorkers + j * kMovers;
            if (row >= tokens) break;
            float total = 0;
#pragma unroll
            for (int cta = 0; cta < kCluster; cta++) total += s.squares[row][cta];
            const float factor = 1 / sqrtf(total / (float)kWidth + in.norm.eps);
            const uint32_t words[4] = {v[j][0].x, v[j][0].y, v[j][0].z, v[j][0].w};
            uint32_t y[4];
#pragma unroll
            for (int w = 0; w < 4; w++)
                y[w] = pack_bf16(low_bf16(words[w]) * factor * weight[2 * w],
                                 high_bf16(words[w]) * factor * weight[2 * w + 1]);
            store16(in.norm.y + (int64_t)token_at(i, row) * kWidth + column, y[0], y[1], y[2], y[3]);
        }
    }

    // What each role does with all tiles of this cluster.
    __device__ void work(int count) {
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            if constexpr (Expands) expand(i);
            if (Tile == 16 && tokens(i) > 8) multiply<Tile / 8>(i);
            else multiply<1>(i);
        }
    }
    __device__ void move(int count) {
#pragma unroll 1
        for (int i = 0; i < count; i++) {
            collapse(i);
            named_barrier(kOfMovers, kMoving);  // nobody needs tile i any more
            start_read(i + Stages, count);
        }
    }
    __device__ void send(int count) {
        for (int i = 0; i < count; i++) send_sums(i, count);
    }
    __device__ void gate_all(int count) {
        for (int i = 0; i < count; i++) gate(i, count);
    }
};

}  // namespace dsv4
