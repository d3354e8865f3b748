// Gathering for the tensor-core attention: what a CTA works on, its shared memory, and the producers.
//
// A CTA takes one token after another: 64 of its heads and a share of its keys, 64 at a time. One
// warpgroup, two for packed pools (attention_packed.cuh), gathers keys into two stages, each in two halves of the width, in the
// layout that wgmma reads both as K (contracted over the width) and as V (contracted over keys). Two
// warpgroups multiply (attention_tile.cuh). Two shares of a token are a cluster and join; otherwise the
// unnormalised sums go to memory, and a second kernel combines them.
//
// Blocks are counted through all tokens of a CTA: block g lies in stage g % 2, and phase g / 2 of every
// barrier of that stage belongs to it.
//
//   barrier            arrives                            waits                  meaning
//   full[stage][half]  the producers' copies              both who read it       the half is there
//   empty[stage][half] warpgroup `half`, after its p v    producers              it may be overwritten
//   weighed[stage][i]  warpgroup `stage`, after softmax   the other warpgroup    weights of 32 keys, and
//                                                                                 the largest logits
//   q_full, q_empty    producers; both, after q k^T       both; producers        q of the next token
//   summed             both, after a token                both                   sums of weights
//
// Warpgroup `stage` alone computes the logits of its blocks; as the other waits for their weights before
// its p v, empty[stage][half] says that nobody reads the half, the weights or the largest logits any more.
// Every thread arrives, also where one of its warp would do: what it has read or written is then released
// by itself, which compute-sanitizer can follow.
#pragma once

#include "attention.cuh"
#include "kv_entry.cuh"
#include "wgmma.cuh"

namespace dsv4 {

constexpr int kDim = 512, kPlain = 448;             // head width; of it without rope, in packed pools
constexpr int kHeads = 64, kBlock = 64;             // heads and keys of a tile
constexpr int kStages = 2, kConsumers = 256;
// Threads that gather: decoding takes two warpgroups.
template <bool kPacked> constexpr int kProducers = kPacked ? 256 : 128;
constexpr int kChunk = 64 * 128;              // bytes: 64 rows of 64 elements, 128-byte swizzle
constexpr int kTileBytes = kBlock * kDim * 2;  // 8 chunks
constexpr int kScalesAt = EntryLayout{kDim, kPlain}.scales_at(), kEntryBytes = kScalesAt + kScaleBytes;
constexpr int kAhead = 3;  // packed rows that a producer warp has under way
constexpr int kSlotBytes = (kEntryBytes + 15) / 16 * 16;  // for one of them
constexpr int kHalf = kDim / 2;

struct Shared {
    alignas(1024) char q[kTileBytes];
    alignas(1024) char keys[kStages][kTileBytes];
    alignas(1024) char weights[kStages][kHeads * kBlock * 2];  // 64 rows of 128 bytes, swizzled
    float most[kStages][kHeads];                               // largest logit so far, of a head
    float sums[2][2][kHeads];  // of odd and even tokens: of each warpgroup's weights
    uint64_t exists[kStages][2];  // a bit a key; one word a half, which lives as long
    uint64_t full[kStages][2], empty[kStages][2], weighed[kStages][2], q_full, q_empty, summed;
    alignas(16) char entries[kProducers<true> / 32][kAhead][kSlotBytes];
};

struct Problem {
    const bf16* q;
    Keys keys;
    const float* sink;
    float scale;
    int heads;
    int works;              // tokens times groups of 64 heads times shares
    int shares, per_share;  // of a token's key blocks, and blocks in one
    bf16* o;
    float* lse;
    float* part;         // [n, heads, shares, 512] unnormalised
    Softmax* part_sums;  // [n, heads, shares]
    // The last kDim - kPlain dimensions of o turned back, unless null: of each token, of each pair.
    const int64_t* positions;
    const float* freqs;
    bf16* unturned;  // o before that, or null
    bool beside;     // does not wait for the kernel before
};

__host__ __device__ inline int blocks_of(int64_t keys) { return (keys + kBlock - 1) / kBlock; }

// One of a CTA's works: which token, heads and blocks of keys.
struct Work {
    int token, head, heads, share, first, last;

    __device__ Work(const Problem& p, unsigned at) {
        const unsigned groups = (p.heads + kHeads - 1) / kHeads;
        share = at % p.shares;
        at /= p.shares;
        head = at % groups * kHeads;
        token = at / groups;
        heads = p.heads - head < kHeads ? p.heads - head : kHeads;
        int blocks = blocks_of(p.keys.window.width) + blocks_of(p.keys.entries.width);
        first = share * p.per_share;
        last = first + p.per_share < blocks ? first + p.per_share : blocks;
    }
};

// A CTA takes every works_at_once()-th work. Shares that are a cluster lie along z.
__device__ inline int first_work() { return blockIdx.x * gridDim.z + blockIdx.z; }
__device__ inline int works_at_once() { return gridDim.x * gridDim.z; }

// Where 16-byte unit `unit` (0 to 63) of row `row` lies in a tile.
__device__ inline uint32_t unit_offset(int row, int unit) {
    return unit / 8 * kChunk + row * 128 + ((unit % 8 ^ row % 8) << 4);
}

// The pool of a token's block of keys: first those of the window, then those of the entries.
__device__ inline Pool pool_of(const Problem& p, int block) {
    return p.keys.pick(block >= blocks_of(p.keys.window.width));
}

// The row in its pool of key `row` of a token's block, -1 for none.
__device__ inline int index_of(const Problem& p, int token, int block, int row) {
    const int blocks = blocks_of(p.keys.window.width);
    const Pool pool = pool_of(p, block);
    const int column = (block - (block >= blocks ? blocks : 0)) * kBlock + row;
    return column < pool.width ? pool.index[(int64_t)token * pool.width + column] : -1;
}
// Apart from index_of, so that a load can be under way for long.
__device__ inline int checked(const Pool& pool, int index) {
    if (index >= pool.rows) __trap();
    return index;
}

// A block's 64 rows in their pool, of which lane l of each warp knows those of keys l and l + 32.
struct Indices {
    int low, high;
    __device__ Indices(int low, int high) : low(low), high(high) {}
    __device__ Indices(const Problem& p, int token, int block, int lane)
        : low(index_of(p, token, block, lane)), high(index_of(p, token, block, lane + 32)) {}
    // Which keys exist, a bit each.
    __device__ uint64_t exist() const {
        return __ballot_sync(~0u, low >= 0) | (uint64_t)__ballot_sync(~0u, high >= 0) << 32;
    }
    // That of key first + row of the same 32 as `first`; `row` may differ between lanes.
    __device__ int at(int first, int row) const {
        return __shfl_sync(~0u, first < 32 ? low : high, (first + row) % 32);
    }
};

// A producer's part of a block of keys: 16 bytes of every chunk of four rows. Eight lanes share a row.
struct Part {
    const int row, unit;  // the first of rows `row` + 4 i, and within a chunk
    Pool pool;
    int index[4];

    __device__ Part(const Pool& pool, const Indices& rows, int warp, int lane)
        : row(16 * warp + lane / 8), unit(lane % 8), pool(pool) {
#pragma unroll
        for (int i = 0; i < 4; i++) index[i] = checked(pool, rows.at(16 * warp, lane / 8 + 4 * i));
    }
    // Starts copying half of the width; zeros where there is no row.
    __device__ void copy_half(const char* tile, int half) const {
        const uint32_t to = shared_address(tile) + half * (kTileBytes / 2);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const char* from = (const char*)pool.keys + (int64_t)max(index[i], 0) * (2 * kDim) +
                               half * kDim + 16 * unit;
#pragma unroll
            for (int chunk = 0; chunk < 4; chunk++)
                copy16(to + unit_offset(row + 4 * i, 8 * chunk + unit), from + chunk * 128,
                       index[i] >= 0);
        }
    }
};

// Until a half of block g's stage is free.
__device__ inline void wait_until_empty(Shared& s, int g, int half) {
    if (g >= kStages) barrier_wait(&s.empty[g % kStages][half], (g / kStages - 1) % 2);
}

// Waits until a half of block g's stage is free; says which of its keys exist.
__device__ void open_half(Shared& s, int g, int half, int thread, uint64_t exists) {
    const int stage = g % kStages;
    wait_until_empty(s, g, half);
    if (thread == 0) {
        s.exists[stage][half] = exists;
        barrier_arrive(&s.full[stage][half]);
    }
}

// The blocks of all works of a CTA, one after another; from the end on there are none.
struct Blocks {
    const Problem& p;
    int at, token;    // of the work
    int block, left;  // of the work's; from this one on

    __device__ Blocks(const Problem& p) : p(p), at(first_work()) { begin(); }
    __device__ void begin() {
        const Work work(p, at);
        token = work.token;
        block = work.first;
        left = work.last - work.first;
    }
    __device__ bool exist() const { return at < p.works; }
    // True where the next block begins a work.
    __device__ bool advance() {
        block++;
        if (--left > 0) return false;
        at += works_at_once();
        begin();
        return true;
    }
    __device__ Indices indices(int lane) const {
        return exist() ? Indices(p, token, block, lane) : Indices(-1, -1);
    }
};

// q of work `at`, number `turn` of this CTA, once the one before is no longer read; heads that do not
// exist are zeros.
template <bool kPacked>
__device__ void next_q(const Problem& p, int at, Shared& s, int turn) {
    constexpr int kThreads = kProducers<kPacked>;
    int thread = threadIdx.x - kConsumers;
    asm volatile("" : "+r"(thread));  // so that addresses are computed anew, not kept in registers
    const int unit = thread % 64;
    const Work work(p, at);
    if (turn > 0) barrier_wait(&s.q_empty, (turn - 1) % 2);
    int row = thread / 64;
    const bf16* from =
        p.q + ((int64_t)work.token * p.heads + work.head + row) * kDim + 8 * unit;
#pragma unroll 2
    for (; row < kHeads; row += kThreads / 64, from += kThreads / 64 * kDim) {
        const bool exists = row < work.heads;
        copy16(shared_address(s.q) + unit_offset(row, unit), exists ? from : p.q, exists);
    }
    copy_arrive(&s.q_full);
}

// The producers of bfloat16 pools: q of every work, then its blocks of keys into the stage that is free;
// rows that do not exist are zeros, so that 0 * row is 0.
__device__ void gather(const Problem& p, Shared& s) {
    const int thread = threadIdx.x - kConsumers, warp = thread / 32, lane = thread % 32;
    Blocks now(p);
    Indices next = now.indices(lane);
    bool begins = true;
    for (int g = 0, turn = 0; now.exist(); g++) {
        if (begins) next_q<false>(p, now.at, s, turn++);
        const Indices rows = next;
        const uint64_t exists = rows.exist();
        const Part part(pool_of(p, now.block), rows, warp, lane);
        begins = now.advance();
        next = now.indices(lane);
#pragma unroll 1
        for (int i = 0; i < 2; i++) {
            const int half = i ^ g % kStages;  // first the one that its warpgroup starts with
            open_half(s, g, half, thread, exists);
            if (exists) part.copy_half(s.keys[g % kStages], half);
            copy_arrive(&s.full[g % kStages][half]);
        }
    }
    copy_commit();
    copy_wait<0>();
}

}  // namespace dsv4
