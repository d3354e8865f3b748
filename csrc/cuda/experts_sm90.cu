// Ops experts and shared_expert: gate and up with clamped SwiGLU and routing weight, then down, then
// the sum over a token's experts in slot order. Few pairs an expert: the weights are streamed
// (experts_few.cuh). Many: in tiles, 4-bit formats by experts_many.cuh, others by experts_tile.cuh.

#include <assert.h>

#include "experts_few.cuh"
#include "experts_many.cuh"
#include "experts_tile.cuh"

namespace dsv4 {
namespace {

constexpr int kMostExperts = 1024, kCombineThreads = 256;

// body(pair, expert) for every pair of the block's, with the loads of eight at a time under way.
template <class Body> __device__ void for_each_pair(const Moe& m, Body body) {
    constexpr int kAtOnce = 8;
    const int pairs = m.n * m.k;
    for (int first = threadIdx.x; first < pairs; first += kAtOnce * kMostExperts) {
        int expert[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            int pair = first + i * kMostExperts;
            expert[i] = pair < pairs ? m.ids[pair] : 0;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
            if (first + i * kMostExperts < pairs) body(first + i * kMostExperts, expert[i]);
    }
}

// Lists the pairs of each expert, in pieces of at most m.most. One block; the order of an expert's
// pairs does not matter to any result.
__device__ void list_pairs(const Moe& m) {
    __shared__ int counts[kMostExperts], pairs_to[kMostExperts], pieces_to[kMostExperts];
    const int e = threadIdx.x;
    counts[e] = 0;
    __syncthreads();
    for_each_pair(m, [&](int, int expert) {
        assert(expert >= 0 && expert < m.count && "experts: an expert id is out of range");
        atomicAdd(&counts[expert], 1);
    });
    __syncthreads();
    int mine = counts[e], pieces = (mine + m.most - 1) / m.most;
    pairs_to[e] = mine;
    pieces_to[e] = pieces;
    for (int step = 1; step < kMostExperts; step *= 2) {  // sums of all up to and with e
        __syncthreads();
        int a = e >= step ? pairs_to[e - step] : 0, b = e >= step ? pieces_to[e - step] : 0;
        __syncthreads();
        pairs_to[e] += a;
        pieces_to[e] += b;
    }
    int first = pairs_to[e] - mine;
    for (int i = 0; i < pieces; i++)
        m.work[pieces_to[e] - pieces + i] = {e, first + i * m.most, min(m.most, mine - i * m.most)};
    if (e == kMostExperts - 1) *m.pieces = pieces_to[e];
    counts[e] = first;
    __syncthreads();
    for_each_pair(m, [&](int pair, int expert) { m.order[atomicAdd(&counts[expert], 1)] = pair; });
}

// Block 0: the list, if there is one; the others: `placed`, x with its columns in places.
__global__ void __launch_bounds__(kMostExperts) prepare_kernel(const Moe m, bf16* placed) {
    let_next_start();
    wait_for_previous();
    if (blockIdx.x > 0) place_columns(m.x, placed, blockIdx.x - 1, m.n * m.d / 8);
    else if (m.order != nullptr) list_pairs(m);
}

// y[token] = the sum of its pairs' partial results, in slot order; four columns a thread.
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Moe m) {
    let_next_start();
    wait_for_previous();
    const int64_t column = (blockIdx.x * (int64_t)kCombineThreads + threadIdx.x) * 4;
    if (column >= m.d) return;
    const int64_t token = blockIdx.y;
    float4 total = {0, 0, 0, 0};
#pragma unroll 4
    for (int s = 0; s < m.k; s++) {
        const float4 part = *(const float4*)(m.partial + (token * m.k + s) * m.d + column);
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    *(float4*)(m.y + token * m.d + column) = total;
}

inline int combine(const Moe& m, void* stream) {
    if (m.k == 1) return cudaSuccess;  // the partial results are y
    return launch(combine_kernel, dim3(ceil_div(m.d, 4 * kCombineThreads), m.n), kCombineThreads, 0,
                  stream, m);
}

// Blocks of which one fits on a multiprocessor.
inline int block_count() {
    int count = 1, device = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

template <class Policy> int few_pairs(Moe m, void* stream) {
    const int blocks = block_count();
    int status = launch_few<Policy, Product::kHidden>(m, blocks, stream);
    if (status != cudaSuccess) return status;
    const int pieces_of = m.most;
    if (m.n == 1 && m.k > 1 && m.k <= kFewPairs) {
        m.most = (int)m.k;
        if (few_fits<Policy>(m)) return launch_few<Policy, Product::kDownToken>(m, blocks, stream);
        m.most = pieces_of;
    }
    status = launch_few<Policy, Product::kDown>(m, blocks, stream);
    return status == cudaSuccess ? combine(m, stream) : status;
}

// The most pairs of a piece for few_pairs, as fit in shared memory; 0: none do.
template <class Policy> int few_size(Moe m) {
    for (m.most = m.n == 1 ? 1 : kFewPairs; m.most > 0; m.most /= 2)
        if (few_fits<Policy>(m)) break;
    return m.most;
}

// The most pairs of a piece; up to kFewPairs they stand for few_pairs. By the pairs of an expert, on
// average: where one way has become faster than the other.
template <class Policy> int piece_size(const Moe& m) {
    const int64_t pairs = m.n * m.k;
    if (pairs <= 8 * m.count) return few_size<Policy>(m);
    if constexpr (!kHasMany<Policy>) return kTileTokens;
    if (!many_fits(m)) return few_size<Policy>(m);
    return pairs <= 48 * m.count ? 64 : 128;
}

template <class Policy> int experts(Moe m, void* stream) {
    m.most = piece_size<Policy>(m);
    if (m.most == 0) return kUnsupported;
    if (m.k == 1) m.partial = m.y;
    if (m.ids == nullptr || m.n == 1) m.order = nullptr;
    const bool many = kHasMany<Policy> && m.most > kFewPairs;
    bf16* placed = (bf16*)m.partial;  // until the second product
    int status = cudaSuccess;
    if (many || m.order != nullptr)
        status = launch(prepare_kernel, 1 + (many ? ceil_div(m.n * m.d / 8, 1024) : 0), kMostExperts,
                        0, stream, m, placed);
    if (status != cudaSuccess) return status;
    if (m.most <= kFewPairs) return few_pairs<Policy>(m, stream);
    if constexpr (kHasMany<Policy>) {
        status = m.most == 64 ? many_pairs<Policy, 64, 1>(m, placed, block_count(), stream)
                              : many_pairs<Policy, 128, 2>(m, placed, block_count(), stream);
    } else {
        int64_t pairs = m.n * m.k;
        int64_t pieces = m.order == nullptr ? ceil_div(pairs, m.most)
                                            : min(pairs, pairs / m.most + m.count);  // at most
        status = launch_tiles<Policy>(m, pieces, stream);
    }
    return status == cudaSuccess ? combine(m, stream) : status;
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y [n, d] float32 = sum over slots of routing * expert(x), x [n, d] bf16. `table` holds `count` times
// w1, w2, w3 (struct dsv4_weight, in device memory), all of `format`, inner columns in w2. ids and
// routing [n, k], or both null with k = 1. Scratch: hidden [n * k, inner] bf16, partial [n * k, d]
// float32, lists 4 * n * k + 1 int32.
DSV4_EXPORT int dsv4_experts(const void* x, int64_t n, int64_t d, const int32_t* ids,
                             const float* routing, int64_t k, const void* table, int64_t count,
                             int64_t inner, int format, float limit, void* hidden, float* partial,
                             int32_t* lists, float* y, void* stream) {
    const int64_t pairs = n * k;
    if (pairs == 0) return cudaSuccess;
    if (count > kMostExperts || pairs > INT32_MAX / 64) return kUnsupported;
    Moe m = {(const Expert*)table, ids, routing, (const bf16*)x, (bf16*)hidden, partial, y,
             (Work*)(lists + pairs), lists + 4 * pairs, lists, n, k, d, inner, count, limit, 0};
    return with_policy(format, d, [&](auto policy) {
        using Policy = decltype(policy);
        if (inner % Policy::kChunk) return kUnsupported;
        return experts<Policy>(m, stream);
    });
}
