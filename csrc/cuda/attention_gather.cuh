// Gathering for the tensor-core attention: what a CTA works on, its shared memory, and the producers.
//
// A CTA takes one token, 64 of its heads and a share of its keys, 64 at a time. One warpgroup gathers
// keys into a two-stage ring in the layout that wgmma reads, both as K (contracted over the width)
// and as V (contracted over keys). Two warpgroups each compute the weights of 32 of the keys, exchange
// them through shared memory, and each keeps one half of the output's width in registers. With more
// than one share the unnormalised sums go to memory, and a second kernel combines them.
#pragma once

#include "attention.cuh"
#include "hopper.cuh"
#include "kv_entry.cuh"

namespace dsv4 {

constexpr int kDim = 512, kPlain = 448;             // head width; of it without rope, in packed pools
constexpr int kHeads = 64, kBlock = 64;             // heads and keys of a tile
constexpr int kStages = 2, kConsumers = 256, kProducers = 128;
constexpr int kChunk = 64 * 128;              // bytes: 64 rows of 64 elements, 128-byte swizzle
constexpr int kTileBytes = kBlock * kDim * 2;  // 8 chunks
constexpr int kScalesAt = EntryLayout{kDim, kPlain}.scales_at(), kEntryBytes = kScalesAt + kScaleBytes;
constexpr int kAhead = 8;  // packed rows that a producer warp has under way
constexpr int kHalf = kDim / 2, kOutPitch = 2 * kHalf + 16;  // bytes; 16 spread the banks

struct Shared {
    alignas(1024) char q[kTileBytes];  // later the output, on its way to memory
    alignas(1024) char keys[kStages][kTileBytes];
    alignas(1024) char weights[kHeads * kBlock * 2];  // 64 rows of 128 bytes, swizzled
    float rows[2][kHeads];                            // of each warpgroup: largest logit, sum
    uint64_t exists[kStages];                         // a bit a key
    uint64_t full[kStages], empty[kStages];
    alignas(16) char entries[kProducers / 32][kAhead][kEntryBytes];
};

struct Problem {
    const bf16* q;
    Keys keys;
    const float* sink;
    float scale;
    int64_t heads;
    int shares, per_share;  // of a token's key blocks, and blocks in one
    bf16* o;
    float* lse;
    float* part;         // [n, heads, shares, 512] unnormalised
    Softmax* part_sums;  // [n, heads, shares]
};

__host__ __device__ inline int blocks_of(int64_t keys) { return (keys + kBlock - 1) / kBlock; }

// Which token, heads and blocks of keys this CTA has.
struct Work {
    int64_t token;
    int head, heads, share, first, last;

    __device__ Work(const Problem& p) {
        int groups = (p.heads + kHeads - 1) / kHeads;
        int64_t at = blockIdx.x;
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

// Where 16-byte unit `unit` (0 to 63) of row `row` lies in a tile.
__device__ inline uint32_t unit_offset(int row, int unit) {
    return unit / 8 * kChunk + row * 128 + ((unit % 8 ^ row % 8) << 4);
}

// The pool of a block of keys: first those of the window, then those of the entries.
__device__ inline const char* pool_of(const Problem& p, int block) {
    return (const char*)p.keys.pick(block >= blocks_of(p.keys.window.width)).keys;
}

// The row in its pool of key `row` of a block, -1 for none.
__device__ inline int index_of(const Problem& p, const Work& work, int block, int row) {
    int blocks = blocks_of(p.keys.window.width);
    Pool pool = p.keys.pick(block >= blocks);
    int column = (block - (block >= blocks ? blocks : 0)) * kBlock + row;
    bool exists = block < work.last && column < pool.width;
    int index = exists ? pool.index[work.token * pool.width + column] : -1;
    if (index >= pool.rows) __trap();
    return index;
}

// A block's 64 rows in their pool, of which lane l of each warp knows those of keys l and l + 32.
struct Indices {
    int low, high;
    __device__ Indices(int low, int high) : low(low), high(high) {}
    __device__ Indices(const Problem& p, const Work& work, int block, int lane)
        : low(index_of(p, work, block, lane)), high(index_of(p, work, block, lane + 32)) {}
    // Which keys exist, a bit each.
    __device__ uint64_t exist() const {
        return __ballot_sync(~0u, low >= 0) | (uint64_t)__ballot_sync(~0u, high >= 0) << 32;
    }
    // That of key `row` of the 16 of `warp`.
    __device__ int at(int warp, int row) const {
        return __shfl_sync(~0u, warp < 2 ? low : high, (16 * warp + row) % 32);
    }
};

// q into shared memory, by cp.async; heads that do not exist are zeros.
__device__ void gather_q(const Problem& p, const Work& work, Shared& s, int thread) {
    const bf16* q = p.q + (work.token * p.heads + work.head) * kDim;
    for (int i = thread; i < kHeads * kDim / 8; i += kProducers) {
        bool exists = i / 64 < work.heads;
        copy16(shared_address(s.q) + unit_offset(i / 64, i % 64), q + (exists ? i * 8 : 0), exists);
    }
}

// Waits until `stage` of block number i of this CTA is free; says which of its keys exist.
__device__ void open_stage(Shared& s, int i, int thread, uint64_t exists) {
    const int stage = i % kStages;
    if (i >= kStages) barrier_wait(&s.empty[stage], (i / kStages - 1) % 2);
    if (thread == 0) {
        s.exists[stage] = exists;
        barrier_arrive(&s.full[stage]);
    }
}

// The producers of bfloat16 pools: q once, then every block of keys into the stage that is free; rows
// that do not exist are zeros, so that 0 * row is 0.
__device__ void gather(const Problem& p, const Work& work, Shared& s) {
    const int thread = threadIdx.x - kConsumers, warp = thread / 32, lane = thread % 32;
    gather_q(p, work, s, thread);
    Indices next(p, work, work.first, lane);
    for (int block = work.first; block < work.last; block++) {
        const int i = block - work.first, stage = i % kStages;
        const Indices rows = next;
        const uint64_t exists = rows.exist();
        next = Indices(p, work, block + 1, lane);
        open_stage(s, i, thread, exists);
        const uint32_t base = shared_address(s.keys[stage]);
        const char* pool = pool_of(p, block) + lane * 16;
        if (exists) {
#pragma unroll 4
            for (int r = 0; r < 16; r++) {
                int row = 16 * warp + r, index = rows.at(warp, r);
                const char* from = pool + (int64_t)max(index, 0) * (2 * kDim);
                copy16(base + unit_offset(row, lane), from, index >= 0);
                copy16(base + unit_offset(row, lane + 32), from + kDim, index >= 0);
            }
        }
        copy_arrive(&s.full[stage]);
    }
    copy_commit();
    copy_wait<0>();
}

// ---------------------------------------------------------------- packed pools
//
// An entry is copied into a ring of the warp's own; the warp then decodes it, 8 codes to the 16 bytes of
// one unit, into the tile. Rows that do not exist are copied as zero bytes, which decode to zeros.

struct EntryRing {
    const int lane;
    char (&slots)[kAhead][kEntryBytes];

    // Starts copying a row.
    __device__ void fetch(int slot, const char* pool, int index) const {
        const char* entry = pool + (int64_t)max(index, 0) * kEntryBytes + 8 * lane;
        const uint32_t to = shared_address(slots[slot]) + 8 * lane;
        copy8(to, entry, index >= 0);
        copy8(to + 256, entry + 256, index >= 0);
        if (8 * lane < kEntryBytes - 512) copy8(to + 512, entry + 512, index >= 0);
    }

    struct Codes {
        uint2 low, high, rope;
        uint8_t low_scale, high_scale;
    };
    // Lane l: what makes units l and l + 32. From lane 24 on, unit l + 32 is rope.
    __device__ Codes read(int slot) const {
        const char *entry = slots[slot], *rope = entry + kPlain + 16 * (lane - 24);
        const bool coded = lane < 24;
        return {*(const uint2*)(entry + 8 * lane),
                *(const uint2*)(coded ? entry + 256 + 8 * lane : rope),
                *(const uint2*)(coded ? entry : rope + 8), (uint8_t)entry[kScalesAt + lane / 8],
                (uint8_t)entry[kScalesAt + 4 + lane / 8]};
    }
    __device__ void store(char* tile, int row, const Codes& codes) const {
        *(uint4*)(tile + unit_offset(row, lane)) = decode_codes(codes.low, scale_of(codes.low_scale));
        uint4 high = {codes.high.x, codes.high.y, codes.rope.x, codes.rope.y};
        if (lane < 24) high = decode_codes(codes.high, scale_of(codes.high_scale));
        *(uint4*)(tile + unit_offset(row, lane + 32)) = high;
    }
};

// The producers of packed pools: as `gather`.
__device__ void gather_packed(const Problem& p, const Work& work, Shared& s) {
    const int thread = threadIdx.x - kConsumers, warp = thread / 32, lane = thread % 32;
    const EntryRing ring = {lane, s.entries[warp]};
    Indices rows(p, work, work.first, lane), next(p, work, work.first + 1, lane);
    gather_q(p, work, s, thread);
    for (int r = 0; r < kAhead; r += 2) {
        ring.fetch(r, pool_of(p, work.first), rows.at(warp, r));
        ring.fetch(r + 1, pool_of(p, work.first), rows.at(warp, r + 1));
        copy_commit();  // the first group holds q too
    }
    for (int block = work.first; block < work.last; block++) {
        const int i = block - work.first, stage = i % kStages;
        const Indices last(p, work, block + 2, lane);
        open_stage(s, i, thread, rows.exist());
#pragma unroll 1
        for (int r = 0; r < 16; r += 2) {
            const int slot = r % kAhead, later = (r + kAhead) % 16;
            const bool wraps = r + kAhead >= 16;
            copy_wait<kAhead / 2 - 1>();
            __syncwarp();
            const EntryRing::Codes a = ring.read(slot), b = ring.read(slot + 1);
            __syncwarp();
            const char* pool = pool_of(p, block + wraps);
            const Indices from = {wraps ? next.low : rows.low, wraps ? next.high : rows.high};
            ring.fetch(slot, pool, from.at(warp, later));
            ring.fetch(slot + 1, pool, from.at(warp, later + 1));
            copy_commit();
            ring.store(s.keys[stage], 16 * warp + r, a);
            ring.store(s.keys[stage], 16 * warp + r + 1, b);
        }
        fence_async_proxy();
        barrier_arrive(&s.full[stage]);
        rows = next;
        next = last;
    }
    copy_wait<0>();
}

}  // namespace dsv4
