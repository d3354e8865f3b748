// Tensor-core attention on packed KV entries: a CTA takes one token, 64 heads and a share of the keys.
//
// One warpgroup decodes keys into a two-stage ring in the layout that wgmma reads, both as K (contracted
// over the width) and as V (contracted over keys). Two warpgroups each compute the weights of 32 of the
// keys, exchange them through shared memory, and each keeps one half of the output's width in registers.
// With more than one share the unnormalised sums go to memory, and a second kernel combines them.
#pragma once

#include "attention_gather.cuh"
#include "kv_entry.cuh"

namespace dsv4::packed {

constexpr int kPlain = 448;  // of the head width without rope
constexpr int kScalesAt = EntryLayout{kDim, kPlain}.scales_at(), kEntryBytes = kScalesAt + kScaleBytes;
constexpr int kAhead = 8;  // packed rows that a producer warp has under way
constexpr int kOutPitch = 2 * kHalf + 16;  // bytes; 16 spread the banks

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

// Those of a block that this CTA has.
struct Indices : dsv4::Indices {
    using dsv4::Indices::Indices;
    __device__ Indices(const Problem& p, const Work& work, int block, int lane)
        : Indices(index_of(p, work, block, lane), index_of(p, work, block, lane + 32)) {}
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

// logit = q k^T for the 64 heads and this warpgroup's 32 keys of a stage.
__device__ inline void multiply_keys(float (&logit)[16], const Shared& s, int stage, int half) {
    uint64_t a = matrix_descriptor(shared_address(s.q), 16, 1024);
    uint64_t b = matrix_descriptor(shared_address(s.keys[stage]) + half * 32 * 128, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; k++) {
        uint64_t step = (k / 4 * kChunk + k % 4 * 32) >> 4;
        wgmma_64x32(logit, a + step, b + step, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
}

// sum += p v for the 64 keys of a stage and one half of the width.
__device__ inline void multiply_values(float (&sum)[128], const Shared& s, int stage, int half) {
    uint32_t from = shared_address(s.keys[stage]) + half * (kHalf / 64) * kChunk;
    uint64_t a = matrix_descriptor(shared_address(s.weights), 16, 1024);
    uint64_t b = matrix_descriptor(from, kChunk, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlock / 16; k++)
        wgmma_64x256(sum, a + (k * 32 >> 4), b + (k * 16 * 128 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
}

// What this thread knows of its rows of heads, `row` and row + 8; sums over its own columns.
struct Rows {
    const int half = threadIdx.x / 128, t = threadIdx.x % 4;
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    Softmax of[2] = {{-INFINITY, 0}, {-INFINITY, 0}};

    // Both warpgroups: value[0] and value[1] of the two rows -> the other warpgroup's.
    __device__ float2 exchange(Shared& s, float low, float high) const {
        if (t == 0) {
            s.rows[half][row] = low;
            s.rows[half][row + 8] = high;
        }
        named_barrier(1, kConsumers);
        return {s.rows[1 - half][row], s.rows[1 - half][row + 8]};
    }

    // Logits of this warpgroup's 32 keys -> weights in shared memory, bfloat16; `exists` says which
    // keys do. Returns the factors that the sums so far are to be scaled by.
    __device__ float2 weigh(Shared& s, float (&logit)[16], float scale, uint32_t exists) {
        if (~exists)
#pragma unroll
            for (int i = 0; i < 16; i++)
                if (~exists >> (i / 4 * 8 + 2 * t + i % 2) & 1) logit[i] = -INFINITY;
        float most[2] = {-INFINITY, -INFINITY}, shrink[2];
#pragma unroll
        for (int i = 0; i < 16; i++) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], logit[i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 1));
            most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 2));
        }
        float2 others = exchange(s, most[0], most[1]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = fmaxf(fmaxf(most[i], i ? others.y : others.x) * scale, of[i].most);
            shrink[i] = weight_of(of[i].most, most[i]);
            of[i] = {most[i], of[i].sum * shrink[i]};
            if (most[i] == -INFINITY) most[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            logit[i] = exp2_approximate(fmaf(logit[i], scale, -most[i / 2 % 2]));
            of[i / 2 % 2].sum += logit[i];
        }
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            int at = row + i / 2 % 2 * 8, unit = 4 * half + i / 4;
            *(uint32_t*)(s.weights + at * 128 + ((unit ^ at % 8) << 4) + 4 * t) =
                pack_bf16(logit[i], logit[i + 1]);
        }
        return {shrink[0], shrink[1]};
    }

    // Afterwards the sums are those of whole rows.
    __device__ void finish(Shared& s) {
        for (int i = 0; i < 2; i++) {
            of[i].sum += __shfl_xor_sync(~0u, of[i].sum, 1);
            of[i].sum += __shfl_xor_sync(~0u, of[i].sum, 2);
        }
        named_barrier(1, kConsumers);  // the last exchange is over
        float2 others = exchange(s, of[0].sum, of[1].sum);
        of[0].sum += others.x;
        of[1].sum += others.y;
    }
};

// One share: normalised output through shared memory, and lse.
__device__ void write_output(const Problem& p, const Work& work, Shared& s, float (&sum)[128],
                             const Rows& rows) {
    const int thread = threadIdx.x % 128, half = rows.half;
    char* staging = s.q + half * kHeads * kOutPitch;  // both warpgroups have read q and keys
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int head = rows.row + 8 * i;
        bool exists = head < work.heads;
        Softmax total = with_sink(rows.of[i], exists ? p.sink[work.head + head] : 0);
        float factor = weight_of(rows.of[i].most, total.most) / total.sum;
        if (exists && half == 0 && rows.t == 0)
            p.lse[work.token * p.heads + work.head + head] = lse_of(total);
#pragma unroll
        for (int j = 0; j < 32; j++)
            *(uint32_t*)(staging + head * kOutPitch + 16 * j + 4 * rows.t) =
                pack_bf16(sum[4 * j + 2 * i] * factor, sum[4 * j + 2 * i + 1] * factor);
    }
    fence_async_proxy();
    named_barrier(2 + half, 128);
    if (thread < work.heads) {
        int64_t head = work.token * p.heads + work.head + thread;
        bulk_store(p.o + head * kDim + half * kHalf, staging + thread * kOutPitch, 2 * kHalf);
        bulk_commit_wait();
    }
}

// Several shares: what the combining kernel needs.
__device__ void write_part(const Problem& p, const Work& work, float (&sum)[128], const Rows& rows) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int head = rows.row + 8 * i;
        if (head >= work.heads) continue;
        int64_t at = (work.token * p.heads + work.head + head) * p.shares + work.share;
        if (rows.half == 0 && rows.t == 0) p.part_sums[at] = rows.of[i];
        float* to = p.part + at * kDim + rows.half * kHalf + 2 * rows.t;
#pragma unroll
        for (int j = 0; j < 32; j++)
            *(float2*)(to + 8 * j) = {sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]};
    }
}

// Two warpgroups, always at the same block of keys.
__device__ void compute(const Problem& p, const Work& work, Shared& s) {
    float sum[128];
#pragma unroll
    for (int i = 0; i < 128; i++) sum[i] = 0;
    Rows rows;
    for (int i = 0; i < work.last - work.first; i++) {
        int stage = i % kStages;
        barrier_wait(&s.full[stage], i / kStages % 2);
        fence_async_proxy();
        uint64_t exists = s.exists[stage];
        if (exists) {
            float logit[16];
            multiply_keys(logit, s, stage, rows.half);
            float2 shrink = rows.weigh(s, logit, p.scale * kLog2e, exists >> 32 * rows.half);
            fence_async_proxy();
            named_barrier(1, kConsumers);  // all weights are there
            if (__any_sync(~0u, shrink.x != 1 || shrink.y != 1))
#pragma unroll
                for (int k = 0; k < 128; k++) sum[k] *= k / 2 % 2 ? shrink.y : shrink.x;
            multiply_values(sum, s, stage, rows.half);
        }
        barrier_arrive(&s.empty[stage]);
    }
    rows.finish(s);
    if (p.shares == 1) write_output(p, work, s, sum, rows);
    else write_part(p, work, sum, rows);
}

__global__ void __launch_bounds__(kConsumers + kProducers, 1) attention_packed_kernel(Problem p) {
    extern __shared__ char memory[];
    Shared& s = *reinterpret_cast<Shared*>((shared_address(memory) + 1023) / 1024 * 1024 -
                                           shared_address(memory) + memory);
    const Work work(p);
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(&s.full[i], kProducers + 1);  // their copies, and the bits of what exists
            barrier_init(&s.empty[i], kConsumers);
        }
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x >= kConsumers) {
        fewer_registers<72>();
        gather_packed(p, work, s);
    } else {
        more_registers<216>();
        compute(p, work, s);
    }
}

}  // namespace dsv4::packed
