// Op index_score: score every visible compressed entry of a sequence for every token; with the rope of its queries.

#include "dispatch.cuh"
#include "hopper.cuh"
#include "rope.cuh"

namespace dsv4 {
namespace {

struct Problem {
    const void* q;             // [n, heads, dim]
    const void* keys;          // [sequences, capacity, dim]
    const void* weights;       // [n, heads]
    const int64_t* sequence;   // [n], null where token i is all of sequence i
    const int64_t* positions;  // [n]
    int64_t n, capacity, total;
    int heads, dim, ratio;
    float scale;
    bool float_weights;
    float* score;  // [n, total]
    // Where the queries' rope is yet to come: of the last 2 * half dims. Turned queries go to `turned` if not null.
    const float* freqs;
    int half;
    bf16* turned;

    __device__ int64_t sequence_of(int64_t token) const { return sequence ? sequence[token] : token; }
    // How many entries a token may see.
    __device__ int visible(int64_t token) const { return visible_at(positions[token]); }
    __device__ int visible_at(int64_t position) const { return (int)(position + 1) / ratio; }
    __device__ float weight(int64_t i) const {
        float w = float_weights ? ((const float*)weights)[i] : to_float(((const bf16*)weights)[i]);
        return w * scale;
    }
};

// max(x, 0) that keeps NaN.
__device__ inline float relu(float x) {
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
    return x;
}

// ---------------------------------------------------------------- any dtype and width

constexpr int kAnyWarps = 8;

// One warp an entry of one token.
template <class T>
__global__ void __launch_bounds__(32 * kAnyWarps) score_any_kernel(Problem p) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32;
    int64_t entry = (int64_t)blockIdx.x * kAnyWarps + threadIdx.x / 32, token = blockIdx.y;
    if (entry >= p.total) return;
    float score = -INFINITY;
    if (entry < p.visible(token)) {
        const T* key = (const T*)p.keys + (p.sequence_of(token) * p.capacity + entry) * p.dim;
        const T* q = (const T*)p.q + token * p.heads * p.dim;
        score = 0;
        for (int h = 0; h < p.heads; h++) {
            float dot = 0;
            for (int i = lane; i < p.dim; i += 32) dot += to_float(q[h * p.dim + i]) * to_float(key[i]);
            score += p.weight(token * p.heads + h) * relu(warp_sum(dot));
        }
    }
    if (lane == 0) p.score[token * p.total + entry] = score;
}

// ---------------------------------------------------------------- bfloat16, 128 wide, many tokens
//
// A warp keeps 32 entries in registers as the left operand and runs through tokens; the heads of a
// token's query, in shared memory, are the columns of the product. Columns are permuted alike in both
// operands, so that all loads are 16 bytes.

constexpr int kDim = 128, kMostHeads = 64;
constexpr int kWarps = 8, kEntries = 32 * kWarps;
constexpr int kPitch = 2 * kDim + 64;  // bytes a head of the query; 64 spread the banks

struct Query {
    alignas(16) char q[kMostHeads * kPitch];
    float weight[kMostHeads];
};

// Starts the copy of a token's query; its weights are there after the next barrier.
__device__ void load_query(const Problem& p, int64_t token, Query& to) {
    const bf16* from = (const bf16*)p.q + token * p.heads * kDim;
    for (int i = threadIdx.x; i < p.heads * (kDim / 8); i += blockDim.x)
        copy16(shared_address(to.q) + i / 16 * kPitch + i % 16 * 16, from + i * 8, true);
    if (threadIdx.x < p.heads) to.weight[threadIdx.x] = p.weight(token * p.heads + threadIdx.x);
}

// 32 entries from `first`: [tile][row r or r + 8][columns 32 g + 8 t ...]; zeros past the pool.
struct Entries {
    uint4 at[2][2][kDim / 32];

    __device__ void load(const Problem& p, int64_t sequence, int64_t first) {
        const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64_t entry = first + 16 * tile + 8 * half + r;
                const bf16* from = (const bf16*)p.keys + (sequence * p.capacity + entry) * kDim;
#pragma unroll
                for (int g = 0; g < kDim / 32; g++)
                    at[tile][half][g] =
                        entry < p.capacity ? load_once(from + 32 * g + 8 * t) : uint4{};
            }
    }
};

// score[tile][half] += sum over 8 heads of weight * relu(q . entry), this thread's two columns.
__device__ inline void score_heads(const Query& query, const Entries& entries, int head,
                                   float (&score)[2][2]) {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float dot[2][4] = {};
#pragma unroll
    for (int g = 0; g < kDim / 32; g++) {
        uint4 b = *(const uint4*)(query.q + (head + r) * kPitch + 64 * g + 16 * t);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint4 low = entries.at[tile][0][g], high = entries.at[tile][1][g];
            mma(dot[tile], low.x, high.x, low.y, high.y, b.x, b.y);
            mma(dot[tile], low.z, high.z, low.w, high.w, b.z, b.w);
        }
    }
    float2 w = *(const float2*)(query.weight + head + 2 * t);
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            score[tile][half] += w.x * relu(dot[tile][2 * half]) + w.y * relu(dot[tile][2 * half + 1]);
}

// The scores of a warp's entries for one token.
__device__ inline void score_entries(const Problem& p, const Query& query, const Entries& entries,
                                     int64_t token, int64_t first, int64_t visible) {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float score[2][2] = {};
    if (first < visible) {
#pragma unroll 2
        for (int head = 0; head < p.heads; head += 8) score_heads(query, entries, head, score);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float& s = score[i / 2][i % 2];
        s += __shfl_xor_sync(~0u, s, 1);
        s += __shfl_xor_sync(~0u, s, 2);
    }
    // Lane 4 r + t writes entry 8 t + r.
    float mine = t < 2 ? (t == 0 ? score[0][0] : score[0][1]) : t == 2 ? score[1][0] : score[1][1];
    int64_t entry = first + 8 * t + r;
    if (entry < p.total) p.score[token * p.total + entry] = entry < visible ? mine : -INFINITY;
}

// Entries [256 x, ...) for tokens [y * tokens, ...).
__global__ void __launch_bounds__(32 * kWarps, 2) score_kernel(Problem p, int64_t tokens) {
    __shared__ Query query[2];
    let_next_start();
    wait_for_previous();
    const int64_t begin = blockIdx.y * tokens;
    const int64_t end = begin + tokens < p.n ? begin + tokens : p.n;
    const int64_t first = (int64_t)blockIdx.x * kEntries + threadIdx.x / 32 * 32;
    Entries entries;
    int64_t loaded = -1;
    load_query(p, begin, query[0]);
    copy_commit();
    for (int64_t token = begin; token < end; token++) {
        const int64_t visible = p.visible(token), sequence = p.sequence_of(token);
        if (sequence != loaded && first < visible) {
            entries.load(p, sequence, first);
            loaded = sequence;
        }
        if (token + 1 < end) load_query(p, token + 1, query[(token + 1 - begin) % 2]);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        score_entries(p, query[(token - begin) % 2], entries, token, first, visible);
        __syncthreads();  // the query has been read
    }
}

// ---------------------------------------------------------------- bfloat16, 128 wide, 64 heads, one token
//
// Bound by reading the entries: the copy engine brings them into a ring, 64 at a time; a warpgroup takes
// them as the left operand of wgmma from registers, and the query, permuted alike, is the right one.

constexpr int kTile = 64, kHeads = 64, kTileThreads = 128;
constexpr int kRing = 4, kTileBlocks = 2;  // tiles on their way in a block, blocks a processor

struct TokenShared {
    alignas(1024) char q[2][kHeads * 128];  // halves of the columns, 128-byte swizzle
    alignas(128) char keys[kRing][kTile * 2 * kDim];
    float weight[kHeads];
    uint64_t loaded[kRing];
};

// A thread's part of a token's query and of what its scores need, all loads at once: of every eighth head
// the same eight columns.
template <bool Rope> struct TokenQuery {
    static constexpr int kChunks = kDim / 8, kEach = kHeads * kChunks / kTileThreads;
    uint4 part[kEach];
    float weight;
    int64_t position;

    __device__ TokenQuery(const Problem& p, int64_t token) {
        const uint4* from = (const uint4*)((const bf16*)p.q + token * kHeads * kDim) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < kEach; i++) part[i] = from[i * kTileThreads];
        position = p.positions[token];
        weight = p.weight(token * kHeads + threadIdx.x % kHeads);
        if constexpr (Rope) turn_pairs(p, token);
    }
    // The same numbers as op rope.
    __device__ void turn_pairs(const Problem& p, int64_t token) {
        static_assert(kTileThreads % kChunks == 0);
        const int first = threadIdx.x % kChunks * 4 - (kDim / 2 - p.half);  // of four pairs
        if (first >= 0) {
            const float4 freqs = *(const float4*)(p.freqs + first);
            const float2 turns[4] = {turn(position, freqs.x, false), turn(position, freqs.y, false),
                                     turn(position, freqs.z, false), turn(position, freqs.w, false)};
#pragma unroll
            for (int i = 0; i < kEach; i++) {
                uint32_t* pairs = &part[i].x;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 pair = turned_pair(low_bf16(pairs[j]), high_bf16(pairs[j]), turns[j]);
                    pairs[j] = pack_bf16(pair.x, pair.y);
                }
            }
        }
        if (p.turned == nullptr || blockIdx.x != 0) return;
        uint4* to = (uint4*)(p.turned + token * kHeads * kDim) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < kEach; i++) to[i * kTileThreads] = part[i];
    }
    // Columns 32 g + 8 t + 4 s + 2 h + {0, 1} of every head go to 32 g + 16 s + 8 h + 2 t + {0, 1}.
    __device__ void store(TokenShared& to) const {
        if (threadIdx.x < kHeads) to.weight[threadIdx.x] = weight;
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int at = i * kTileThreads + threadIdx.x, head = at / 16, g = at % 16 / 4, t = at % 4;
            const uint32_t words[4] = {part[i].x, part[i].y, part[i].z, part[i].w};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const int chunk = (4 * (g % 2) + w) ^ head % 8;  // of 16 bytes
                *(uint32_t*)(to.q[g / 2] + head * 128 + chunk * 16 + 4 * t) = words[w];
            }
        }
    }
};

// dot = the tile of `keys` times the query; the keys have been read once all threads are past `read`.
template <class F> __device__ void score_tile(const TokenShared& s, const char* keys, float (&dot)[32],
                                              F read) {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char* from = keys + (threadIdx.x / 32 * 16 + r) * 2 * kDim + 16 * t;
    uint4 low[kDim / 32], high[kDim / 32];
#pragma unroll
    for (int g = 0; g < kDim / 32; g++) {
        const int at = 64 * (g ^ r % 2);  // odd rows swap groups: else two rows share banks
        low[g] = *(const uint4*)(from + at);
        high[g] = *(const uint4*)(from + 8 * 2 * kDim + at);
    }
    const bool odd = r % 2;
#pragma unroll
    for (int g = 0; g < kDim / 32; g += 2) {
        const uint4 a = low[g], b = low[g + 1], c = high[g], d = high[g + 1];
        low[g] = odd ? b : a, low[g + 1] = odd ? a : b;
        high[g] = odd ? d : c, high[g + 1] = odd ? c : d;
    }
    read();
    wgmma_fence();
#pragma unroll
    for (int g = 0; g < kDim / 32; g++) {
        uint64_t b = matrix_descriptor(shared_address(s.q[g / 2]) + g % 2 * 64, 0, 1024);
        wgmma_64x64(dot, low[g].x, high[g].x, low[g].y, high[g].y, b, g > 0);
        wgmma_64x64(dot, low[g].z, high[g].z, low[g].w, high[g].w, b + (32 >> 4), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
}

// Writes the scores of a tile: sum over heads of weight * relu(dot).
__device__ inline void write_scores(const Problem& p, const TokenShared& s, const float (&dot)[32],
                                    int64_t token, int first, int end, int visible) {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float score[2] = {};
#pragma unroll
    for (int i = 0; i < kHeads / 8; i++) {
        float2 w = *(const float2*)(s.weight + 8 * i + 2 * t);
#pragma unroll
        for (int half = 0; half < 2; half++)
            score[half] += w.x * relu(dot[4 * i + 2 * half]) + w.y * relu(dot[4 * i + 2 * half + 1]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        score[half] += __shfl_xor_sync(~0u, score[half], 1);
        score[half] += __shfl_xor_sync(~0u, score[half], 2);
    }
    int entry = first + threadIdx.x / 32 * 16 + 8 * t + r;
    if (t < 2 && entry < end)
        p.score[token * p.total + entry] = entry < visible ? t ? score[1] : score[0] : -INFINITY;
}

// Entries [x * share, ...) for token y.
template <bool Rope>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) score_token_kernel(Problem p, int share) {
    extern __shared__ __align__(1024) char memory[];
    TokenShared& s = *reinterpret_cast<TokenShared*>(memory);
    const int64_t token = blockIdx.y;
    const int begin = blockIdx.x * share, end = min(begin + share, (int)p.total);
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kRing; i++) barrier_init(&s.loaded[i], 1);
        fence_barrier_init();
    }
    wait_for_previous();
    const char* keys = (const char*)p.keys + p.sequence_of(token) * p.capacity * 2 * kDim;
    auto load = [&](int i) {
        const int first = begin + i * kTile, bytes = min(kTile, end - first) * 2 * kDim;
        barrier_expect(&s.loaded[i % kRing], bytes);
        bulk_load(s.keys[i % kRing], keys + (int64_t)first * 2 * kDim, bytes, &s.loaded[i % kRing]);
    };
    const int tiles = (end - begin + kTile - 1) / kTile, ahead = min(tiles, kRing);
    if (threadIdx.x == 0)  // does not wait to know what is visible
        for (int i = 0; i < ahead; i++) load(i);
    const TokenQuery<Rope> query(p, token);
    query.store(s);
    const int visible = p.visible_at(query.position);
    const int loads = max(ahead, min(tiles, (visible - begin + kTile - 1) / kTile));
    fence_async_proxy();
    __syncthreads();
    for (int i = 0; i < tiles; i++) {
        float dot[32];
        if (i < loads) {
            barrier_wait(&s.loaded[i % kRing], i / kRing % 2);
            score_tile(s, s.keys[i % kRing], dot, [&] {
                __syncthreads();
                if (threadIdx.x == 0 && i + kRing < loads) load(i + kRing);
            });
        }
        write_scores(p, s, dot, token, begin + i * kTile, end, visible);
    }
}

template <bool Rope> int score_tokens(const Problem& p, int64_t processors, void* stream) {
    static const int allowed = allow_shared(score_token_kernel<Rope>, sizeof(TokenShared));
    if (allowed) return allowed;
    int64_t blocks = kTileBlocks * processors / p.n, share = ceil_div(p.total, blocks ? blocks : 1);
    share = share < kTile ? kTile : ceil_div(share, 16) * 16;
    return launch(score_token_kernel<Rope>, dim3(ceil_div(p.total, share), p.n), kTileThreads,
                  sizeof(TokenShared), stream, p, (int)share);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// score [n, total] float32 = scale * sum over heads of weights * relu(q . key), -inf where an entry
// j >= (positions[n] + 1) / ratio. q [n, heads, dim], keys [sequences, capacity, dim] of `dtype`,
// weights [n, heads] of `weights_dtype`; token i belongs to sequence[i], or to sequence i where that is
// null. A block takes `tokens` tokens one after another.
DSV4_EXPORT int dsv4_index_score(const void* q, const void* keys, int dtype, const void* weights,
                                 int weights_dtype, const int64_t* sequence,
                                 const int64_t* positions, int64_t ratio, int64_t n, int64_t heads,
                                 int64_t dim, int64_t capacity, int64_t total, float scale,
                                 int64_t tokens, int64_t processors, float* score, void* stream) {
    Problem p = {q, keys, weights, sequence, positions, n, capacity, total, (int)heads, (int)dim,
                 (int)ratio, scale, weights_dtype == DSV4_F32, score, nullptr, 0, nullptr};
    if (total == 0 || n == 0) return cudaSuccess;
    if (total > 1 << 30) return kUnsupported;
    const bool fits = dtype == DSV4_BF16 && dim == kDim;
    if (fits && heads == kHeads && tokens == 1) return score_tokens<false>(p, processors, stream);
    if (fits && heads % 8 == 0 && heads <= kMostHeads) {
        dim3 grid(ceil_div(total, kEntries), ceil_div(n, tokens));
        return launch(score_kernel, grid, 32 * kWarps, 0, stream, p, tokens);
    }
    return with_dtype(dtype, [&](auto tag) {
        dim3 grid(ceil_div(total, kAnyWarps), n);
        return launch(score_any_kernel<type_of<decltype(tag)>>, grid, 32 * kAnyWarps, 0, stream, p);
    });
}

// The same of one token a sequence, with q [n, 64, 128] bfloat16 before its rope by positions and freqs
// [half], half a multiple of 4; turned [n, 64, 128] receives q after it, or is null.
DSV4_EXPORT int dsv4_rope_index_score(const void* q, const float* freqs, int64_t half, void* turned,
                                      const void* keys, const void* weights, int weights_dtype,
                                      const int64_t* positions, int64_t ratio, int64_t n,
                                      int64_t capacity, int64_t total, float scale,
                                      int64_t processors, float* score, void* stream) {
    if (total > 1 << 30 || half % 4 || 2 * half > kDim) return kUnsupported;
    if (total == 0 || n == 0) return cudaSuccess;
    const Problem p = {q, keys, weights, nullptr, positions, n, capacity, total, kHeads, kDim,
                       (int)ratio, scale, weights_dtype == DSV4_F32, score, freqs, (int)half, (bf16*)turned};
    return score_tokens<true>(p, processors, stream);
}
