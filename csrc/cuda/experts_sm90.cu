// Ops experts and shared_expert: gate and up with clamped SwiGLU and routing weight, then down, then
// the sum over a token's experts in slot order. One token: experts_ring.cuh. Few pairs an expert, and what
// the others do not take: experts_few.cuh. Many: in tiles, 4-bit formats by experts_many.cuh, others by
// experts_tile.cuh.

#include "experts_few.cuh"
#include "experts_lists.cuh"
#include "experts_many.cuh"
#include "experts_ring.cuh"
#include "experts_tile.cuh"

namespace dsv4 {
namespace {

// Block 0: the list, if there is one; the others: `placed`, which is x with its columns in places.
template <bool kHalves>
__global__ void __launch_bounds__(kMostExperts, 1) prepare_kernel(const Moe m, bf16* placed) {
    static_assert(kMostExperts == 32 * kRowsOfBlock);
    let_next_start();
    wait_for_previous();
    const int64_t row = (blockIdx.x - 1) * (int64_t)kRowsOfBlock + threadIdx.x / 32;
    if (blockIdx.x > 0) {
        if (row < m.n)
            convert_row<true, kHalves>(m.x + row * m.d, placed + row * m.d, m.d, m.undo + row);
    } else if (m.order != nullptr) {
        list_pairs(m);
    }
}

// Blocks of which one fits on a multiprocessor.
int block_count() {
    int count = 1, device = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// The list of pairs, if there is one, and unless null `placed`.
template <bool kHalves> int prepare(const Moe& m, bf16* placed, void* stream) {
    const int64_t blocks = 1 + (placed != nullptr ? ceil_div(m.n, kRowsOfBlock) : 0);
    return launch(prepare_kernel<kHalves>, blocks, kMostExperts, 0, stream, m, placed);
}

template <class Policy> int by_streams(Moe m, void* stream) {
    m.most = few_size<Policy>(m);
    if (m.most == 0) return kUnsupported;
    int status = m.order == nullptr ? cudaSuccess : prepare<false>(m, nullptr, stream);
    if (status == cudaSuccess)
        status = m.ids == nullptr
                     ? few_products<Policy, kMultipliers>(m, block_count(), stream)
                     : few_products<Policy, kMultipliers / 2>(m, block_count(), stream);
    return status == cudaSuccess ? combine(m, stream) : status;
}

template <class Policy, int kMostPairs, int kTiles> int by_wgmma(Moe m, void* stream) {
    m.most = kMostPairs;
    bf16* const placed = (bf16*)m.partial;  // until the second product
    int status = prepare<kInFp16<Policy>>(m, placed, stream);
    if (status == cudaSuccess)
        status = many_pairs<Policy, kMostPairs, kTiles>(m, placed, block_count(), stream);
    return status == cudaSuccess ? combine(m, stream) : status;
}

template <class Policy> int by_tiles(Moe m, void* stream) {
    m.most = kTileTokens;
    int status = m.order == nullptr ? cudaSuccess : prepare<false>(m, nullptr, stream);
    if (status == cudaSuccess) status = launch_tiles<Policy>(m, stream);
    return status == cudaSuccess ? combine(m, stream) : status;
}

// Where one way becomes faster than the other, by the pairs of an expert on average.
template <class Policy> int experts(const Moe& m, void* stream) {
    const int64_t pairs = m.n * m.k;
    const int status = by_rings<Policy>(m, block_count(), stream);
    if (status != kUnsupported) return status;
    if (pairs <= 8 * m.count) return by_streams<Policy>(m, stream);
    if constexpr (!kHasMany<Policy>) return by_tiles<Policy>(m, stream);
    else if (!many_fits(m, 128)) return by_streams<Policy>(m, stream);
    else if (pairs <= 48 * m.count && many_fits(m, 256)) return by_wgmma<Policy, 64, 1>(m, stream);
    else return by_wgmma<Policy, 128, 2>(m, stream);
}

constexpr int kSwigluThreads = 256;

// gate = swiglu(gate, up), eight elements a thread.
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_kernel(bf16* gate, const bf16* up, int64_t count, float limit) {
    let_next_start();
    wait_for_previous();
    const int64_t at = (blockIdx.x * (int64_t)kSwigluThreads + threadIdx.x) * 8;
    if (at >= count) return;
    Vector<bf16> g = load_vector(gate + at);
    const Vector<bf16> u = load_vector(up + at);
#pragma unroll
    for (int i = 0; i < g.kSize; i++)
        g.at[i] = from_float<bf16>(swiglu(to_float(g.at[i]), to_float(u.at[i]), limit));
    store_vector(gate + at, g);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y [n, d] float32 = sum over slots of routing * expert(x), x [n, d] bf16. `table` holds `count` times
// w1, w2, w3 (struct dsv4_weight, in device memory), all of `format`, inner columns in w2. ids and
// routing [n, k], or both null with k = 1. Scratch: hidden [n * k, inner] bf16, partial [n * k, d]
// float32, lists 5 * n * k + 1 int32.
DSV4_EXPORT int dsv4_experts(const void* x, int64_t n, int64_t d, const int32_t* ids,
                             const float* routing, int64_t k, const void* table, int64_t count,
                             int64_t inner, int format, float limit, void* hidden, float* partial,
                             int32_t* lists, float* y, void* stream) {
    const int64_t pairs = n * k;
    if (pairs == 0) return cudaSuccess;
    if (count > kMostExperts || pairs > INT32_MAX / 64) return kUnsupported;
    Moe m = {(const Expert*)table, ids, routing, (const bf16*)x, (bf16*)hidden, partial, y,
             (Work*)(lists + pairs), lists + 5 * pairs, lists, (float*)(lists + 4 * pairs), n, k, d, inner, count, limit, 0};
    if (k == 1) m.partial = y;
    if (ids == nullptr || n == 1) m.order = nullptr;
    return with_policy(format, d, [&](auto policy) {
        using Policy = decltype(policy);
        if (inner % Policy::kChunk) return kUnsupported;
        return experts<Policy>(m, stream);
    });
}

// gate [count] = swiglu(gate, up), bf16, aligned to 16 bytes.
DSV4_EXPORT int dsv4_swiglu(void* gate, const void* up, int64_t count, float limit, void* stream) {
    if (count % 8) return kUnsupported;
    return launch(swiglu_kernel, ceil_div(count, 8 * kSwigluThreads), kSwigluThreads, 0, stream,
                  (bf16*)gate, (const bf16*)up, count, limit);
}
