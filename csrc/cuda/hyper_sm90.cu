// Ops hc_pre, hc_head and hc_post: collapsing and expanding the four residual streams.

#include "dispatch.cuh"
#include "hopper.cuh"
#include "hyper_math.cuh"

namespace dsv4 {
namespace {

// One store of all values.
__device__ inline void store_floats(bf16* to, const float (&v)[8]) {
    store16(to, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
            pack_bf16(v[6], v[7]));
}
__device__ inline void store_floats(float* to, const float (&v)[4]) {
    store16(to, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
            __float_as_uint(v[3]));
}
template <class T> __device__ inline void store_floats(T* to, const float (&v)[1]) {
    *to = from_float<T>(v[0]);
}

// ---------------------------------------------------------------- collapse, any width and dtype

constexpr int kThreads = 256;

// One block a token. M mixes: 24 for hc_pre, 4 for hc_head, which has no post and comb.
template <class T, int M>
__global__ void __launch_bounds__(kThreads)
    collapse_any_kernel(const T* x, int64_t d, const float* fn, HyperParameters p, T* u,
                        float* post, float* comb) {
    __shared__ float partial[kThreads / 32][M + 1];
    __shared__ float mix[M + 1];
    __shared__ float pre[kStreams];
    let_next_start();
    wait_for_previous();
    int64_t token = blockIdx.x, width = kStreams * d;
    x += token * width;
    float sum[M + 1] = {};  // the last is the sum of squares
    for (int64_t i = threadIdx.x; i < width; i += kThreads) {
        float value = to_float(x[i]);
#pragma unroll
        for (int m = 0; m < M; m++) sum[m] += value * fn[m * width + i];
        sum[M] += value * value;
    }
#pragma unroll
    for (int m = 0; m <= M; m++) {
        float total = warp_sum(sum[m]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][m] = total;
    }
    __syncthreads();
    if (threadIdx.x <= M) {
        float total = 0;
        for (int warp = 0; warp < kThreads / 32; warp++) total += partial[warp][threadIdx.x];
        mix[threadIdx.x] = total;
    }
    __syncthreads();
    float rho = 1 / sqrtf(mix[M] / (float)width + p.norm_eps);
    if (threadIdx.x < kStreams) {
        int i = threadIdx.x;
        pre[i] = sigmoid(mix[i] * rho * p.scale[0] + p.base[i]) + p.eps;
        if (M == kMixes) {
            int k = kStreams + i;
            post[token * kStreams + i] = 2 * sigmoid(mix[k % M] * rho * p.scale[1] + p.base[k]);
        }
    }
    __syncthreads();
    if (M == kMixes && threadIdx.x == kThreads - 1) {
        float c[kCombs];
        for (int i = 0; i < kCombs; i++) {
            int k = 2 * kStreams + i;
            c[i] = mix[k % M] * rho * p.scale[2] + p.base[k];
        }
        sinkhorn(c, p.iters, p.eps);
        for (int i = 0; i < kCombs; i++) comb[token * kCombs + i] = c[i];
    }
    for (int64_t i = threadIdx.x; i < d; i += kThreads) {
        float value = 0;
        for (int k = 0; k < kStreams; k++) value += pre[k] * to_float(x[k * d + i]);
        u[token * d + i] = from_float<T>(value);
    }
}

// ---------------------------------------------------------------- collapse, bfloat16, by a cluster
//
// A cluster of 16 CTAs takes tiles of Tile tokens. CTA r owns columns [r * kSlice, ...) of all four
// streams: its part of fn stays in registers as tensor-core fragments, split into bfloat16 terms that
// add up to float32, and the streams are read from memory once, into a ring of shared-memory stages.
// For each tile it sends its share of token t's sums to CTA t, which gates them and sends the four
// pre weights back to all. Tile i is multiplied while i - 1 is gated and i - 2 collapsed, so nothing
// waits for another CTA. Columns are permuted alike in both operands, to make loads 16 bytes.

constexpr int kCluster = 16;
constexpr int kSlots = 4;       // exchange buffers; three tiles are under way at once
constexpr int kCombTiles = 32;  // tiles whose Sinkhorn one warp does at once, one token a lane

struct Streams {
    const bf16* x;  // [n, 4, d]
    int n;
    const float* fn;
    HyperParameters p;
    bf16* u;
    float *post, *comb;
};

// Tile: tokens, 16 or 8. Groups: 32-column groups a warp. Terms: of bfloat16 a weight. Blocks: of 8
// mixes, 3 or 1.
template <int Tile, int Groups, int Warps, int Terms, int Blocks, int Stages> struct Collapse {
    static constexpr int kTile = Tile, kThreads = 32 * Warps;
    static constexpr int kSlice = Groups * Warps * 8;  // columns of a stream a CTA
    static constexpr int kWidth = kCluster * kSlice;   // d
    static constexpr int kMix = 8 * Blocks;
    static constexpr int kSums = kMix + 4;  // the mixes, the sum of squares, three of nothing
    static constexpr int kRows = Blocks == 1 ? kStreams : kMixes;  // of fn
    static constexpr int kPitch = 2 * kStreams * kSlice + 64;  // bytes a token; 64 spread the banks
    static constexpr int kAhead = Stages - 3;  // tiles being read while three are worked on

    struct Shared {
        alignas(128) char x[Stages][Tile * kPitch];
        alignas(16) float partial[Warps][Tile * kSums + 8];  // 8 spread the banks
        alignas(16) float sums[kSlots][kCluster][kSums];  // of the token this CTA gates
        float4 pre[kSlots][Tile];
        float logits[kCombTiles][kCombs + 1];
        uint64_t loaded[Stages], summed[kSlots], gated[kSlots];
    };

    const Streams& in;
    Shared& s;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, t = lane % 4;
    const uint32_t rank = cluster_rank();
    uint32_t weight[Terms][Blocks][Groups][4];
    float scale = 0, base = 0;  // of mix `lane`

    __device__ Collapse(const Streams& in, Shared& s) : in(in), s(s) {
        if (lane >= kRows) return;
        scale = in.p.scale[kRows == kStreams || lane < kStreams ? 0 : lane < 2 * kStreams ? 1 : 2];
        base = in.p.base[lane];
    }

    __device__ int tiles() const {  // of this cluster, at least 1
        int all = (in.n + Tile - 1) / Tile, clusters = gridDim.x / kCluster;
        return (all - (int)blockIdx.x / kCluster + clusters - 1) / clusters;
    }
    __device__ int token_at(int i, int row) const {  // of tile i of this cluster
        return (blockIdx.x / kCluster + i * (gridDim.x / kCluster)) * Tile + row;
    }
    // The 32 columns of group g of this warp: which stream, and where in the CTA's slice of it.
    __device__ int stream_of(int g) const { return (warp * Groups + g) * 32 / kSlice; }
    __device__ int column_of(int g) const { return (warp * Groups + g) * 32 % kSlice; }

    __device__ void init_barriers() {
        if (threadIdx.x != 0) return;
        for (int i = 0; i < Stages; i++) barrier_init(&s.loaded[i], 1);
        for (int i = 0; i < kSlots; i++) {
            barrier_init(&s.summed[i], 1);
            barrier_init(&s.gated[i], 1);
        }
        fence_barrier_init();
        for (int i = 0; i < kSlots; i++) {
            barrier_expect(&s.summed[i], sizeof(s.sums[0]));
            barrier_expect(&s.gated[i], sizeof(s.pre[0]));
        }
    }

    __device__ void load_weights() {
#pragma unroll
        for (int block = 0; block < Blocks; block++)
#pragma unroll
            for (int g = 0; g < Groups; g++) {
                int64_t row = 8 * block + r;
                float4 v[2] = {};
                if (row < kRows) {
                    const float* from = in.fn + (row * kStreams + stream_of(g)) * kWidth +
                                        rank * kSlice + column_of(g) + 8 * t;
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

    // Starts to read tile i of this cluster, if there is one: a warp reads a token, a lane a stream.
    __device__ void start_read(int i) {
        constexpr uint32_t kBytes = 2 * kSlice;
        if (i >= tiles()) return;
        const int stage = i % Stages, left = in.n - token_at(i, 0), tokens = left < Tile ? left : Tile;
        if (threadIdx.x == 0) barrier_expect(&s.loaded[stage], tokens * kStreams * kBytes);
        if (lane < kStreams)
#pragma unroll 1  // registers are short
            for (int row = warp; row < tokens; row += Warps) {
                int64_t from = (int64_t)token_at(i, row) * kStreams + lane;
                bulk_load(s.x[stage] + row * kPitch + lane * kBytes,
                          in.x + from * kWidth + rank * kSlice, kBytes, &s.loaded[stage]);
            }
        __syncwarp();
    }

    // This warp's columns of tile i times fn, into s.partial.
    __device__ void multiply(int i) {
        float acc[Blocks][4] = {};
        float square[2] = {};
        barrier_wait(&s.loaded[i % Stages], i / Stages % 2);
#pragma unroll
        for (int g = 0; g < Groups; g++) {
            const char* from = s.x[i % Stages] + r * kPitch +
                               2 * (stream_of(g) * kSlice + column_of(g) + 8 * t);
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
            float* row = s.partial[warp] + (r + 8 * half) * kSums;
#pragma unroll
            for (int block = 0; block < Blocks; block++)
                *(float2*)(row + 8 * block + 2 * t) = {acc[block][2 * half],
                                                       acc[block][2 * half + 1]};
            row[kMix + t] = t == 0 ? square[half] : 0;
        }
    }

    // The CTA's sums of tile i, those of token `row` to CTA `row`. Four threads add up four of them.
    __device__ void send_sums(int i) {
        constexpr int kParts = kSums / 4;
        const int slot = i % kSlots, quarter = threadIdx.x % 4;
        for (int k = threadIdx.x / 4; k < Tile * kParts; k += kThreads / 4) {
            int row = k / kParts, part = k % kParts;
            float sum[4] = {};
#pragma unroll
            for (int w = 0; w < Warps; w += 4) {
                float4 v = *(const float4*)&s.partial[w + quarter][row * kSums + 4 * part];
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
    }

    // The first warp: the gates of this CTA's token of tile i; pre goes to all CTAs.
    __device__ void gate(int i) {
        constexpr bool kHead = Blocks == 1;
        if (rank >= Tile) return;
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
        if (lane >= kStreams && lane < 2 * kStreams) in.post[(int64_t)token * kStreams + lane - kStreams] = 2 * gate;
        if (lane >= 2 * kStreams) s.logits[i % kCombTiles][lane - 2 * kStreams] = logit;
    }

    // The same warp: comb of this CTA's tokens of the last tiles, up to i, one a lane.
    __device__ void combine(int i) {
        int last = i % kCombTiles;
        int token = token_at(i - last + lane, rank);
        __syncwarp();
        if (rank < Tile && lane <= last && token < in.n) {
            float c[kCombs];
#pragma unroll
            for (int k = 0; k < kCombs; k++) c[k] = s.logits[lane][k];
            sinkhorn(c, in.p.iters, in.p.eps);
#pragma unroll
            for (int k = 0; k < kCombs; k += 4)
                *(float4*)(in.comb + (int64_t)token * kCombs + k) = {c[k], c[k + 1], c[k + 2], c[k + 3]};
        }
        __syncwarp();
    }

    // u of tile i, this CTA's columns, by all warps but the first.
    __device__ void collapse(int i) {
        const int slot = i % kSlots;
        barrier_wait(&s.gated[slot], i / kSlots % 2);
#pragma unroll 1
        for (int k = threadIdx.x - 32; k < Tile * kSlice / 8; k += kThreads - 32) {
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
            store_floats(in.u + (int64_t)token * kWidth + rank * kSlice + column, value);
        }
        if (threadIdx.x == 32) barrier_expect(&s.gated[slot], sizeof(s.pre[0]));
    }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) collapse_kernel(const Streams in) {
    extern __shared__ char memory[];
    C c(in, *reinterpret_cast<typename C::Shared*>(memory));
    const int count = c.tiles();
    let_next_start();
    c.init_barriers();
    cluster_arrive();
    c.load_weights();  // while the kernel before may still run
    wait_for_previous();
    for (int i = 0; i < C::kAhead; i++) c.start_read(i);
    cluster_wait();
    for (int i = 0; i < count + 2; i++) {
        if (i < count) {
            __syncthreads();  // the sums of tile i - 1 are sent, i - 3 is collapsed
            c.start_read(i + C::kAhead);
            c.multiply(i);
            __syncthreads();
            c.send_sums(i);
        }
        if (c.warp > 0 && i >= 2) c.collapse(i - 2);
        if (c.warp == 0 && i >= 1 && i <= count) {
            c.gate(i - 1);
            if (C::kRows == kMixes && (i == count || i % kCombTiles == 0)) c.combine(i - 1);
        }
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

template <int M>
int collapse_any(const void* x, int dtype, int64_t n, int64_t d, const float* fn,
                 HyperParameters p, void* u, float* post, float* comb, void* stream) {
    return with_dtype(dtype, [&](auto tag) {
        using T = type_of<decltype(tag)>;
        return launch(collapse_any_kernel<T, M>, dim3(n), kThreads, 0, stream, (const T*)x, d, fn,
                      p, (T*)u, post, comb);
    });
}

// ---------------------------------------------------------------- expand

constexpr int kExpandThreads = 128;

// N columns a thread, `blocks` blocks a token.
template <class T, int N>
__global__ void __launch_bounds__(kExpandThreads)
    expand_kernel(const T* y, const T* x, const float* post, const float* comb, int64_t d, int blocks,
                  T* out) {
    using V = Vector<T, N>;
    let_next_start();
    int64_t token = blockIdx.x / blocks;
    int64_t column = ((int64_t)(blockIdx.x % blocks) * kExpandThreads + threadIdx.x) * N;
    wait_for_previous();
    if (column >= d) return;
    V in = *(const V*)(y + token * d + column);
    V streams[kStreams];
    x += token * kStreams * d + column;
#pragma unroll
    for (int j = 0; j < kStreams; j++) streams[j] = *(const V*)(x + j * d);
    float c[kCombs], a[kStreams];
#pragma unroll
    for (int i = 0; i < kStreams; i++) {
        a[i] = post[token * kStreams + i];
        *(float4*)(c + kStreams * i) = *(const float4*)(comb + token * kCombs + kStreams * i);
    }
    out += token * kStreams * d + column;
#pragma unroll
    for (int k = 0; k < kStreams; k++) {
        float value[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            value[i] = a[k] * to_float(in.at[i]);
#pragma unroll
            for (int j = 0; j < kStreams; j++)
                value[i] += c[j * kStreams + k] * to_float(streams[j].at[i]);
        }
        store_floats(out + k * d, value);
    }
}

template <class T, int N>
int expand(const T* y, const T* x, const float* post, const float* comb, int64_t n, int64_t d,
           T* out, void* stream) {
    int blocks = (int)ceil_div(d, kExpandThreads * N);
    return launch(expand_kernel<T, N>, dim3(n * blocks), kExpandThreads, 0, stream, y, x, post, comb,
                  d, blocks, out);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// x [n, 4, d] -> u [n, d] of the same dtype, post [n, 4], comb [n, 4, 4]; fn [24, 4 * d].
DSV4_EXPORT int dsv4_hc_pre(const void* x, int dtype, int64_t n, int64_t d, const float* fn,
                            const float* scale, const float* base, int64_t iters, float eps,
                            float norm_eps, void* u, float* post, float* comb, void* stream) {
    if (n == 0) return cudaSuccess;
    HyperParameters p = {scale, base, (int)iters, eps, norm_eps};
    Streams in = {(const bf16*)x, (int)n, fn, p, (bf16*)u, post, comb};
    int status = kUnsupported;
    if (dtype == DSV4_BF16 && d == 4096) status = collapse<Collapse<16, 2, 16, 3, 3, 5>>(in, stream);
    if (dtype == DSV4_BF16 && d == 7168) status = collapse<Collapse<8, 7, 8, 2, 3, 6>>(in, stream);
    if (status != kUnsupported) return status;
    return collapse_any<kMixes>(x, dtype, n, d, fn, p, u, post, comb, stream);
}

// x [n, 4, d] -> h [n, d] of the same dtype; fn [4, 4 * d].
DSV4_EXPORT int dsv4_hc_head(const void* x, int dtype, int64_t n, int64_t d, const float* fn,
                             const float* scale, const float* base, float eps, float norm_eps,
                             void* h, void* stream) {
    if (n == 0) return cudaSuccess;
    HyperParameters p = {scale, base, 0, eps, norm_eps};
    Streams in = {(const bf16*)x, (int)n, fn, p, (bf16*)h, nullptr, nullptr};
    int status = kUnsupported;
    if (dtype == DSV4_BF16 && d == 4096) status = collapse<Collapse<16, 2, 16, 3, 1, 5>>(in, stream);
    if (dtype == DSV4_BF16 && d == 7168) status = collapse<Collapse<8, 7, 8, 3, 1, 6>>(in, stream);
    if (status != kUnsupported) return status;
    return collapse_any<kStreams>(x, dtype, n, d, fn, p, h, nullptr, nullptr, stream);
}

// out[n, k] = post[n, k] * y[n] + sum over j of comb[n, j, k] * x[n, j]; y [n, d], x, out [n, 4, d].
DSV4_EXPORT int dsv4_hc_post(const void* y, const void* x, const float* post, const float* comb,
                             int dtype, int64_t n, int64_t d, void* out, void* stream) {
    return with_dtype(dtype, [&](auto tag) {
        using T = type_of<decltype(tag)>;
        constexpr int N = 16 / sizeof(T);
        auto run = d % N == 0 ? expand<T, N> : expand<T, 1>;
        return run((const T*)y, (const T*)x, post, comb, n, d, (T*)out, stream);
    });
}
