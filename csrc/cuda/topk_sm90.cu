// Op index_topk: the k best scores of every row, best first, ties to the lower index.
//
// A cluster takes one row, each CTA a contiguous slice, whose keys stay in registers. A histogram over
// the leading 12 bits, added up over the cluster, finds the bin of the k-th best; if more than
// kCandidates keys are in it or above, the next 12 and the last 8 bits follow, so that any distribution
// ends. CTA 0 collects the candidates in any order and ranks them exactly: bins over the range that is
// left, comparisons within a bin; or a sort, where many share a bin. Of keys known to be equal the first
// are taken by prefix sums, in index order. Nothing in the result depends on timing.

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMost = 1024;         // k
constexpr int kCandidates = 2048;   // that CTA 0 ranks
constexpr int kMostCluster = 16;    // more than 8 needs the device's consent
constexpr int kBins = 4096, kGroup = 64, kGroups = kBins / kGroup;
constexpr int kRankBins = 2048;
constexpr uint32_t kCrowd = 64;     // candidates in a bin, from which sorting is faster
constexpr int64_t kSlice = 2048;    // scores that are worth a CTA of their own
constexpr unsigned kAll = ~0u;

// Where a row is cut: the candidates are the keys from `low` on.
struct Cut {
    uint32_t low, most;     // most: the largest key of the row
    uint32_t above, here;   // keys above the last bin searched, keys in it
    uint32_t before_above, before_here;  // of them in CTAs of lower rank
    bool done, exact;  // exact: the keys in that bin are all equal to `low`
};

struct Shared {
    uint32_t count[kBins];                    // keys of this CTA
    uint32_t groups[kMostCluster][kGroups];   // sums of kGroup bins of every CTA
    uint32_t least[kMostCluster], most[kMostCluster];  // keys of every CTA
    uint64_t candidates[kCandidates], ranked[kCandidates];  // CTA 0: key and complement of the index
    uint32_t start[kRankBins];
    uint32_t scan[kWarps];
    uint32_t own_least, own_most, taken;
    Cut cut;
};

// A larger score has a larger key; 0 and -0 are equal, NaN is the largest, and no key is 0.
__device__ inline uint32_t key_of(float score) {
    uint32_t bits = __float_as_uint(score + 0.0f);
    if (score != score) return ~0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline uint32_t warp_inclusive_sum(uint32_t x) {
    for (int offset = 1; offset < 32; offset *= 2) {
        uint32_t other = __shfl_up_sync(kAll, x, offset);
        if (threadIdx.x % 32 >= offset) x += other;
    }
    return x;
}

__device__ inline void sync(uint32_t ctas) {
    if (ctas == 1) __syncthreads();
    else cluster_sync();
}

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
__device__ void count(Shared& s, Slice<Quads>& slice, int shift, int bits, uint32_t prefix) {
    const uint32_t mask = (1u << bits) - 1;
    slice.visit([&](uint32_t key, int) {
        if (key && key >> shift >> bits == prefix) atomicAdd(&s.count[key >> shift & mask], 1);
    });
}

template <int Quads> __device__ void find_extremes(Shared& s, Slice<Quads>& slice) {
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
__device__ void publish(Shared& s, uint32_t rank, uint32_t ctas) {
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
__device__ Found find_bin(const Shared& s, uint32_t need, uint32_t rank, uint32_t ctas) {
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
__device__ void narrow(Shared& s, int pass, int shift, int bits, int visible, int per_cta, int k,
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
__device__ void find_cut(Shared& s, Slice<Quads>& slice, int visible, int per_cta, int k,
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
__device__ void collect(Shared& s, Slice<Quads>& slice, uint32_t least, uint32_t first) {
    const uint32_t to = remote_address(shared_address(s.candidates), 0);
    slice.visit([&](uint32_t key, int i) {
        if (key >= least) {
            uint32_t slot = first + atomicAdd(&s.taken, 1);
            remote_write(to + 8 * slot, (uint64_t)key << 32 | ~(uint32_t)i);
        }
    });
}

// Writes the first `need` keys equal to the cut behind those above it, in index order.
template <int Quads>
__device__ void take_equals(Shared& s, Slice<Quads>& slice, uint32_t need, int* index) {
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

// Bitonic sort, largest first, of a power of two of candidates.
__device__ void sort(uint64_t* candidates, uint32_t size) {
#pragma unroll 1
    for (uint32_t block = 2; block <= size; block *= 2)
#pragma unroll 1
        for (uint32_t stride = block / 2; stride > 0; stride /= 2) {
            for (uint32_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
                uint32_t i = 2 * pair - (pair & (stride - 1));
                uint64_t a = candidates[i], b = candidates[i + stride];
                if ((a < b) == ((i & block) == 0)) {
                    candidates[i] = b;
                    candidates[i + stride] = a;
                }
            }
            __syncthreads();
        }
}

// CTA 0: writes the indices of the first `wanted` candidates by sorting all.
__device__ void rank_by_sorting(Shared& s, uint32_t candidates, uint32_t wanted, int* index) {
    uint32_t size = 2;
    while (size < candidates) size *= 2;
    for (uint32_t i = candidates + threadIdx.x; i < size; i += kThreads) s.candidates[i] = 0;
    __syncthreads();
    sort(s.candidates, size);
    for (uint32_t i = threadIdx.x; i < min(candidates, wanted); i += kThreads)
        index[i] = (int)~(uint32_t)s.candidates[i];
}

// CTA 0: writes the indices of the first `wanted` candidates, whose keys are from `low` to `most`.
__device__ void rank_candidates(Shared& s, uint32_t candidates, uint32_t low, uint32_t most,
                                uint32_t wanted, int* index) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int kLog = 11;
    static_assert(1 << kLog == kRankBins && kRankBins == 4 * kThreads);
    const int shift = max(0, 32 - __clz(most - low) - kLog);
    auto bin_of = [&](uint64_t candidate) { return (most - (uint32_t)(candidate >> 32)) >> shift; };
    for (uint32_t i = threadIdx.x; i < candidates; i += kThreads)
        atomicAdd(&s.start[bin_of(s.candidates[i])], 1);
    __syncthreads();
    uint4 counts = ((const uint4*)s.start)[threadIdx.x];
    uint32_t sum = counts.x + counts.y + counts.z + counts.w, upto = warp_inclusive_sum(sum);
    if (lane == 31) s.scan[warp] = upto;
    bool crowded = max(max(counts.x, counts.y), max(counts.z, counts.w)) > kCrowd;
    if (__syncthreads_or(crowded)) return rank_by_sorting(s, candidates, wanted, index);
    uint32_t first = __reduce_add_sync(kAll, lane < warp ? s.scan[lane] : 0) + upto - sum;
    ((uint4*)s.start)[threadIdx.x] = {first, first + counts.x, first + counts.x + counts.y,
                                      first + sum - counts.w};
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < candidates; i += kThreads) {
        uint64_t candidate = s.candidates[i];
        s.ranked[atomicAdd(&s.start[bin_of(candidate)], 1)] = candidate;
    }
    __syncthreads();  // now s.start[bin] is where the bin ends
    for (uint32_t i = threadIdx.x; i < candidates; i += kThreads) {
        uint64_t candidate = s.ranked[i];
        uint32_t bin = bin_of(candidate), first = bin ? s.start[bin - 1] : 0, rank = first;
        for (uint32_t other = first; other < s.start[bin]; other++)
            rank += s.ranked[other] > candidate;
        if (rank < wanted) index[rank] = (int)~(uint32_t)candidate;
    }
}

template <int Quads>
__global__ void __launch_bounds__(kThreads, Quads > 2 ? 1 : 2)
    topk_kernel(const float* score, const int64_t* visible, int64_t total, int k, int* index) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const uint32_t rank = cluster_rank(), ctas = cluster_size();
    const int64_t row = blockIdx.x / ctas;
    let_next_start();
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.count[i] = 0;
    for (int i = threadIdx.x; i < kRankBins; i += kThreads) s.start[i] = 0;
    if (threadIdx.x == 0) {
        s.own_least = ~0u;
        s.own_most = s.taken = 0;
        s.cut = {};
    }
    const int per_cta = ((int)total + 4 * ctas - 1) / (4 * ctas) * 4;
    const int per_warp = (per_cta + 128 * kWarps - 1) / (128 * kWarps) * 128;
    const int begin = per_cta * (int)rank + per_warp * (threadIdx.x / 32);
    const int stop = min(min(begin + per_warp, per_cta * (int)(rank + 1)), (int)total);
    index += row * k;
    cluster_arrive();
    wait_for_previous();
    const int count = visible[row] < total ? (int)visible[row] : (int)total;
    Slice<Quads> slice = {score + row * total, begin, stop, min(stop, count), total % 4 == 0};
    slice.read(begin);
    cluster_wait();  // the counters are 0, and every CTA of the cluster has started

    find_cut(s, slice, count, per_cta, k, rank, ctas);
    const Cut cut = s.cut;
    const uint32_t wanted = min(count, k);
    const uint32_t candidates = cut.above + (cut.exact ? 0 : cut.here);
    if (cut.exact) take_equals(s, slice, wanted - cut.above, index);
    if (candidates > 0)
        collect(s, slice, cut.low + cut.exact, cut.before_above + (cut.exact ? 0 : cut.before_here));
    sync(ctas);
    if (rank != 0) return;
    if (candidates > 0)
        rank_candidates(s, candidates, cut.low, cut.most, wanted, index);
    for (int i = threadIdx.x + (int)wanted; i < k; i += kThreads) index[i] = -1;
}

// CTAs a row: as many as have kSlice scores each, while all rows fit on the device at once.
int cluster_for(int64_t n, int64_t total, int64_t processors) {
    int ctas = 1;
    while (ctas < kMostCluster && ctas * kSlice < total && ctas * n <= processors) ctas *= 2;
    return ctas;
}

template <int Quads>
int launch_topk(unsigned ctas, const float* score, const int64_t* visible, int64_t n, int64_t total,
                int k, int* index, void* stream) {
    static const int allowed = [] {
        int status = allow_shared(topk_kernel<Quads>, sizeof(Shared));
        if (status) return status;
        return (int)cudaFuncSetAttribute(topk_kernel<Quads>,
                                         cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }();
    if (allowed) return allowed;
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {ctas, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
    config.gridDim = (unsigned)(n * ctas);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = sizeof(Shared);
    config.stream = (cudaStream_t)stream;
    return (int)cudaLaunchKernelEx(&config, topk_kernel<Quads>, score, visible, total, k, index);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// index [n, k] int32: the k <= total, 1024 best of the first visible[row] of score [n, total], best
// first, ties to the lower index, then -1.
DSV4_EXPORT int dsv4_index_topk(const float* score, const int64_t* visible, int64_t n, int64_t total,
                                int64_t k, int64_t processors, int* index, void* stream) {
    if (k > kMost || total > 1 << 30) return kUnsupported;
    if (n == 0 || k == 0) return cudaSuccess;
    unsigned ctas = cluster_for(n, total, processors);
    auto run = total <= ctas * 256 * kWarps ? launch_topk<2> : launch_topk<8>;
    return run(ctas, score, visible, n, total, (int)k, index, stream);
}
