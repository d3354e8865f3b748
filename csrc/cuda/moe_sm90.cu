// Routed and shared experts of few tokens and their sum: ops experts, shared_expert and moe_sum in the two
// launches of the products. More than one token have the list of pairs before and the sum over slots after.

#include "experts_launch.cuh"

namespace dsv4 {
namespace {

__global__ void __launch_bounds__(kMostExperts) list_kernel(const Moe m) {
    let_next_start();
    wait_for_previous();
    list_pairs(m);
}

template <class Policy, class Shared>
int moe(Moe m, Moe shared, void* stream) {
    m.most = few_size<Policy>(m);
    shared.most = few_size<Shared>(shared);
    if (m.most == 0 || shared.most == 0 || m.n > kFewPairs) return kUnsupported;
    if (m.n == 1) m.order = nullptr;
    const int status =
        m.order == nullptr ? cudaSuccess : launch(list_kernel, 1, kMostExperts, 0, stream, m);
    return status == cudaSuccess ? few_pairs<Policy, Shared>(m, shared, stream) : status;
}

// Calls body(routed policy, shared policy) for a pair of formats that occurs; else kUnsupported.
template <class Body> int with_policies(int routed, int shared, Body body) {
    const auto beside = [&](auto policy) {
        if (shared == DSV4_FP8_E8M0) return body(policy, Fp8<uint8_t>{});
        if (shared == DSV4_FP8_F32) return body(policy, Fp8<float>{});
        return kUnsupported;
    };
    if (routed == DSV4_NVFP4) return beside(Nvfp4{});
    if (routed == DSV4_MXFP4) return beside(Mxfp4{});
    return kUnsupported;
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// out [n, d] of out_dtype = experts(x) + shared expert(x), both summed in float32 as by dsv4_experts.
// `table` and `shared_table`: as there, of `count` experts and of one. Scratch: hidden [n * k, inner] and
// shared_hidden [n, shared_inner] bf16, partial [n * k, d] float32, lists 4 * n * k + 1 int32. shared_y and,
// unless null, routed_y [n, d] float32: what is summed.
DSV4_EXPORT int dsv4_moe(const void* x, int64_t n, int64_t d, const int32_t* ids,
                         const float* routing, int64_t k, const void* table, int64_t count,
                         int64_t inner, int format, const void* shared_table, int64_t shared_inner,
                         int shared_format, float limit, void* hidden, void* shared_hidden,
                         float* partial, float* routed_y, float* shared_y, int32_t* lists, void* out,
                         int out_dtype, void* stream) {
    const int64_t pairs = n * k;
    if (pairs == 0) return cudaSuccess;
    if (count > kMostExperts) return kUnsupported;
    Moe m = {(const Expert*)table, ids, routing, (const bf16*)x, (bf16*)hidden, partial, routed_y,
             (Work*)(lists + pairs), lists + 4 * pairs, lists, n, k, d, inner, count, limit, 0,
             shared_y, out, out_dtype};
    Moe shared = {(const Expert*)shared_table, nullptr, nullptr, (const bf16*)x,
                  (bf16*)shared_hidden, shared_y, shared_y, nullptr, nullptr, nullptr, n, 1, d,
                  shared_inner, 1, limit, 0, nullptr, nullptr, 0};
    return with_policies(format, shared_format, [&](auto routed, auto beside) {
        using Policy = decltype(routed);
        using Shared = decltype(beside);
        if (d % Policy::kChunk || inner % Policy::kChunk || d % Shared::kChunk ||
            shared_inner % Shared::kChunk)
            return kUnsupported;
        return moe<Policy, Shared>(m, shared, stream);
    });
}
