// Indexer scores of one token a sequence, of bfloat16, 64 heads of 128. Problem: what all kernels of scores are given.
//
// Bound by reading the entries: the copy engine brings them into a ring, 64 at a time; a warpgroup takes
// them as the left operand of wgmma from registers, and the query, permuted alike, is the right one.
#pragma once

#include "dispatch.cuh"
#include "rope.cuh"
#include "wgmma.cuh"

namespace dsv4 {

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

constexpr int kDim = 128, kHeads = 64;
constexpr int kTile = 64, kTileThreads = 128;  // entries, and the threads that score them

struct QueryShared {
    alignas(1024) char q[2][kHeads * 128];  // halves of the columns, 128-byte swizzle
    float weight[kHeads];
};
struct alignas(128) TileShared {
    char keys[kTile * 2 * kDim];
};

// A thread's part of a token's query and of what its scores need, all loads at once: of every eighth head the same
// eight columns. One block of a token says `keeps_turned`.
template <bool Rope> struct TokenQuery {
    static constexpr int kChunks = kDim / 8, kEach = kHeads * kChunks / kTileThreads;
    uint4 part[kEach];
    float weight;
    int64_t position;

    __device__ TokenQuery(const Problem& p, int64_t token, bool keeps_turned) {
        const uint4* from = (const uint4*)((const bf16*)p.q + token * kHeads * kDim) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < kEach; i++) part[i] = from[i * kTileThreads];
        position = p.positions[token];
        weight = p.weight(token * kHeads + threadIdx.x % kHeads);
        if constexpr (Rope) {
            turn_pairs(p);
            if (keeps_turned && p.turned) keep((uint4*)(p.turned + token * kHeads * kDim) + threadIdx.x);
        }
    }
    // The same numbers as op rope.
    __device__ void turn_pairs(const Problem& p) {
        static_assert(kTileThreads % kChunks == 0);
        const int first = threadIdx.x % kChunks * 4 - (kDim / 2 - p.half);  // of four pairs
        if (first < 0) return;
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
    __device__ void keep(uint4* to) const {
#pragma unroll
        for (int i = 0; i < kEach; i++) to[i * kTileThreads] = part[i];
    }
    // Columns 32 g + 8 t + 4 s + 2 h + {0, 1} of every head go to 32 g + 16 s + 8 h + 2 t + {0, 1}.
    __device__ void store(QueryShared& to) const {
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
template <class F> __device__ void score_tile(const QueryShared& s, const char* keys, float (&dot)[32],
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
        wgmma(dot, low[g].x, high[g].x, low[g].y, high[g].y, b, g > 0);
        wgmma(dot, low[g].z, high[g].z, low[g].w, high[g].w, b + (32 >> 4), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
}

// The score of entry entry_of_thread() of a tile, where that is not negative: sum over heads of weight * relu(dot).
__device__ inline float tile_score(const QueryShared& s, const float (&dot)[32]) {
    const int t = threadIdx.x % 4;
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
    return t ? score[1] : score[0];
}

// The entry of a tile that this thread has in the end; negative: none.
__device__ inline int entry_of_thread() {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    return t < 2 ? (int)threadIdx.x / 32 * 16 + 8 * t + r : -1;
}

constexpr int kRing = 4, kTileBlocks = 2;  // tiles on their way in a block, blocks a processor

struct TokenShared {
    QueryShared query;
    TileShared tiles[kRing];
    uint64_t loaded[kRing];
};

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
        bulk_load(s.tiles[i % kRing].keys, keys + (int64_t)first * 2 * kDim, bytes, &s.loaded[i % kRing]);
    };
    const int tiles = (end - begin + kTile - 1) / kTile, ahead = min(tiles, kRing);
    if (threadIdx.x == 0)  // does not wait to know what is visible
        for (int i = 0; i < ahead; i++) load(i);
    const TokenQuery<Rope> query(p, token, blockIdx.x == 0);
    query.store(s.query);
    const int visible = p.visible_at(query.position);
    const int loads = max(ahead, min(tiles, (visible - begin + kTile - 1) / kTile));
    fence_async_proxy();
    __syncthreads();
    for (int i = 0; i < tiles; i++) {
        float dot[32];
        if (i < loads) {
            barrier_wait(&s.loaded[i % kRing], i / kRing % 2);
            score_tile(s.query, s.tiles[i % kRing].keys, dot, [&] {
                __syncthreads();
                if (threadIdx.x == 0 && i + kRing < loads) load(i + kRing);
            });
        }
        const int mine = entry_of_thread(), entry = begin + i * kTile + mine;
        const float score = tile_score(s.query, dot);
        if (mine >= 0 && entry < end) p.score[token * p.total + entry] = entry < visible ? score : -INFINITY;
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

}  // namespace dsv4
