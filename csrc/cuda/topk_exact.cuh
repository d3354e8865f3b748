// Top-k of a row by histograms of its keys: exact for any distribution, in up to three passes.
#pragma once

#include "topk_rank.cuh"

namespace dsv4 {

// A histogram over the leading 12 bits, added up over the cluster, finds the bin of the k-th best; if
// more than kCandidates keys are in it or above, the next 12 and the last 8 bits follow. Of keys known
// to be equal the first are taken by prefix sums, in index order.

constexpr int kBins = 4096, kGroup = 64, kGroups = kBins / kGroup;

// Where a row is cut: the candidates are the keys from `low` on.
struct Cut {
    uint32_t low, most;     // most: the largest key of the row
    uint32_t above, here;   // keys above the last bin searched, keys in it
    uint32_t before_above, before_here;  // of them in CTAs of lower rank
    bool done, exact;  // exact: the keys in that bin are all equal to `low`
};

struct Exact {
    alignas(16) uint32_t count[kBins];       // keys of this CTA
    uint32_t groups[kMostCluster][kGroups];  // sums of kGroup bins of every CTA
    uint32_t least[kMostCluster], most[kMostCluster];  // keys of every CTA
    uint32_t scan[kWarps];
    uint32_t own_least, own_most, taken;
    Cut cut;

    __device__ void clear() {
        for (int i = threadIdx.x; i < kBins; i += kThreads) count[i] = 0;
        if (threadIdx.x != 0) return;
        own_least = ~0u;
        own_most = taken = 0;
        cut = {};
    }
};

// The scores of one warp, in order; the keys of a batch are in registers, Quads times four a lane.
template <int Quads> struct Slice {
    static constexpr int kBatch = 128 * Quads;
    const float* score;
    int begin, stop;  // of the warp in the row
    int end;          // of what is visible in it
    bool vectors;     // 16-byte loads are aligned
    uint32_t key[4 * Quads];  // 0 past the end

    __device__ int at(int base, int quad) const { return base + 128 * quad + threadIdx.x % 32 * 4; }

    __device__ void read(int base) {
        float value[4 * Quads];
#pragma unroll
        for (int q = 0; q < Quads; q++) {
            const int i = at(base, q);
            if (vectors && i + 4 <= stop) {
                *(float4*)(value + 4 * q) = *(const float4*)(score + i);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) value[4 * q + j] = i + j < stop ? score[i + j] : 0;
            }
        }
#pragma unroll
        for (int j = 0; j < 4 * Quads; j++)
            key[j] = at(base, j / 4) + j % 4 < end ? key_of(value[j]) : 0;
    }
    // f(key, index) for every key of the warp; f(quad's keys, index of the first) in visit_quads.
    template <class F> __device__ void visit_quads(F f) {
        const bool once = end - begin <= kBatch;
#pragma unroll 1
        for (int base = begin; base < end; base += kBatch) {
            if (!once) read(base);
#pragma unroll
            for (int q = 0; q < Quads; q++)
                if (base + 128 * q < end) f(key + 4 * q, at(base, q));
        }
    }
    template <class F> __device__ void visit(F f) {
        visit_quads([&](const uint32_t* four, int i) {
#pragma unroll
            for (int j = 0; j < 4; j++) f(four[j], i + j);
        });
    }
};

// Counts the keys whose bits above `shift` + `bits` are `prefix`, by the `bits` below those.
template <int Quads>
__device__ void count(Exact& s, Slice<Quads>& slice, int shift, int bits, uint32_t prefix) {
    const uint32_t mask = (1u << bits) - 1;
    slice.visit([&](uint32_t key, int) {
        if (key && key >> shift >> bits == prefix) atomicAdd(&s.count[key >> shift & mask], 1);
    });
}

template <int Quads> __device__ void find_extremes(Exact& s, Slice<Quads>& slice) {
    uint32_t least = ~0u, most = 0;
    slice.visit([&](uint32_t key, int) {
        least = min(least, key - 1);  // so that 0 is none
        most = max(most, key);
    });
    least = __reduce_min_sync(kAll, least);
    most = __reduce_max_sync(kAll, most);
    if (threadIdx.x % 32 == 0 && most != 0) {
        atomicMin(&s.own_least, least + 1);
        atomicMax(&s.own_most, most);
    }
}

// Gives every CTA of the cluster this one's sums of groups of bins, and its extremes.
__device__ inline void publish(Exact& s, uint32_t rank, uint32_t ctas) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    constexpr int kEach = kGroups / kWarps;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        int group = warp * kEach + i;
        uint2 two = *(const uint2*)&s.count[group * kGroup + 2 * lane];
        uint32_t sum = __reduce_add_sync(kAll, two.x + two.y);
        if (lane < ctas) remote_write(remote_address(shared_address(&s.groups[rank][group]), lane), sum);
    }
    if (threadIdx.x < ctas) {
        remote_write(remote_address(shared_address(&s.least[rank]), threadIdx.x), s.own_least);
        remote_write(remote_address(shared_address(&s.most[rank]), threadIdx.x), s.own_most);
    }
    sync(ctas);
}

struct Found {
    uint32_t at, above, here, before_above, before_here;
};

// One warp: where among 64 counts the need-th from the top is. two(cta) = counts 62 - 2 lane and
// 63 - 2 lane of that CTA.
template <class F> __device__ Found search(uint32_t need, uint32_t rank, uint32_t ctas, F two) {
    const uint32_t lane = threadIdx.x % 32;
    uint2 all = {}, before = {};
#pragma unroll 8
    for (uint32_t cta = 0; cta < ctas; cta++) {
        uint2 v = two(cta);
        all.x += v.x, all.y += v.y;
        if (cta < rank) before.x += v.x, before.y += v.y;
    }
    uint32_t sum = warp_inclusive_sum(all.x + all.y), above = sum - all.x - all.y;
    bool high = need <= above + all.y;
    Found mine = {62 - 2 * lane + high, high ? above : above + all.y, high ? all.y : all.x, 0,
                  high ? before.y : before.x};
    unsigned reached = __ballot_sync(kAll, need <= sum);
    int owner = __ffs(reached) - 1;
    Found found;
    found.at = __shfl_sync(kAll, mine.at, owner);
    found.above = __shfl_sync(kAll, mine.above, owner);
    found.here = __shfl_sync(kAll, mine.here, owner);
    found.before_here = __shfl_sync(kAll, mine.before_here, owner);
    uint32_t better = (62 - 2 * lane > found.at ? before.x : 0) + (63 - 2 * lane > found.at ? before.y : 0);
    found.before_above = __reduce_add_sync(kAll, better);
    return found;
}

// One warp: the bin of the need-th best key of the row.
__device__ inline Found find_bin(const Exact& s, uint32_t need, uint32_t rank, uint32_t ctas) {
    const uint32_t pair = 62 - 2 * (threadIdx.x % 32);
    Found group = search(need, rank, ctas,
                         [&](uint32_t cta) { return *(const uint2*)&s.groups[cta][pair]; });
    uint32_t own = shared_address(&s.count[group.at * kGroup + pair]);
    Found bin = search(need - group.above, rank, ctas,
                       [&](uint32_t cta) { return remote_load2(remote_address(own, cta)); });
    bin.at += group.at * kGroup;
    bin.above += group.above;
    bin.before_above += group.before_above;
    return bin;
}

// One warp, after a pass: narrows s.cut; all keys are candidates where they are few or all equal.
__device__ inline void narrow(Exact& s, int pass, int shift, int bits, int visible, int per_cta, int k,
                       uint32_t rank, uint32_t ctas) {
    const uint32_t lane = threadIdx.x % 32;
    Cut cut = s.cut;
    if (pass == 0) {
        uint32_t least = __reduce_min_sync(kAll, lane < ctas ? s.least[lane] : ~0u);
        cut.most = __reduce_max_sync(kAll, lane < ctas ? s.most[lane] : 0);
        cut.exact = least == cut.most;
        if (visible <= k || cut.exact) {
            cut.low = least;
            cut.here = visible;
            cut.before_here = min((int)rank * per_cta, visible);
            cut.done = true;
        }
    }
    if (!cut.done) {
        Found bin = find_bin(s, k - cut.above, rank, ctas);
        cut.low |= bin.at << shift;
        cut.above += bin.above;
        cut.here = bin.here;
        cut.before_above += bin.before_above;
        cut.before_here = bin.before_here;
        cut.exact = shift == 0;
        cut.done = cut.exact || cut.above + cut.here <= kCandidates;
    }
    __syncwarp();
    if (lane == 0) s.cut = cut;
}

// s.cut of the row: its exact value, or at most kCandidates keys.
template <int Quads>
__device__ void find_cut(Exact& s, Slice<Quads>& slice, int visible, int per_cta, int k,
                         uint32_t rank, uint32_t ctas) {
    find_extremes(s, slice);
#pragma unroll 1
    for (int pass = 0; pass < 3; pass++) {
        const int shift = pass == 0 ? 20 : pass == 1 ? 8 : 0, bits = pass == 2 ? 8 : 12;
        if (pass > 0) {
            sync(ctas);  // the last counts have been read
            for (int i = threadIdx.x; i < kBins; i += kThreads) s.count[i] = 0;
            __syncthreads();
        }
        count(s, slice, shift, bits, (uint32_t)((uint64_t)s.cut.low >> shift >> bits));
        publish(s, rank, ctas);
        if (threadIdx.x < 32) narrow(s, pass, shift, bits, visible, per_cta, k, rank, ctas);
        __syncthreads();
        if (s.cut.done) return;
    }
}

// Sends this CTA's keys from `least` on to CTA 0, where those of earlier CTAs end at `first`.
template <int Quads>
__device__ void collect(Exact& s, uint64_t* candidates, Slice<Quads>& slice, uint32_t least,
                        uint32_t first) {
    const uint32_t to = remote_address(shared_address(candidates), 0);
    slice.visit([&](uint32_t key, int i) {
        if (key >= least) {
            uint32_t slot = first + atomicAdd(&s.taken, 1);
            remote_write(to + 8 * slot, (uint64_t)key << 32 | ~(uint32_t)i);
        }
    });
}

// Writes the first `need` keys equal to the cut behind those above it, in index order.
template <int Quads>
__device__ void take_equals(Exact& s, Slice<Quads>& slice, uint32_t need, int* index) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Cut cut = s.cut;
    uint32_t mine = 0;
    slice.visit([&](uint32_t key, int) { mine += key == cut.low; });
    mine = __reduce_add_sync(kAll, mine);
    if (lane == 0) s.scan[warp] = mine;
    __syncthreads();
    uint32_t order = cut.before_here + __reduce_add_sync(kAll, lane < warp ? s.scan[lane] : 0);
    if (order >= need || mine == 0) return;
    slice.visit_quads([&](const uint32_t* four, int i) {
        uint32_t equals = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) equals += four[j] == cut.low;
        uint32_t sum = warp_inclusive_sum(equals), at = order + sum - equals;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (four[j] == cut.low) {
                if (at < need) index[cut.above + at] = i + j;
                at++;
            }
        order += __shfl_sync(kAll, sum, 31);
    });
}

// The top k of a row by the CTAs of a cluster.
template <int Quads>
__device__ void exact_topk(Exact& s, Ranking& ranking, const float* score, int total, int visible, int k,
                           int* index) {
    const uint32_t rank = cluster_rank(), ctas = cluster_size();
    s.clear();
    __syncthreads();
    const int per_cta = (total + 4 * (int)ctas - 1) / (4 * (int)ctas) * 4;
    const int per_warp = (per_cta + 128 * kWarps - 1) / (128 * kWarps) * 128;
    const int begin = per_cta * (int)rank + per_warp * (threadIdx.x / 32);
    const int stop = min(min(begin + per_warp, per_cta * (int)(rank + 1)), total);
    Slice<Quads> slice = {score, begin, stop, min(stop, visible), total % 4 == 0};
    slice.read(begin);
    find_cut(s, slice, visible, per_cta, k, rank, ctas);
    const Cut cut = s.cut;
    const uint32_t wanted = min(visible, k);
    const uint32_t candidates = cut.above + (cut.exact ? 0 : cut.here);
    if (cut.exact) take_equals(s, slice, wanted - cut.above, index);
    if (candidates > 0)
        collect(s, ranking.candidates, slice, cut.low + cut.exact,
                cut.before_above + (cut.exact ? 0 : cut.before_here));
    sync(ctas);
    if (rank != 0 || candidates == 0) return;
    Candidates<kEach> mine;
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const uint32_t i = j * kThreads + threadIdx.x;
        mine[j] = i < candidates ? ranking.candidates[i] : 0;
    }
    rank_candidates(ranking, mine, cut.low, cut.most, min(candidates, wanted), index);
}

}  // namespace dsv4
