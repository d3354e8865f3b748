// Ops linear and grouped_linear of a few to 64 bf16 activation rows, on wgmma (skinny.cuh).

#include "skinny.cuh"

using namespace dsv4;

// x [m, groups * k] bf16, y [m, n] in y_dtype (float32 or bfloat16), both contiguous. `parts` blocks share the
// columns of 256 weight rows, which must be of one group.
// workspace: 1024 bytes; 2 * groups * rows * columns, with m rounded up to 16, 32 or a multiple of 64 and k to
// 128 bytes of weights; and with more than one part 4 * parts * m * n, n rounded up to a multiple of 256.
DSV4_EXPORT int dsv4_skinny(const void* x, int64_t m, const dsv4_weight* w, int64_t groups, void* y,
                            int y_dtype, int parts, void* workspace, void* stream) {
    if (m == 0 || w->n == 0) return cudaSuccess;
    const Product p = {*w, x, y, m, groups * w->k, w->n, w->n / groups};
    if ((groups > 1 && p.per_group % kSkinnyRows) || (uintptr_t)x % 16) return kUnsupported;
    return with_policy(w->format, w->k, [&](auto policy) {
        using Policy = decltype(policy);
        if (w->k / Policy::kChunk * kScaleWords<Policy> / 2 % 4) return kUnsupported;  // rows of scales
        auto run = [&](auto tokens) {
            return launch_skinny<Policy, tokens.value>(p, groups, parts, y_dtype == DSV4_BF16, workspace, stream);
        };
        if (m <= 16) return run(std::integral_constant<int, 16>{});
        if (m <= 32) return run(std::integral_constant<int, 32>{});
        return run(std::integral_constant<int, 64>{});
    });
}
