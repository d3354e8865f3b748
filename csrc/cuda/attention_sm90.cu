// Op attention: softmax over window rows and selected entries with a sink, K = V, shared by all heads.

#include <limits.h>

#include "attention_any.cuh"
#include "attention_few.cuh"
#include "attention_packed.cuh"
#include "attention_tile.cuh"

namespace dsv4 {
namespace {

template <bool kPacked>
__global__ void __launch_bounds__(kConsumers + kProducers<kPacked>, 1) attention_kernel(Problem p) {
    extern __shared__ char memory[];
    Shared& s = *reinterpret_cast<Shared*>((shared_address(memory) + 1023) / 1024 * 1024 -
                                           shared_address(memory) + memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            for (int half = 0; half < 2; half++) {
                // Of bfloat16, once more for the bits of what exists.
                barrier_init(&s.full[i][half], kProducers<kPacked> + !kPacked);
                barrier_init(&s.empty[i][half], kConsumers / 2);
            }
            for (int half = 0; half < 2; half++)
                barrier_init(&s.weighed[i][half], kConsumers / 2);
        }
        barrier_init(&s.q_full, kProducers<kPacked>);
        barrier_init(&s.q_empty, kConsumers);
        barrier_init(&s.summed, kConsumers);
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous();
    let_next_start();  // not before: the few tokens launched beside this kernel wait for nothing else
    if (threadIdx.x >= kConsumers) {
        fewer_registers<kPacked ? 56 : 72>();
        if constexpr (kPacked) gather_packed(p, s);
        else gather(p, s);
        if (p.shares > 1 && !p.part) {  // the others' `join`
            cluster_sync();
            cluster_sync();
        }
    } else if (threadIdx.x < kConsumers / 2) {
        more_registers<kPacked ? 200 : 216>();
        compute<0, kPacked>(p, s);
    } else {
        more_registers<kPacked ? 200 : 216>();
        compute<1, kPacked>(p, s);
    }
}

// One block a token and head: the shares' sums, scaled to one another, with the sink.
constexpr int kMostShares = 64;
__global__ void __launch_bounds__(kDim / 4)
    combine_kernel(const float* part, const Softmax* part_sums, const float* sink, int64_t heads,
                   int shares, bf16* o, float* lse) {
    __shared__ float factor[kMostShares];
    const int64_t row = blockIdx.x;
    let_next_start();
    wait_for_previous();
    if (threadIdx.x < 32) {
        Softmax all = {-INFINITY, 0};
        for (int i = threadIdx.x; i < shares; i += 32)
            all.most = fmaxf(all.most, part_sums[row * shares + i].most);
        for (int offset = 16; offset > 0; offset /= 2)
            all.most = fmaxf(all.most, __shfl_xor_sync(~0u, all.most, offset));
        for (int i = threadIdx.x; i < shares; i += 32) {
            Softmax one = part_sums[row * shares + i];
            all.sum += one.sum * weight_of(one.most, all.most);
        }
        all.sum = warp_sum(all.sum);
        Softmax total = with_sink(all, sink[row % heads]);
        for (int i = threadIdx.x; i < shares; i += 32)
            factor[i] = weight_of(part_sums[row * shares + i].most, total.most) / total.sum;
        if (threadIdx.x == 0) lse[row] = lse_of(total);
    }
    __syncthreads();
    float4 result = {};
    const float4* from = (const float4*)(part + row * shares * kDim) + threadIdx.x;
#pragma unroll 8
    for (int i = 0; i < shares; i++) {
        float4 v = from[i * (kDim / 4)];
        result.x += v.x * factor[i];
        result.y += v.y * factor[i];
        result.z += v.z * factor[i];
        result.w += v.w * factor[i];
    }
    *(uint2*)(o + row * kDim + 4 * threadIdx.x) = {pack_bf16(result.x, result.y),
                                                   pack_bf16(result.z, result.w)};
}

// At most one CTA a processor.
template <bool kPacked> int launch_attention(const Problem& p, void* stream) {
    void (*kernel)(Problem) = attention_kernel<kPacked>;
    const size_t shared = sizeof(Shared) + 1024;  // to align it
    int device, processors, status = allow_shared(kernel, shared);
    if (!status) status = cudaGetDevice(&device);
    if (!status)
        status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status) return status;
    const int64_t blocks = p.works < processors ? p.works : processors;
    const int ranks = p.part ? 1 : p.shares;
    return launch_clusters(ranks, kernel, dim3(blocks / ranks, 1, ranks), kConsumers + kProducers<kPacked>,
                           shared, stream, p);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// o [n, heads, dim] and lse [n, heads] of q [n, heads, dim] over rows of window [window_rows, dim]
// and entries [entry_rows, dim]; indices [n, width], -1 for none. Where plain > 0, the rows of both
// pools are packed entries with `plain` dimensions in codes. `shares` CTAs of `columns` heads (16, 32,
// 64) share a token's blocks of 64 keys, none without any. They are a cluster, at most 16 with one or
// two blocks each, or 1, 2 or 4 of 64 heads; where `part` is not null, a second kernel combines up to 64
// of 64 heads by way of part [n, heads, shares, dim] and part_sums [n, heads, shares, 2]. Where positions
// [n] and freqs [32] are not null, the last 64 dimensions of o are turned back, and o as it was goes to
// unturned [n, heads, dim] unless that is null; not with 64 heads. Where `beside` is not 0, nor 64 heads, the
// kernel does not wait for the one before, which must be this one with 64 heads a CTA and one share.
DSV4_EXPORT int dsv4_attention(const void* q, const void* window, int64_t window_rows,
                               const int* window_index, int64_t window_width, const void* entries,
                               int64_t entry_rows, const int* entry_index, int64_t entry_width,
                               const float* sink, float scale, int64_t n, int64_t heads,
                               int64_t dim, int64_t plain, int64_t columns, int64_t shares, int64_t beside,
                               float* part, float* part_sums, const int64_t* positions,
                               const float* freqs, void* unturned, void* o, float* lse, int dtype,
                               void* stream) {
    auto few = [](int64_t rows) { return (int)(rows < INT_MAX ? rows : INT_MAX); };
    Keys keys = {{window, window_index, few(window_rows), (int)window_width},
                 {entries, entry_index, few(entry_rows), (int)entry_width}};
    int64_t blocks = blocks_of(window_width) + blocks_of(entry_width);
    const bool tensor_cores = dtype == DSV4_BF16 && dim == kDim &&
                              (plain == 0 || plain == kPlain) && scale > 0 && blocks > 0;
    if (shares > kMostShares || (positions && !(tensor_cores && columns < kHeads)))
        return kUnsupported;
    if (tensor_cores) {
        Problem p = {(const bf16*)q,
                     keys,
                     sink,
                     scale,
                     (int)heads,
                     (int)(n * ceil_div(heads, kHeads) * shares),
                     (int)shares,
                     (int)ceil_div(blocks, shares),
                     (bf16*)o,
                     lse,
                     part,
                     (Softmax*)part_sums,
                     positions,
                     freqs,
                     (bf16*)unturned,
                     beside != 0};
        if (columns == 16)
            return (plain ? launch_few<16, true> : launch_few<16, false>)(p, n, stream);
        if (columns == 32)
            return (plain ? launch_few<32, true> : launch_few<32, false>)(p, n, stream);
        int status = (plain ? launch_attention<true> : launch_attention<false>)(p, stream);
        if (status || !part) return status;
        return launch(combine_kernel, dim3(n * heads), kDim / 4, 0, stream, (const float*)part,
                      (const Softmax*)part_sums, sink, heads, (int)shares, (bf16*)o, lse);
    }
    if (dim > kMostWidth) return kUnsupported;
    return with_dtype(dtype, [&](auto tag) {
        using T = type_of<decltype(tag)>;
        EntryLayout layout = {(int)dim, (int)plain};
        return launch(plain ? attention_any_kernel<T, true> : attention_any_kernel<T, false>,
                      dim3(n * heads), 32 * kWarps, 0, stream, (const T*)q, keys, sink, scale, heads,
                      layout, (T*)o, lse);
    });
}

// How many clusters of `ranks` CTAs run at once where no two of these share a processor.
DSV4_EXPORT int dsv4_attention_clusters(int64_t ranks, int* clusters, void*) {
    if (ranks < 1 || ranks > kMostRanks) return kUnsupported;
    auto kernel = attention_few_kernel<32, false>;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {1, 1, (unsigned)ranks};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1, 1, ranks);
    config.blockDim = kFewThreads;
    config.dynamicSmemBytes = few_shared<32>(kFewBlocks);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int status = allow_clusters(kernel, ranks, config.dynamicSmemBytes);
    return status ? status : (int)cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}
