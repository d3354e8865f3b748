// Op index_topk: the k best scores of every row, best first, ties to the lower index.
//
// A cluster takes one row. Every CTA bounds its share of the k best from below, by the maxima of small
// groups of its scores; the least of these bounds is, for most rows, just under the k-th best score. CTA 0
// gets all scores from there on and ranks them: bins over their range, comparisons within a bin; or a
// sort, where many share a bin. A row whose bound lets too few or too many through, takes the exact way
// of topk_exact.cuh; one that is constant needs neither. Nothing in the result depends on timing.

#include "topk_exact.cuh"
#include "topk_rank.cuh"

namespace dsv4 {
namespace {

constexpr int kRough = 512;       // bins of the groups' maxima
constexpr int kGroupsEach = 4;    // groups of a thread
constexpr int64_t kSlice = 2048;  // scores that are worth a CTA of their own

struct Shared {
    Ranking ranking;
    Exact exact;
    alignas(16) uint32_t rough[kRough];
    float4 summary[kMostCluster];  // bound, least, most of every CTA
    uint64_t summarised, collected;
    uint32_t own_low, own_most, own_least, taken;
};

// max(a, b), NaN if either is.
__device__ inline float max_nan(float a, float b) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}

// A share of a row in registers: every warp has whole runs of 128 scores, which go round the CTAs, so
// that no CTA gets all of the best from one place of the row.
template <int Quads> struct Share {
    const uint32_t rank = cluster_rank(), ctas = cluster_size();
    const int first = 128 * (threadIdx.x / 32 * ctas + rank) + threadIdx.x % 32 * 4;
    float value[4 * Quads];  // -inf where not visible

    __device__ int at(int quad) const { return first + quad * 128 * kWarps * (int)ctas; }
    // Returns how many scores of the row are visible.
    __device__ int read(const float* score, int total, const int64_t* visible) {
#pragma unroll
        for (int q = 0; q < Quads; q++) {
            const int i = at(q);
            if (total % 4 == 0 && i < total) {
                *(float4*)(value + 4 * q) = *(const float4*)(score + i);
            } else {
#pragma unroll
                for (int j = 0; j < 4; j++) value[4 * q + j] = i + j < total ? score[i + j] : 0;
            }
        }
        // Known only after the loads are on their way.
        const int count = *visible < total ? (int)*visible : total;
#pragma unroll
        for (int j = 0; j < 4 * Quads; j++)
            if (at(j / 4) + j % 4 >= count) value[j] = -INFINITY;
        return count;
    }
};

// A lower bound, up to rounding, of the need-th best score of this CTA, or -inf; all threads.
__device__ float find_bound(Shared& s, const float (&group)[kGroupsEach], float low, float most,
                            uint32_t need) {
    const float width = (most - low) * (1.0f / (kRough - 1)), scale = __fdividef(1, width);
#pragma unroll
    for (int g = 0; g < kGroupsEach; g++)
        if (group[g] > -INFINITY) {
            int bin = (int)((most - group[g]) * scale);
            atomicAdd(&s.rough[min(max(bin, 0), kRough - 1)], 1);
        }
    __syncthreads();
    if (threadIdx.x >= 32) return 0;
    constexpr int kEach = kRough / 32;
    const uint4* mine = (const uint4*)(s.rough + kEach * threadIdx.x);
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kEach / 4; i++) sum += mine[i].x + mine[i].y + mine[i].z + mine[i].w;
    const uint32_t upto = warp_inclusive_sum(sum);
    uint32_t before = upto - sum;
    int bins = kEach * threadIdx.x;  // that hold less than need
#pragma unroll
    for (int i = 0; i < kEach / 4; i++) {
        const uint4 four = mine[i];
        bins += (before += four.x) < need;
        bins += (before += four.y) < need;
        bins += (before += four.z) < need;
        bins += (before += four.w) < need;
    }
    const unsigned reached = __ballot_sync(kAll, need <= upto);
    if (reached == 0) return -INFINITY;
    bins = __shfl_sync(kAll, bins, __ffs(reached) - 1);
    return fmaxf(low, most - (bins + 1.01f) * width);
}

// Every CTA's summary in every CTA: the bound of its share of the k best, its extremes.
template <int Quads>
__device__ void summarise(Shared& s, const Share<Quads>& share, int count, int k) {
    const int lane = threadIdx.x % 32;
    float group[kGroupsEach], low = INFINITY, most = -INFINITY, least = INFINITY;
#pragma unroll
    for (int g = 0; g < kGroupsEach; g++) {
        group[g] = share.value[g * Quads];
#pragma unroll
        for (int j = 1; j < Quads; j++) group[g] = max_nan(group[g], share.value[g * Quads + j]);
        most = max_nan(most, group[g]);
        if (group[g] > -INFINITY) low = fminf(low, group[g]);
    }
#pragma unroll
    for (int j = 0; j < 4 * Quads; j++)
        if (share.at(j / 4) + j % 4 < count) least = fminf(least, share.value[j]);
    uint32_t low_key = __reduce_min_sync(kAll, key_of(low));
    uint32_t most_key = __reduce_max_sync(kAll, key_of(most));
    uint32_t least_key = __reduce_min_sync(kAll, key_of(least));
    if (lane == 0) {
        atomicMin(&s.own_low, low_key);
        atomicMax(&s.own_most, most_key);
        atomicMin(&s.own_least, least_key);
    }
    __syncthreads();
    low = score_of(s.own_low), most = score_of(s.own_most), least = score_of(s.own_least);
    const uint32_t ctas = share.ctas;
    float bound = -INFINITY;
    if (low <= most && most < INFINITY) bound = find_bound(s, group, low, most, (k + ctas - 1) / ctas);
    if (threadIdx.x < ctas)
        remote_store(remote_address(shared_address(&s.summary[share.rank]), threadIdx.x),
                     float4{bound, least, most, 0},
                     remote_address(shared_address(&s.summarised), threadIdx.x));
}

// Sends the scores from `bound` on, -inf for all that are visible, to this CTA's region in CTA 0.
template <int Quads>
__device__ void collect(Shared& s, const Share<Quads>& share, float bound, int count) {
    const uint32_t size = kCandidates / share.ctas;
    uint32_t wanted = 0;
#pragma unroll
    for (int j = 0; j < 4 * Quads; j++)
        wanted |= (uint32_t)(share.value[j] >= bound && share.at(j / 4) + j % 4 < count) << j;
    const uint32_t sum = warp_inclusive_sum(__popc(wanted));
    uint32_t slot = 0;
    if (threadIdx.x % 32 == 31) slot = atomicAdd(&s.taken, sum);
    slot = __shfl_sync(kAll, slot, 31) + sum - __popc(wanted);
    const uint32_t to = remote_address(shared_address(s.ranking.candidates + share.rank * size), 0);
    const uint32_t barrier = shared_address(&s.collected), there = remote_address(barrier, 0);
#pragma unroll
    for (int j = 0; j < 4 * Quads; j++)
        if (wanted >> j & 1) {
            const uint32_t index = share.at(j / 4) + j % 4;
            if (slot < size)
                remote_store(to + 8 * slot, (uint64_t)key_of(share.value[j]) << 32 | ~index, there);
            slot++;
        }
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
__device__ bool bounded_topk(Shared& s, const Share<Quads>& share, int count, int k, int* index) {
    const uint32_t ctas = share.ctas;
    summarise(s, share, count, k);
    barrier_wait(&s.summarised, 0);
    float bound = INFINITY, least = INFINITY, most = -INFINITY;
    for (uint32_t cta = 0; cta < ctas; cta++) {
        const float4 its = s.summary[cta];
        bound = fminf(bound, its.x), least = fminf(least, its.y), most = max_nan(most, its.z);
    }
    const int wanted = min(count, k);
    if (least == most) {  // all equal
        if (share.rank == 0)
            for (int i = threadIdx.x; i < wanted; i += kThreads) index[i] = i;
        return true;
    }
    if (ctas == 1 && count <= kCandidates && most < INFINITY) bound = -INFINITY;
    else if (!(bound > -INFINITY)) return false;
    collect(s, share, bound, count);
    barrier_wait(&s.collected, 0);
    uint32_t candidates = 0;
    bool fits = true;
    for (uint32_t cta = 0; cta < ctas; cta++) {
        candidates += s.ranking.count[cta];
        fits = fits && s.ranking.count[cta] <= kCandidates / ctas;
    }
    if (!fits || candidates < wanted) return false;
    if (share.rank == 0)
        rank_candidates(s.ranking, ctas, key_of(fmaxf(bound, least)), key_of(most), wanted, index);
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
    for (int i = threadIdx.x; i < kRankBins; i += kThreads) s.ranking.start[i] = 0;
    s.rough[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        s.own_low = s.own_least = ~0u;
        s.own_most = s.taken = 0;
        barrier_init(&s.summarised, 1);
        barrier_init(&s.collected, ctas);
        fence_barrier_init();
        barrier_expect(&s.summarised, ctas * sizeof(float4));
    }
    cluster_arrive_relaxed();
    score += row * total;
    index += row * k;
    wait_for_previous();
    Share<Quads> share;
    const int count = share.read(score, total, visible + row);
    __syncthreads();  // the counters are set
    cluster_wait();   // and every CTA of the cluster has its barriers
    const bool held = total <= (int)ctas * kThreads * 4 * Quads;
    if (!held || !bounded_topk(s, share, count, k, index))
        exact_topk<Quads>(s.exact, s.ranking, score, total, count, k, index);
    if (rank == 0)
        for (int i = threadIdx.x + min(count, k); i < k; i += kThreads) index[i] = -1;
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
    unsigned ctas = cluster_for(n, total, processors);
    auto run = total <= ctas * 256 * kWarps ? launch_topk<2> : launch_topk<8>;
    return run(ctas, score, visible, n, total, (int)k, index, stream);
}
