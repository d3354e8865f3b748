// Gathering from packed pools: what a warp reads of an entry, and the producers that decode (attention_gather.cuh).
#pragma once

#include "attention_gather.cuh"

namespace dsv4 {

// A warp decodes an entry, 8 codes to the 16 bytes of one unit, into a row of a tile: lane l makes units l
// and l + 32, of which those from 56 on are rope values, not codes. Entries lie at multiples of 8 bytes.
struct EntryCodes {
    uint2 low = {}, high = {}, rope = {};
    uint32_t low_scale = 0, high_scale = 0;

    __device__ EntryCodes() {}  // of a row that does not exist: zeros
    __device__ EntryCodes(const char* entry, int lane) {
        const char* upper = entry + (lane < 24 ? 256 + 8 * lane : kPlain + 16 * (lane - 24));
        low = *(const uint2*)(entry + 8 * lane);
        high = *(const uint2*)upper;
        if (lane >= 24) rope = *(const uint2*)(upper + 8);
        low_scale = *(const uint8_t*)(entry + kScalesAt + lane / 8);
        high_scale = *(const uint8_t*)(entry + kScalesAt + 4 + lane / 8);
    }
    // `to`: where in a tile unit l of the row goes; l + 32 lies four chunks behind.
    __device__ void store_at(uint32_t to, int lane) const {
        uint4 unit = decode_codes(low, scale_pair(low_scale));
        shared_store16(to, unit);
        unit = decode_codes(high, scale_pair(high_scale));
        if (lane >= 24) unit = {high.x, high.y, rope.x, rope.y};
        shared_store16(to + 4 * kChunk, unit);
    }
    __device__ void store(char* tile, int row, int lane) const {
        store_at(shared_address(tile) + unit_offset(row, lane), lane);
    }
};

// Of a warp's eight rows of a block, lane l knows that of row l % 8: where its entry lies, and in bit 0
// whether there is one. Every second entry lies half way between multiples of 16 bytes.
struct EntryRows {
    uint64_t entry;
    // `index`: what the block's index says of the row; `block` counts those of the token.
    __device__ EntryRows(const Problem& p, int block, int index) {
        const Pool pool = pool_of(p, block);
        entry = (uint64_t)pool.keys + (int64_t)max(checked(pool, index), 0) * kEntryBytes + (index >= 0);
    }
    __device__ bool mine_exists() const { return entry & 1; }
    // How far row i lies behind a multiple of 16 bytes.
    __device__ uint32_t offset(int i) const { return __shfl_sync(~0u, (uint32_t)entry, i) & 8; }
    // Starts copying row i to `slot` + offset(i), zeros where there is none; before it, up to the multiple of 16
    // bytes, lands the end of the row before.
    __device__ void fetch(const char* slot, int i, int lane) const {
        const uint64_t from = __shfl_sync(~0u, entry, i);
        const bool exists = from & 1;
        const char* values = (const char*)(from & ~15ull) + 16 * lane;
        const uint32_t to = shared_address(slot) + 16 * lane;
        copy16(to, values, exists);
        if (16 * lane < kSlotBytes - 512) {
            const bool ends_half_way = 16 * lane == kSlotBytes - 512 - 16 && !(from & 8);
            copy16_part(to + 512, values + 512, exists ? ends_half_way ? 8 : 16 : 0);
        }
    }
    // Brings all eight into the L2, a sector of 32 bytes a lane.
    __device__ void prefetch(int lane) const {
        if (!mine_exists()) return;
        const char* from = (const char*)(entry & ~1ull) + lane / 8 * 32;
#pragma unroll
        for (int i = 0; i < 5; i++)
            if (128 * i + lane / 8 * 32 < kEntryBytes)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(from + 128 * i) : "memory");
    }
};

// The producers of packed pools: as `gather`. The index of a block is looked up two blocks ahead, its rows are
// brought into the L2 one block ahead, and copied into a ring of the warp's own `kAhead` rows ahead. Those who
// multiply have the proxy fence for what is stored here: a fence would wait for all copies that are under way.
__device__ void gather_packed(const Problem& p, Shared& s) {
    constexpr int kOwn = 8;  // rows of a block that a warp decodes
    static_assert(kOwn * kProducers<true> / 32 == kBlock);
    const int warp = threadIdx.x / 32 - kConsumers / 32, lane = threadIdx.x % 32;
    Blocks ahead(p);
    auto look_up = [&] {
        return ahead.exist() ? index_of(p, ahead.token, ahead.block, kOwn * warp + lane % kOwn) : -1;
    };
    EntryRows now(p, ahead.block, look_up());
    int work = -1, now_in = ahead.at;  // number of the work whose q is there; of that of block `now`
    ahead.advance();
    EntryRows next(p, ahead.block, look_up());
    int next_in = ahead.at;
    char (&ring)[kAhead][kSlotBytes] = s.entries[warp];
    int slot = 0;
#pragma unroll
    for (int r = 0; r < kAhead; r++) {
        now.fetch(ring[r], r, lane);
        copy_commit();
    }
    // The codes of row i of `rows`; its place in the ring goes to row `later_i` of `later`.
    auto take = [&](const EntryRows& rows, int i, const EntryRows& later, int later_i) {
        const uint32_t offset = rows.offset(i);
        copy_wait<kAhead - 1>();
        __syncwarp();
        const EntryCodes codes(ring[slot] + offset, lane);
        __syncwarp();
        later.fetch(ring[slot], later_i, lane);
        copy_commit();
        slot = slot == kAhead - 1 ? 0 : slot + 1;
        return codes;
    };
    EntryCodes codes = take(now, 0, now, kAhead);
    for (int g = 0, turn = 0; now_in < p.works; g++) {
        const int stage = g % kStages;
        if (now_in != work) next_q<true>(p, work = now_in, s, turn++);
        ahead.advance();
        const int index = look_up();
        for (int half = 0; half < 2; half++) wait_until_empty(s, g, half);
        const uint32_t exist = __ballot_sync(~0u, now.mine_exists());
        if (lane < 2) ((uint8_t*)&s.exists[stage][lane])[warp] = exist;
        uint32_t to = shared_address(s.keys[stage]) + unit_offset(kOwn * warp, lane);
        asm volatile("" : "+r"(to));  // so that the addresses of all rows are not kept in registers
#pragma unroll
        for (int r = 0; r < kOwn; r++) {
            const int following = r + 1, later = following + kAhead;
            const EntryCodes upcoming = take(following < kOwn ? now : next, following % kOwn,
                                             later < kOwn ? now : next, later % kOwn);
            codes.store_at((to ^ r << 4) + r * 128, lane);
            codes = upcoming;
        }
        for (int half = 0; half < 2; half++) barrier_arrive(&s.full[stage][half]);
        now = next;
        now_in = next_in;
        next = EntryRows(p, ahead.block, index);
        next_in = ahead.at;
        next.prefetch(lane);
    }
    copy_wait<0>();
}

}  // namespace dsv4
