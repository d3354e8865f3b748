// Collapsing the four residual streams of bfloat16 tokens: one kernel, by clusters, reading them once.
#pragma once

#include <type_traits>

#include "dispatch.cuh"
#include "hopper.cuh"
#include "hyper_math.cuh"

namespace dsv4 {

// A cluster of 16 CTAs takes tiles of Tile tokens. CTA r owns columns [r * kSlice, ...) of all four
// streams: its part of fn stays in registers as tensor-core fragments, split into bfloat16 terms that
// add up to float32, and the streams are read from memory once, into a ring of shared-memory stages.
// For each tile it sends its share of token t's sums to CTA t, which gates them and sends the four
// pre weights back to all; then every CTA collapses its columns. Warps have roles, so that all of this
// goes on at once: workers multiply, one tile after another; movers read tiles, send sums, collapse;
// one warp gates. Columns are permuted alike in both operands, to make loads 16 bytes.

constexpr int kCluster = 16;
constexpr int kSlots = 4;       // exchange buffers; three tiles are under way at once
constexpr int kCombTiles = 16;  // tiles whose Sinkhorn one warp does at once, one token two lanes

struct Streams {
    const bf16* x;  // [n, 4, d]; what was before the sublayer, if `sublayer` is set
    int n;
    const float* fn;
    HyperParameters p;
    bf16* u;
    float *post, *comb;
    // Its output, to be mixed in first, and where the new streams go.
    struct Sublayer {
        const bf16* y;             // [n, d]
        const float *post, *comb;  // [n, 4], [n, 4, 4]
        bf16* x;                   // [n, 4, d]
    } sublayer;
};

// Tile: tokens, 16 or 8. Groups: 32-column groups a worker. Warps: workers. Terms: of bfloat16 a weight.
// Blocks: of 8 mixes, 3 or 1. Expands: movers first turn a tile into the streams after a sublayer, in
// place, as hc_post makes them.
template <int Tile, int Groups, int Warps, int Terms, int Blocks, int Stages, bool Expands = false>
struct Collapse {
    static constexpr bool kExpands = Expands;
    static constexpr int kFirstReads = Expands ? 2 : Stages - 1;
    static_assert(!Expands || Stages == 4);  // there are two stages of Sublayer
    static constexpr int kTile = Tile, kStages = Stages, kWorkers = Warps;
    static constexpr int kMovers = Warps == 16 ? 7 : 3, kMoving = 32 * kMovers, kThreads = 32 * (Warps + kMovers + 1);
    // Of a thread that works and of another: together no more than equal shares of 64 Ki.
    static constexpr int kWorkRegisters = Warps == 16 ? 88 : 224, kMoveRegisters = Warps == 16 ? 64 : 56;
    static constexpr int kSlice = Groups * Warps * 8;  // columns of a stream a CTA
    static constexpr int kWidth = kCluster * kSlice;   // d
    static constexpr int kMix = 8 * Blocks;
    static constexpr int kSums = kMix + 4;  // the mixes, the sum of squares, three of nothing
    static constexpr int kRows = Blocks == 1 ? kStreams : kMixes;  // of fn
    static constexpr int kPitch = 2 * kStreams * kSlice + 64;  // bytes a token; 64 spread the banks
    struct Partial {  // sums over the columns of one warp
        alignas(16) float mix[Tile][kMix];
        float square[Tile + 8];  // 8 spread the banks
    };
    struct Sublayer {
        alignas(128) char y[Tile * 2 * kSlice];
        alignas(16) float post[Tile][kStreams], comb[Tile][kCombs];
    };
    struct Nothing {};
    struct Shared {
        alignas(128) char x[Stages][Tile * kPitch];
        std::conditional_t<Expands, Sublayer, Nothing> sublayer[2];
        Partial partial[2][Warps];
        alignas(16) float sums[kSlots][kCluster][kSums];  // of the token this CTA gates
        float4 pre[kSlots][Tile];
        float logits[kCombTiles][kCombs + 1];
        uint64_t loaded[Stages], expanded[Stages], multiplied[2], taken[2], summed[kSlots], gated[kSlots];
    };
    static_assert(sizeof(Shared) <= 227 << 10);

    const Streams& in;
    Shared& s;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    const uint32_t rank = cluster_rank();
    uint32_t weight[Terms][Blocks][Groups][4];

    __device__ Collapse(const Streams& in, Shared& s) : in(in), s(s) {}

    __device__ int tiles() const {  // of this cluster, at least 1
        int all = (in.n + Tile - 1) / Tile, clusters = gridDim.x / kCluster;
        return (all - (int)blockIdx.x / kCluster + clusters - 1) / clusters;
    }
    __device__ int token_at(int i, int row) const {  // of tile i of this cluster
        return (blockIdx.x / kCluster + i * (gridDim.x / kCluster)) * Tile + row;
    }
    __device__ void init_barriers() {
        if (threadIdx.x != 0) return;
        for (int i = 0; i < Stages; i++) {
            barrier_init(&s.loaded[i], 1);
            barrier_init(&s.expanded[i], kMovers);
        }
        for (int i = 0; i < kSlots; i++) {
            barrier_init(&s.summed[i], 1);
            barrier_init(&s.gated[i], 1);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&s.multiplied[i], kWorkers);
            barrier_init(&s.taken[i], kMovers);
        }
        fence_barrier_init();
        for (int i = 0; i < kSlots; i++) {
            barrier_expect(&s.summed[i], sizeof(s.sums[0]));
            barrier_expect(&s.gated[i], sizeof(s.pre[0]));
        }
    }

    // A warp has 32 * Groups columns of one stream.
    __device__ void load_weights() {
        static_assert(Warps % kStreams == 0);
        constexpr int kShare = Warps / kStreams;
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
                        weight[term][block][g][i] = pair;
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
    static __device__ int mover() { return thread() - 32 * kWorkers; }

    // Movers start to read tile i of this cluster, if there is one: a warp a token, a lane a stream.
    __device__ void start_read(int i) {
        constexpr uint32_t kBytes = 2 * kSlice;
        constexpr uint32_t kToken = kStreams * kBytes + (Expands ? kBytes + 4 * (kStreams + kCombs) : 0);
        if (i >= tiles()) return;
        const int stage = i % Stages, left = in.n - token_at(i, 0), tokens = left < Tile ? left : Tile;
        uint64_t* loaded = &s.loaded[stage];
        if (mover() == 0) {
            barrier_expect(loaded, tokens * kToken);
            if constexpr (Expands) {
                const int64_t token = token_at(i, 0);
                Sublayer& to = s.sublayer[i % 2];
                bulk_load(to.post, in.sublayer.post + token * kStreams, tokens * 4 * kStreams, loaded);
                bulk_load(to.comb, in.sublayer.comb + token * kCombs, tokens * 4 * kCombs, loaded);
            }
        }
        for (int row = warp - kWorkers; row < tokens; row += kMovers) {
            const int64_t token = token_at(i, row);
            if (lane < kStreams)
                bulk_load(s.x[stage] + row * kPitch + lane * kBytes,
                          in.x + (token * kStreams + lane) * kWidth + rank * kSlice, kBytes, loaded);
            if constexpr (Expands)
                if (lane == kStreams)
                    bulk_load(s.sublayer[i % 2].y + row * kBytes,
                              in.sublayer.y + token * kWidth + rank * kSlice, kBytes, loaded);
        }
        __syncwarp();
    }

    // Movers: the streams of tile i after the sublayer, in place and to memory.
    __device__ void expand(int i) {
        const Sublayer& from = s.sublayer[i % 2];
        barrier_wait(&s.loaded[i % Stages], i / Stages % 2);
#pragma unroll 1
        for (int k = mover(); k < Tile * kSlice / 4; k += kMoving) {
            const int row = k / (kSlice / 4), column = k % (kSlice / 4) * 4, token = token_at(i, row);
            if (token >= in.n) continue;
            using Four = Vector<bf16, 4>;
            char* x = s.x[i % Stages] + row * kPitch + 2 * column;
            bf16* out = in.sublayer.x + (int64_t)token * kStreams * kWidth + rank * kSlice + column;
            Four y = *(const Four*)(from.y + 2 * (row * kSlice + column)), old[kStreams];
#pragma unroll
            for (int j = 0; j < kStreams; j++) old[j] = *(const Four*)(x + 2 * j * kSlice);
#pragma unroll 2
            for (int stream = 0; stream < kStreams; stream++) {
                float value[4];
                expand_streams(y, old, from.post[row][stream], from.comb[row] + stream, value);
                uint2 v = {pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3])};
                *(uint2*)(x + 2 * stream * kSlice) = v;
                store8(out + stream * kWidth, v.x, v.y);
            }
        }
        fence_async_proxy();  // the copy engine writes there next
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.expanded[i % Stages]);
    }

    // A worker's columns of tile i times fn, into s.partial[i % 2].
    __device__ void multiply(int i) {
        const int id = Warps == 16 ? thread() : threadIdx.x;
        const int warp = id / 32, lane = id % 32, r = lane / 4, t = lane % 4;
        float acc[Blocks][4] = {};
        float square[2] = {};
        barrier_wait(&(Expands ? s.expanded : s.loaded)[i % Stages], i / Stages % 2);
        if (i >= 2) barrier_wait(&s.taken[i % 2], (i / 2 - 1) % 2);
#pragma unroll
        for (int g = 0; g < Groups; g++) {
            const char* from = s.x[i % Stages] + r * kPitch + 2 * ((warp * Groups + g) * 32 + 8 * t);
            if (Groups > 4 && g % 3 == 2) named_barrier(2, 32 * kWorkers);  // else registers run out
            uint4 low = *(const uint4*)from, high = {};
            if (Tile == 16) high = *(const uint4*)(from + 8 * kPitch);
#pragma unroll
            for (int term = Terms - 1; term >= 0; term--)
#pragma unroll
                for (int block = 0; block < Blocks; block++) {
                    uint32_t(&w)[4] = weight[term][block][g];
                    mma(acc[block], low.x, high.x, low.y, high.y, w[0], w[1]);
                    mma(acc[block], low.z, high.z, low.w, high.w, w[2], w[3]);
                }
            uint32_t rows[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
            for (int half = 0; half < Tile / 8; half++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float a = low_bf16(rows[half][j]), b = high_bf16(rows[half][j]);
                    square[half] += a * a + b * b;
                }
        }
#pragma unroll
        for (int half = 0; half < Tile / 8; half++) {
            square[half] += __shfl_xor_sync(~0u, square[half], 1);
            square[half] += __shfl_xor_sync(~0u, square[half], 2);
            Partial& partial = s.partial[i % 2][warp];
            const int row = r + 8 * half;
#pragma unroll
            for (int block = 0; block < Blocks; block++)
                *(float2*)(partial.mix[row] + 8 * block + 2 * t) = {acc[block][2 * half],
                                                                    acc[block][2 * half + 1]};
            if (t == 0) partial.square[row] = square[half];
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.multiplied[i % 2]);
    }

    // Movers: the CTA's sums of tile i, those of token `row` to CTA `row`. Four threads add up four.
    __device__ void send_sums(int i) {
        constexpr int kParts = kSums / 4;
        const int slot = i % kSlots, quarter = threadIdx.x % 4;
        const Partial* partial = s.partial[i % 2];
        barrier_wait(&s.multiplied[i % 2], i / 2 % 2);
#pragma unroll 1
        for (int k = mover() / 4; k < Tile * kParts; k += kMoving / 4) {
            int row = k / kParts, part = k % kParts;
            float sum[4] = {};
#pragma unroll
            for (int w = quarter; w < Warps; w += 4) {
                float4 v = {partial[w].square[row], 0, 0, 0};
                if (part < kMix / 4) v = *(const float4*)(partial[w].mix[row] + 4 * part);
                sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sum[j] += __shfl_xor_sync(~0u, sum[j], 1);
                sum[j] += __shfl_xor_sync(~0u, sum[j], 2);
            }
            uint32_t to = shared_address(&s.sums[slot][rank][4 * part]);
            uint32_t barrier = shared_address(&s.summed[slot]);
            if (quarter == 0)
                remote_store(remote_address(to, row), float4{sum[0], sum[1], sum[2], sum[3]},
                             remote_address(barrier, row));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(&s.taken[i % 2]);
    }

    // One warp: the gates of this CTA's token of tile i; pre goes to all CTAs.
    __device__ void gate(int i) {
        constexpr bool kHead = Blocks == 1;
        if (rank >= Tile) return;
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
        if (kHead || lane >= kRows || token >= in.n) return;
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
        if (rank < Tile && kRows == kMixes && (i + 1 == count || (i + 1) % kCombTiles == 0)) combine(i);
    }

    // Movers: u of tile i, this CTA's columns.
    __device__ void collapse(int i) {
        const int slot = i % kSlots;
        barrier_wait(&s.gated[slot], i / kSlots % 2);
#pragma unroll 1
        for (int k = mover(); k < Tile * kSlice / 8; k += kMoving) {
            int row = k / (kSlice / 8), column = k % (kSlice / 8) * 8;
            int token = token_at(i, row);
            if (token >= in.n) continue;
            float4 pre4 = s.pre[slot][row];
            float pre[kStreams] = {pre4.x, pre4.y, pre4.z, pre4.w};
            float value[8] = {};
#pragma unroll
            for (int stream = 0; stream < kStreams; stream++) {
                uint4 v = *(const uint4*)(s.x[i % Stages] + row * kPitch +
                                          2 * (stream * kSlice + column));
                uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    value[2 * w] += pre[stream] * low_bf16(words[w]);
                    value[2 * w + 1] += pre[stream] * high_bf16(words[w]);
                }
            }
            store16(in.u + (int64_t)token * kWidth + rank * kSlice + column,
                    pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]),
                    pack_bf16(value[4], value[5]), pack_bf16(value[6], value[7]));
        }
        if (mover() == 0) barrier_expect(&s.gated[slot], sizeof(s.pre[0]));
    }

    // Movers: all tiles of this cluster.
    __device__ void move(int count) {
        if constexpr (Expands) {
            expand(0);
            named_barrier(1, kMoving);
            start_read(kFirstReads);
        }
#pragma unroll 1
        for (int i = 0; i <= count; i++) {
            if constexpr (Expands)
                if (i + 1 < count) expand(i + 1);
            if (i < count) send_sums(i);
            if (i > 0) collapse(i - 1);
            named_barrier(1, kMoving);  // nobody needs tile i - 1 any more
            start_read(i - 1 + Stages);
        }
    }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) collapse_kernel(const Streams in) {
    extern __shared__ char memory[];
    C c(in, *reinterpret_cast<typename C::Shared*>(memory));
    let_next_start();
    c.init_barriers();
    __syncthreads();
    cluster_arrive();
    if (C::thread() < 32 * C::kWorkers) {
        more_registers<C::kWorkRegisters>();
        c.load_weights();  // while the kernel before may still run
        wait_for_previous();
        cluster_wait();
        const int count = c.tiles();
#pragma unroll 1
        for (int i = 0; i < count; i++) c.multiply(i);
        return;
    }
    fewer_registers<C::kMoveRegisters>();
    wait_for_previous();
    if (C::mover() < C::kMoving) {
        for (int i = 0; i < C::kFirstReads; i++) c.start_read(i);
        cluster_wait();
        c.move(c.tiles());
    } else {
        cluster_wait();
        const int count = c.tiles();
        for (int i = 0; i < count; i++) c.gate(i, count);
    }
}

// Launches as many clusters as fit at once; kUnsupported where none does.
template <class C> int collapse(Streams in, void* stream) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kCluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
    config.blockDim = C::kThreads;
    config.dynamicSmemBytes = sizeof(typename C::Shared);
    config.stream = (cudaStream_t)stream;
    static const int clusters = [&] {
        int most = 0;
        cudaFuncSetAttribute(collapse_kernel<C>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        allow_shared(collapse_kernel<C>, config.dynamicSmemBytes);
        config.gridDim = kCluster;
        if (cudaOccupancyMaxActiveClusters(&most, collapse_kernel<C>, &config)) most = 0;
        cudaGetLastError();
        return most;
    }();
    if (clusters == 0) return kUnsupported;
    int64_t tiles = ceil_div(in.n, C::kTile);
    config.gridDim = (unsigned)(kCluster * (tiles < clusters ? tiles : clusters));
    return (int)cudaLaunchKernelEx(&config, collapse_kernel<C>, in);
}

}  // namespace dsv4
