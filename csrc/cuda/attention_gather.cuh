// Gathering for the tensor-core attention: what a CTA works on, its shared memory, and the producers.
//
// A CTA takes one token after another: 64 of its heads and a share of its keys, 64 at a time. One
// warpgroup, two for packed pools, gathers keys into two stages, each in two halves of the width, in the
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
#include "hopper.cuh"
#include "kv_entry.cuh"

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
constexpr int kHalf = kDim / 2;

struct Shared {
    alignas(1024) char q[kTileBytes];
    alignas(1024) char keys[kStages][kTileBytes];
    alignas(1024) char weights[kStages][kHeads * kBlock * 2];  // 64 rows of 128 bytes, swizzled
    float most[kStages][kHeads];                               // largest logit so far, of a head
    float sums[2][2][kHeads];  // of odd and even tokens: of each warpgroup's weights
    uint64_t exists[kStages][2];  // a bit a key; one word a half, which lives as long
    uint64_t full[kStages][2], empty[kStages][2], weighed[kStages][2], q_full, q_empty, summed;
    alignas(16) char entries[kProducers<true> / 32][kAhead][kEntryBytes];
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

// Waits until a half of block g's stage is free; says which of its keys exist.
__device__ void open_half(Shared& s, int g, int half, int thread, uint64_t exists) {
    const int stage = g % kStages;
    if (g >= kStages) barrier_wait(&s.empty[stage][half], (g / kStages - 1) % 2);
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
    const int thread = threadIdx.x - kConsumers, unit = thread % 64;
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

// ---------------------------------------------------------------- packed pools
//
// A warp decodes an entry, 8 codes to the 16 bytes of one unit, into a row of a tile: lane l makes units l
// and l + 32, of which those from 56 on are rope values, not codes. Entries lie at multiples of 8 bytes.
struct EntryCodes {
    uint2 low = {}, high = {}, rope = {};
    uint8_t low_scale = 0, high_scale = 0;

    __device__ EntryCodes() {}  // of a row that does not exist: zeros
    __device__ EntryCodes(const char* entry, int lane)
        : low(*(const uint2*)(entry + 8 * lane)), low_scale(entry[kScalesAt + lane / 8]),
          high_scale(entry[kScalesAt + 4 + lane / 8]) {
        if (lane < 24) {
            high = *(const uint2*)(entry + 256 + 8 * lane);
        } else {
            const uint2* values = (const uint2*)(entry + kPlain + 16 * (lane - 24));
            high = values[0];
            rope = values[1];
        }
    }
    __device__ void store(char* tile, int row, int lane) const {
        *(uint4*)(tile + unit_offset(row, lane)) = decode_codes(low, scale_of(low_scale));
        uint4 unit = {high.x, high.y, rope.x, rope.y};
        if (lane < 24) unit = decode_codes(high, scale_of(high_scale));
        *(uint4*)(tile + unit_offset(row, lane + 32)) = unit;
    }
};

// Entries on their way from memory, in a ring of the warp's own; zero bytes where there is no row.
struct EntryRing {
    const int lane;
    char (&slots)[kAhead][kEntryBytes];

    // Starts copying a row.
    __device__ void fetch(int slot, const Pool& pool, int row) const {
        const int index = checked(pool, row);
        const char* entry = (const char*)pool.keys + (int64_t)max(index, 0) * kEntryBytes + 8 * lane;
        const uint32_t to = shared_address(slots[slot]) + 8 * lane;
        copy8(to, entry, index >= 0);
        copy8(to + 256, entry + 256, index >= 0);
        if (8 * lane < kEntryBytes - 512) copy8(to + 512, entry + 512, index >= 0);
    }
};

// Brings a row of a pool into the L2, but for what of it shares 16 bytes with a row beside.
__device__ inline void prefetch_entry(const Pool& pool, int row) {
    if (row < 0 || row >= pool.rows) return;
    const uint64_t entry = (uint64_t)pool.keys + (int64_t)row * kEntryBytes, from = (entry + 15) / 16 * 16;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(kEntryBytes / 16 * 16)
                 : "memory");
}

// A block, -1 for none, and its rows in its pool; the work that it begins, -1 for none.
struct Source {
    int block, begins;
    Indices rows;
    __device__ Source(const Blocks& at, bool first, int lane)
        : block(at.exist() ? at.block : -1), begins(first ? at.at : -1), rows(at.indices(lane)) {}
};

// The producers of packed pools: as `gather`.
__device__ void gather_packed(const Problem& p, Shared& s) {
    const int thread = threadIdx.x - kConsumers, warp = thread / 32, lane = thread % 32;
    constexpr int kOwn = kBlock / (kProducers<true> / 32);  // rows of a block that a warp decodes
    const EntryRing ring = {lane, s.entries[warp]};
    Blocks ahead(p);
    Source rows(ahead, true, lane);
    bool begins = ahead.advance();
    Source next(ahead, begins, lane);
    for (int r = 0; r < kAhead; r++) {
        ring.fetch(r, pool_of(p, rows.block), rows.rows.at(kOwn * warp, r));
        copy_commit();
    }
    int slot = 0;
    for (int g = 0, turn = 0; rows.block >= 0; g++) {
        if (rows.begins >= 0) next_q<true>(p, rows.begins, s, turn++);
        char* tile = s.keys[g % kStages];
        const uint64_t exists = rows.rows.exist();
#pragma unroll 1
        for (int half = 0; half < 2; half++) open_half(s, g, half, thread, exists);
#pragma unroll 1
        for (int r = 0; r < kOwn; r++) {
            copy_wait<kAhead - 1>();
            __syncwarp();
            const EntryCodes codes(ring.slots[slot], lane);
            __syncwarp();
            const bool wraps = r + kAhead >= kOwn;
            const Indices from = {wraps ? next.rows.low : rows.rows.low,
                                  wraps ? next.rows.high : rows.rows.high};
            ring.fetch(slot, pool_of(p, wraps ? next.block : rows.block),
                       from.at(kOwn * warp, (r + kAhead) % kOwn));
            copy_commit();
            slot = slot + 1 == kAhead ? 0 : slot + 1;
            codes.store(tile, kOwn * warp + r, lane);
        }
        fence_async_proxy();
        for (int half = 0; half < 2; half++) barrier_arrive(&s.full[g % kStages][half]);
        rows = next;
        begins = ahead.advance();
        next = Source(ahead, begins, lane);
        const int row = next.rows.at(kOwn * warp, lane % kOwn);
        if (lane < kOwn && next.block >= 0) prefetch_entry(pool_of(p, next.block), row);
    }
    copy_wait<0>();
}

}  // namespace dsv4
