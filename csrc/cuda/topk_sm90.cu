// Op index_topk: the k best scores of every row, best first, ties to the lower index.
//
// The maxima of small groups of scores bound the k-th best from below, for most rows closely. All scores
// from the bound on are candidates, and are ranked; of a short row, all scores. Of few rows that are not
// long, many CTAs read the whole row and each ranks its share of the candidates; of many, a CTA has each
// row to itself. A cluster reads a long row once, and CTA 0 ranks. A row whose bound lets too few or too
// many through takes the exact way of topk_exact.cuh; one that is constant needs neither. Nothing in the
// result depends on timing.

#include "topk_few.cuh"
#include "topk_short.cuh"

namespace dsv4 {
namespace {

constexpr int kMostQuads = 8;     // of scores that a thread holds
constexpr int kShort = 4 * kMostQuads * kThreads;  // scores of a row that a CTA holds
constexpr int kWideQuads = 10, kWide = 4 * kWideQuads * kThreads;  // that it can hold, more slowly
constexpr int64_t kSlice = 2048;   // scores of a row that are worth a CTA of a cluster

// ---------------------------------------------------------------- rows that a CTA holds

// The least key of a share that is the whole row.
template <int Quads> __device__ uint32_t find_least(Shared& s, const Share<Quads>& share) {
    uint32_t least = ~0u;
#pragma unroll
    for (int j = 0; j < 4 * Quads; j++)
        if (share.at(j) < share.count) least = min(least, key_of(share.value[j]));
    return s.range.find(least, 0).x;
}

// Whether the row is done; if not, nothing of it is written.
template <int Quads> __device__ bool whole_topk(Shared& s, const Share<Quads>& share, int k, int* index) {
    const uint32_t wanted = min(share.count, k);
    float group[kGroupsEach], bound = -INFINITY;
    const Extremes its = find_extremes(s, share, group);
    if (its.low == its.most && __syncthreads_and(share.all_are(its.most))) {
        for (int i = threadIdx.x; i < wanted; i += kThreads) index[i] = i;
        return true;
    }
    if (its.finite()) bound = find_bound(s, group, its, k);
    if (threadIdx.x == 0) s.bound = bound;
    __syncthreads();
    bound = s.bound;
    const bool all = !(bound > -INFINITY);
    if (all && share.count > kCandidates) return false;
    // First where the candidates are, then what: so that no thread waits for one after another.
    uint32_t* where = s.exact.count;
    share.take(share.from(bound), &s.taken, [&](uint32_t slot, uint32_t index) {
        if (slot < kCandidates) where[slot] = index;
    });
    __syncthreads();
    const uint32_t taken = s.taken;
    if (taken > kCandidates || taken < wanted) return false;
    Candidates<kEach> mine;
#pragma unroll
    for (int j = 0; j < kEach; j++) {
        const uint32_t slot = j * kThreads + threadIdx.x;
        mine[j] = slot < taken ? share.candidate(where[slot]) : 0;
    }
    const uint32_t low = all ? find_least(s, share) : key_of(bound);
    rank_candidates(s.ranking, mine, low, key_of(its.most), wanted, index);
    return true;
}

// A CTA a row.
template <int Quads>
__global__ void __launch_bounds__(kThreads, 1)
    whole_topk_kernel(const float* score, const int64_t* visible, int total, int k, int* index) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const int64_t row = blockIdx.x;
    let_next_start();
    s.clear();
    index += row * k;
    Share<Quads> share(score + row * total);
    wait_for_previous();
    share.read(total, visible + row);
    __syncthreads();  // the counters are set
    const bool held = total <= kThreads * 4 * Quads;
    if (!held || !whole_topk(s, share, k, index))
        exact_topk<Quads>(s.exact, s.ranking, share.score, total, share.count, k, index);
    for (int i = threadIdx.x + min(share.count, k); i < k; i += kThreads) index[i] = -1;
}

template <int Quads>
int launch_whole(const float* score, const int64_t* visible, int64_t n, int64_t total, int k, int* index,
                 void* stream) {
    static const int allowed = allow_shared(whole_topk_kernel<Quads>, sizeof(Shared));
    if (allowed) return allowed;
    return launch(whole_topk_kernel<Quads>, dim3(n), kThreads, sizeof(Shared), stream, score, visible, total,
                  k, index);
}

// ---------------------------------------------------------------- longer rows

// Every CTA's summary in every CTA: the bound of its share of the k best, its greatest, whether all its
// scores are that.
template <int Quads> __device__ void summarise(Shared& s, const Share<Quads>& share, int k) {
    float group[kGroupsEach], bound = -INFINITY;
    const Extremes its = find_extremes(s, share, group);
    const bool equal = its.low == its.most && __syncthreads_and(share.all_are(its.most));
    const uint32_t ctas = share.ctas;
    if (equal) bound = its.most;
    else if (its.finite()) bound = find_bound(s, group, its, (k + ctas - 1) / ctas);
    if (threadIdx.x < ctas)
        remote_store(remote_address(shared_address(&s.summary[share.rank]), threadIdx.x),
                     float4{bound, its.most, equal ? 1.0f : 0.0f, 0},
                     remote_address(shared_address(&s.summarised), threadIdx.x));
}

// Sends the scores from `bound` on, -inf for all that are visible, to this CTA's region in CTA 0.
template <int Quads> __device__ void collect(Shared& s, const Share<Quads>& share, float bound) {
    const uint32_t size = kCandidates / share.ctas;
    const uint32_t to = remote_address(shared_address(s.ranking.candidates + share.rank * size), 0);
    const uint32_t barrier = shared_address(&s.collected), there = remote_address(barrier, 0);
    share.take(share.from(bound), &s.taken, [&](uint32_t slot, uint32_t index) {
        if (slot < size) remote_store(to + 8 * slot, share.candidate(index), there);
    });
    __syncthreads();
    const uint32_t cta = threadIdx.x, taken = s.taken;
    if (cta < share.ctas) {
        remote_expect(remote_address(barrier, cta), 4 + (cta == 0 ? 8 * min(taken, size) : 0));
        remote_store(remote_address(shared_address(&s.ranking.count[share.rank]), cta), taken,
                     remote_address(barrier, cta));
    }
}

// Whether the row is done; if not, nothing of it is written.
template <int Quads>
__device__ bool bounded_topk(Shared& s, const Share<Quads>& share, int k, int* index) {
    const uint32_t ctas = share.ctas;
    summarise(s, share, k);
    barrier_wait(&s.summarised, 0);
    float bound = INFINITY, most = -INFINITY;
    for (uint32_t cta = 0; cta < ctas; cta++)
        bound = fminf(bound, s.summary[cta].x), most = max_nan(most, s.summary[cta].y);
    bool equal = true;
    for (uint32_t cta = 0; cta < ctas; cta++) {
        const bool empty = share.count <= kRun * (int)cta;
        equal = equal && (empty || (s.summary[cta].z && s.summary[cta].y == most));
    }
    const int wanted = min(share.count, k);
    if (equal) {
        if (share.rank == 0)
            for (int i = threadIdx.x; i < wanted; i += kThreads) index[i] = i;
        return true;
    }
    if (!(bound > -INFINITY)) return false;
    collect(s, share, bound);
    barrier_wait(&s.collected, 0);
    uint32_t candidates = 0;
    bool fits = true;
    for (uint32_t cta = 0; cta < ctas; cta++) {
        candidates += s.ranking.count[cta];
        fits = fits && s.ranking.count[cta] <= kCandidates / ctas;
    }
    if (!fits || candidates < wanted) return false;
    if (share.rank != 0) return true;
    Candidates<kEach> mine;
#pragma unroll
    for (int j = 0; j < kEach; j++) mine[j] = s.ranking.get(ctas, j * kThreads + threadIdx.x);
    rank_candidates(s.ranking, mine, key_of(bound), key_of(most), wanted, index);
    return true;
}

template <int Quads>
__global__ void __launch_bounds__(kThreads, 1)
    topk_kernel(const float* score, const int64_t* visible, int total, int k, int* index) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const uint32_t rank = cluster_rank(), ctas = cluster_size();
    const int64_t row = blockIdx.x / ctas;
    let_next_start();
    if (threadIdx.x == 0) {
        barrier_init(&s.summarised, 1);
        barrier_init(&s.collected, ctas);
        fence_barrier_init();
        barrier_expect(&s.summarised, ctas * sizeof(float4));
    }
    s.clear();
    cluster_arrive_relaxed();
    index += row * k;
    Share<Quads> share(score + row * total);
    wait_for_previous();
    share.read(total, visible + row);
    __syncthreads();  // the counters are set
    cluster_wait();   // and every CTA of the cluster has its barriers
    const bool held = total <= (int)ctas * kThreads * 4 * Quads;
    if (!held || !bounded_topk(s, share, k, index))
        exact_topk<Quads>(s.exact, s.ranking, share.score, total, share.count, k, index);
    if (rank == 0)
        for (int i = threadIdx.x + min(share.count, k); i < k; i += kThreads) index[i] = -1;
}

// CTAs a row: as many as have kSlice scores each, while all rows fit on the device at once.
int cluster_for(int64_t n, int64_t total, int64_t processors) {
    int ctas = 1;
    while (ctas < kMostCluster && ctas * kSlice < total && 2 * ctas * n <= processors) ctas *= 2;
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
    return (int)cudaLaunchKernelEx(&config, topk_kernel<Quads>, score, visible, (int)total, k, index);
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
    if (const int parts = parts_of_few(n, total, processors); parts > 1)
        return launch_few(parts, score, visible, n, total, k, index, stream);
    if (total <= kCandidates) {
        auto run = total <= kThreads       ? launch_short<1>
                   : total <= 2 * kThreads ? launch_short<2>
                   : total <= 3 * kThreads ? launch_short<3>
                                           : launch_short<4>;
        return run(score, visible, n, total, k, n <= processors, index, stream);
    }
    const unsigned ctas = total <= kShort ? 1 : cluster_for(n, total, processors);
    if (ctas == 1 || total <= kWide) {
        auto run = total <= kShort / 4 ? launch_whole<kMostQuads / 4>
                   : total <= kShort   ? launch_whole<kMostQuads>
                                       : launch_whole<kWideQuads>;
        return run(score, visible, n, total, (int)k, index, stream);
    }
    auto run = total <= ctas * kShort / 4 ? launch_topk<kMostQuads / 4> : launch_topk<kMostQuads>;
    return run(ctas, score, visible, n, total, (int)k, index, stream);
}
