// Ops experts and shared_expert: gate and up with clamped SwiGLU and routing weight, then down, then
// the sum over a token's experts in slot order. Few pairs an expert: the weights are streamed
// (experts_few.cuh). Many: in tiles, 4-bit formats by experts_many.cuh, others by experts_tile.cuh.

#include "experts_launch.cuh"
#include "experts_many.cuh"
#include "experts_tile.cuh"

namespace dsv4 {
namespace {

// Block 0: the list, if there is one; the others: `placed`, x with its columns in places.
__global__ void __launch_bounds__(kMostExperts) prepare_kernel(const Moe m, bf16* placed) {
    let_next_start();
    wait_for_previous();
    if (blockIdx.x > 0) place_columns(m.x, placed, blockIdx.x - 1, m.n * m.d / 8);
    else if (m.order != nullptr) list_pairs(m);
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
    if (m.most <= kFewPairs) return few_pairs<Policy, Nothing>(m, m, stream);
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
             (Work*)(lists + pairs), lists + 4 * pairs, lists, n, k, d, inner, count, limit, 0,
             nullptr, nullptr, 0};
    return with_policy(format, d, [&](auto policy) {
        using Policy = decltype(policy);
        if (inner % Policy::kChunk) return kUnsupported;
        return experts<Policy>(m, stream);
    });
}
