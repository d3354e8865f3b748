// Op index_topk: the k best scores of every row, best first, ties to the lower index.
//
// A cluster takes one row, each CTA a contiguous slice. Three histogram passes over 11, 11 and 10
// bits find the k-th best key exactly, whatever the distribution; two passes in index order pick all
// above it and the first of its equals; rank 0 sorts what was picked. Nothing depends on timing.

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kMost = 1024;                  // k
constexpr int kMostCluster = 16, kBins = 2048;
constexpr int kBatch = 16;                   // keys of a thread in shared memory
constexpr int64_t kSlice = kBatch * kThreads;  // scores a CTA should have: then they are read once
constexpr unsigned kAll = ~0u;

struct Shared {
    uint32_t keys[kWarps][32 * kBatch];  // of each warp's scores
    uint64_t picked[kMost];  // rank 0: key and complement of the index
    union {
        struct {
            uint32_t own[kBins], all[kBins];  // of this CTA, of the cluster
        } count;
        uint64_t exchange[2][kMost];
    };
    uint32_t warp_above[kWarps], warp_equal[kWarps];
    uint32_t cta_above[kMostCluster], cta_equal[kMostCluster];
    uint32_t scan[kWarps];
    uint32_t bin, above;
};

// A larger score has a larger key; 0 and -0 are equal, NaN is the largest, and no key is 0.
__device__ inline uint32_t key_of(float score) {
    uint32_t bits = __float_as_uint(score + 0.0f);
    if (score != score) return ~0u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The scores of one warp, in order. A batch of keys is kept; a slice of one batch is read only once.
struct Slice {
    const float* score;
    int begin, end;
    uint32_t* key;  // the batch last read; 0 past the end
    bool uniform;   // all keys of the batch are the same

    __device__ void read(int base) {
        const int lane = threadIdx.x % 32;
        uint32_t differs = 0, first = 0, mine[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
            int i = base + 32 * j + lane;
            mine[j] = i < end ? key_of(score[i]) : 0;
        }
        first = __shfl_sync(kAll, mine[0], 0);
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
            differs |= mine[j] ^ first;
            key[32 * j + lane] = mine[j];  // read by this lane only
        }
        uniform = !__any_sync(kAll, differs);
    }
    // wanted() for every batch, and if so f(key, index) for its keys in order, all lanes together.
    template <class W, class F> __device__ void visit(W wanted, F f) {
        const int lane = threadIdx.x % 32;
        const bool once = end - begin <= 32 * kBatch;
#pragma unroll 1
        for (int base = begin; base < end; base += 32 * kBatch) {
            if (!once) read(base);
            if (!wanted()) continue;
#pragma unroll 2
            for (int j = 0; j < kBatch; j++) f(key[32 * j + lane], base + 32 * j + lane);
        }
    }
};

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

// The cluster's counts in every CTA: each CTA adds up its share of the bins and hands it out.
__device__ const uint32_t* add_up(Shared& s, uint32_t rank, uint32_t ctas) {
    sync(ctas);
    if (ctas == 1) return s.count.own;
    uint32_t share = kBins / ctas;
    for (uint32_t i = threadIdx.x; i < share; i += kThreads) {
        uint32_t bin = rank * share + i, total = 0;
        uint32_t own = shared_address(&s.count.own[bin]), all = shared_address(&s.count.all[bin]);
#pragma unroll 8
        for (uint32_t from = 0; from < ctas; from++) total += remote_load(remote_address(own, from));
#pragma unroll 8
        for (uint32_t to = 0; to < ctas; to++) remote_write(remote_address(all, to), total);
    }
    cluster_sync();
    return s.count.all;
}

// s.bin: the bin of the need-th best; s.above: how many are in better bins.
__device__ void find_bin(Shared& s, const uint32_t* counts, uint32_t need) {
    constexpr int kEach = kBins / kThreads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int top = kBins - 1 - kEach * threadIdx.x;  // this thread has bins top, top - 1, ...
    uint32_t mine = 0;
    for (int i = 0; i < kEach; i++) mine += counts[top - i];
    uint32_t sum = warp_inclusive_sum(mine);
    if (lane == 31) s.scan[warp] = sum;
    __syncthreads();
    uint32_t before = lane < warp ? s.scan[lane] : 0;
    uint32_t above = __reduce_add_sync(kAll, before) + sum - mine;
    for (int i = 0; i < kEach; i++) {
        uint32_t here = counts[top - i];
        if (above < need && need <= above + here) {
            s.bin = top - i;
            s.above = above;
        }
        above += here;
    }
    __syncthreads();
}

// The need-th best key of the row; `need` becomes how many of its equals are wanted.
__device__ uint32_t find_threshold(Shared& s, Slice& slice, uint32_t rank, uint32_t ctas,
                                   uint32_t& need) {
    uint32_t prefix = 0;
#pragma unroll 1
    for (int pass = 0; pass < 3; pass++) {
        const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
        for (int i = threadIdx.x; i < kBins; i += kThreads) s.count.own[i] = 0;
        __syncthreads();
        auto bin_of = [&](uint32_t key) { return s.count.own + (key >> shift & ((1u << bits) - 1)); };
        auto counts = [&](uint32_t key) { return key && key >> shift >> bits == prefix; };
        slice.visit(
            [&] {  // a warp whose keys are all the same adds them at once: equal scores cost no more
                if (slice.uniform && threadIdx.x % 32 == 0 && counts(slice.key[0]))
                    atomicAdd(bin_of(slice.key[0]), 32 * kBatch);
                return !slice.uniform;
            },
            [&](uint32_t key, int) {
                if (counts(key)) atomicAdd(bin_of(key), 1);
            });
        find_bin(s, add_up(s, rank, ctas), need);
        prefix = prefix << bits | s.bin;
        need -= s.above;
    }
    return prefix;
}

// Writes what is above the threshold and its first `need` equals to rank 0, equals from `first_equal`.
__device__ void pick(Shared& s, Slice& slice, uint32_t rank, uint32_t ctas, uint32_t threshold,
                     uint32_t need, uint32_t first_equal) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t above = 0, equal = 0;
    auto always = [] { return true; };
    slice.visit(always, [&](uint32_t key, int) {
        above += key > threshold;
        equal += key == threshold && key;
    });
    above = __reduce_add_sync(kAll, above);
    equal = __reduce_add_sync(kAll, equal);
    if (lane == 0) {
        s.warp_above[warp] = above;
        s.warp_equal[warp] = equal;
    }
    __syncthreads();
    above = s.warp_above[lane];
    equal = s.warp_equal[lane];
    uint32_t cta_above = __reduce_add_sync(kAll, above), cta_equal = __reduce_add_sync(kAll, equal);
    if (ctas > 1) {
        if (threadIdx.x < ctas) {
            remote_write(remote_address(shared_address(&s.cta_above[rank]), threadIdx.x), cta_above);
            remote_write(remote_address(shared_address(&s.cta_equal[rank]), threadIdx.x), cta_equal);
        }
        cluster_sync();
    }
    above = (lane < warp ? above : 0) + (lane < rank ? s.cta_above[lane % kMostCluster] : 0);
    equal = (lane < warp ? equal : 0) + (lane < rank ? s.cta_equal[lane % kMostCluster] : 0);
    above = __reduce_add_sync(kAll, above);
    equal = __reduce_add_sync(kAll, equal);
    const uint32_t picked = remote_address(shared_address(s.picked), 0);
    const unsigned before = (1u << lane) - 1;
    slice.visit(always, [&](uint32_t key, int i) {
        bool is_above = key > threshold, is_equal = key == threshold && key;
        unsigned lanes = __ballot_sync(kAll, is_above || is_equal);
        if (lanes == 0) return;
        unsigned above_lanes = __ballot_sync(kAll, is_above), equal_lanes = lanes & ~above_lanes;
        uint32_t number = equal + __popc(equal_lanes & before);
        uint32_t at = is_above ? above + __popc(above_lanes & before) : first_equal + number;
        if (is_above || (is_equal && number < need))
            remote_write(picked + 8 * at, (uint64_t)key << 32 | ~(uint32_t)i);
        above += __popc(above_lanes);
        equal += __popc(equal_lanes);
    });
    sync(ctas);
}

// Bitonic sort, largest first: thread i has and gets element i of `size`, a power of two from 32 to
// 1024. Only the first `size` threads.
__device__ uint64_t sort(Shared& s, uint64_t mine, int size) {
    const int i = threadIdx.x;
    int buffer = 0;
#pragma unroll 1
    for (int block = 2; block <= size; block *= 2)
#pragma unroll 1
        for (int stride = block / 2; stride > 0; stride /= 2) {
            uint64_t other;
            if (stride < 32) {
                other = __shfl_xor_sync(kAll, mine, stride);
            } else {
                s.exchange[buffer][i] = mine;
                named_barrier(1, size);
                other = s.exchange[buffer][i ^ stride];
                buffer ^= 1;
            }
            bool larger = ((i & block) == 0) == ((i & stride) == 0);
            mine = (mine > other) == larger ? mine : other;
        }
    return mine;
}

__global__ void __launch_bounds__(kThreads)
    topk_kernel(const float* score, const int64_t* visible, int64_t total, int k, int* index) {
    extern __shared__ __align__(16) char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    const uint32_t rank = cluster_rank(), ctas = cluster_size();
    const int64_t row = blockIdx.x / ctas;
    const int warp = threadIdx.x / 32;
    let_next_start();
    wait_for_previous();
    const int count = visible[row] < total ? (int)visible[row] : (int)total;
    const int per_cta = (count + ctas - 1) / ctas, per_warp = (per_cta + kThreads - 1) / kThreads * 32;
    const int end_of_cta = min(per_cta * (int)(rank + 1), count);
    Slice slice = {score + row * total, per_cta * (int)rank + per_warp * warp, 0, s.keys[warp], false};
    slice.end = min(slice.begin + per_warp, end_of_cta);
    slice.read(slice.begin);

    const uint32_t wanted = min(count, k);
    uint32_t need = 0, threshold = 0;
    if (count > k) {
        need = wanted;
        threshold = find_threshold(s, slice, rank, ctas, need);
    }
    pick(s, slice, rank, ctas, threshold, need, wanted - need);
    if (rank != 0) return;
    int size = 32;
    while (size < wanted) size *= 2;
    for (int i = threadIdx.x + (int)wanted; i < k; i += kThreads) index[row * k + i] = -1;
    if (threadIdx.x >= size) return;
    uint64_t mine = threadIdx.x < wanted ? s.picked[threadIdx.x] : 0;
    mine = sort(s, mine, size);
    if (threadIdx.x < wanted) index[row * k + threadIdx.x] = (int)~(uint32_t)mine;
}

// CTAs a row: enough for slices of kSlice, as long as the device has room for all rows at once.
int cluster_for(int64_t n, int64_t total, int64_t processors) {
    int ctas = 1;
    while (ctas < kMostCluster && ctas * kSlice < total && 2 * ctas * n <= processors) ctas *= 2;
    return ctas;
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
    static const int allowed = [] {
        int status = allow_shared(topk_kernel, sizeof(Shared));
        if (status) return status;
        return (int)cudaFuncSetAttribute(topk_kernel,
                                         cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }();
    if (allowed) return allowed;
    unsigned ctas = cluster_for(n, total, processors);
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
    return (int)cudaLaunchKernelEx(&config, topk_kernel, score, visible, total, (int)k, index);
}
