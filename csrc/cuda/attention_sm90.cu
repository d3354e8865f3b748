// Op attention: softmax over window rows and selected entries with a sink, K = V, shared by all heads.

#include "attention_any.cuh"
#include "attention_gather.cuh"

namespace dsv4 {
namespace {

// To 2 units in the last place.
__device__ inline float exp2_approximate(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// logit = q k^T for the 64 heads and this warpgroup's 32 keys of a stage.
__device__ inline void multiply_keys(float (&logit)[16], const Shared& s, int stage, int half) {
    uint64_t a = matrix_descriptor(shared_address(s.q), 16, 1024);
    uint64_t b = matrix_descriptor(shared_address(s.keys[stage]) + half * 32 * 128, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; k++) {
        uint64_t step = (k / 4 * kChunk + k % 4 * 32) >> 4;
        wgmma_64x32(logit, a + step, b + step, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
}

// sum += p v for the 64 keys of a stage and one half of the width.
__device__ inline void multiply_values(float (&sum)[128], const Shared& s, int stage, int half) {
    uint32_t from = shared_address(s.keys[stage]) + half * (kHalf / 64) * kChunk;
    uint64_t a = matrix_descriptor(shared_address(s.weights), 16, 1024);
    uint64_t b = matrix_descriptor(from, kChunk, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlock / 16; k++)
        wgmma_64x256(sum, a + (k * 32 >> 4), b + (k * 16 * 128 >> 4));
    wgmma_commit();
    wgmma_wait<0>();
}

// What this thread knows of its rows of heads, `row` and row + 8; sums over its own columns.
struct Rows {
    const int half = threadIdx.x / 128, t = threadIdx.x % 4;
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    Softmax of[2] = {{-INFINITY, 0}, {-INFINITY, 0}};

    // Both warpgroups: value[0] and value[1] of the two rows -> the other warpgroup's.
    __device__ float2 exchange(Shared& s, float low, float high) const {
        if (t == 0) {
            s.rows[half][row] = low;
            s.rows[half][row + 8] = high;
        }
        named_barrier(1, kConsumers);
        return {s.rows[1 - half][row], s.rows[1 - half][row + 8]};
    }

    // Logits of this warpgroup's 32 keys -> weights in shared memory, bfloat16; `exists` says which
    // keys do. Returns the factors that the sums so far are to be scaled by.
    __device__ float2 weigh(Shared& s, float (&logit)[16], float scale, uint32_t exists) {
        if (~exists)
#pragma unroll
            for (int i = 0; i < 16; i++)
                if (~exists >> (i / 4 * 8 + 2 * t + i % 2) & 1) logit[i] = -INFINITY;
        float most[2] = {-INFINITY, -INFINITY}, shrink[2];
#pragma unroll
        for (int i = 0; i < 16; i++) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], logit[i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 1));
            most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 2));
        }
        float2 others = exchange(s, most[0], most[1]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            most[i] = fmaxf(fmaxf(most[i], i ? others.y : others.x) * scale, of[i].most);
            shrink[i] = weight_of(of[i].most, most[i]);
            of[i] = {most[i], of[i].sum * shrink[i]};
            if (most[i] == -INFINITY) most[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
            logit[i] = exp2_approximate(fmaf(logit[i], scale, -most[i / 2 % 2]));
            of[i / 2 % 2].sum += logit[i];
        }
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            int at = row + i / 2 % 2 * 8, unit = 4 * half + i / 4;
            *(uint32_t*)(s.weights + at * 128 + ((unit ^ at % 8) << 4) + 4 * t) =
                pack_bf16(logit[i], logit[i + 1]);
        }
        return {shrink[0], shrink[1]};
    }

    // Afterwards the sums are those of whole rows.
    __device__ void finish(Shared& s) {
        for (int i = 0; i < 2; i++) {
            of[i].sum += __shfl_xor_sync(~0u, of[i].sum, 1);
            of[i].sum += __shfl_xor_sync(~0u, of[i].sum, 2);
        }
        named_barrier(1, kConsumers);  // the last exchange is over
        float2 others = exchange(s, of[0].sum, of[1].sum);
        of[0].sum += others.x;
        of[1].sum += others.y;
    }
};

// One share: normalised output through shared memory, and lse.
__device__ void write_output(const Problem& p, const Work& work, Shared& s, float (&sum)[128],
                             const Rows& rows) {
    const int thread = threadIdx.x % 128, half = rows.half;
    char* staging = s.q + half * kHeads * kOutPitch;  // both warpgroups have read q and keys
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int head = rows.row + 8 * i;
        bool exists = head < work.heads;
        Softmax total = with_sink(rows.of[i], exists ? p.sink[work.head + head] : 0);
        float factor = weight_of(rows.of[i].most, total.most) / total.sum;
        if (exists && half == 0 && rows.t == 0)
            p.lse[work.token * p.heads + work.head + head] = lse_of(total);
#pragma unroll
        for (int j = 0; j < 32; j++)
            *(uint32_t*)(staging + head * kOutPitch + 16 * j + 4 * rows.t) =
                pack_bf16(sum[4 * j + 2 * i] * factor, sum[4 * j + 2 * i + 1] * factor);
    }
    fence_async_proxy();
    named_barrier(2 + half, 128);
    if (thread < work.heads) {
        int64_t head = work.token * p.heads + work.head + thread;
        bulk_store(p.o + head * kDim + half * kHalf, staging + thread * kOutPitch, 2 * kHalf);
        bulk_commit_wait();
    }
}

// Several shares: what the combining kernel needs.
__device__ void write_part(const Problem& p, const Work& work, float (&sum)[128], const Rows& rows) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int head = rows.row + 8 * i;
        if (head >= work.heads) continue;
        int64_t at = (work.token * p.heads + work.head + head) * p.shares + work.share;
        if (rows.half == 0 && rows.t == 0) p.part_sums[at] = rows.of[i];
        float* to = p.part + at * kDim + rows.half * kHalf + 2 * rows.t;
#pragma unroll
        for (int j = 0; j < 32; j++)
            *(float2*)(to + 8 * j) = {sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]};
    }
}

// Two warpgroups, always at the same block of keys.
__device__ void compute(const Problem& p, const Work& work, Shared& s) {
    float sum[128];
#pragma unroll
    for (int i = 0; i < 128; i++) sum[i] = 0;
    Rows rows;
    for (int i = 0; i < work.last - work.first; i++) {
        int stage = i % kStages;
        barrier_wait(&s.full[stage], i / kStages % 2);
        fence_async_proxy();
        uint64_t exists = s.exists[stage];
        if (exists) {
            float logit[16];
            multiply_keys(logit, s, stage, rows.half);
            float2 shrink = rows.weigh(s, logit, p.scale * kLog2e, exists >> 32 * rows.half);
            fence_async_proxy();
            named_barrier(1, kConsumers);  // all weights are there
            if (__any_sync(~0u, shrink.x != 1 || shrink.y != 1))
#pragma unroll
                for (int k = 0; k < 128; k++) sum[k] *= k / 2 % 2 ? shrink.y : shrink.x;
            multiply_values(sum, s, stage, rows.half);
        }
        barrier_arrive(&s.empty[stage]);
    }
    rows.finish(s);
    if (p.shares == 1) write_output(p, work, s, sum, rows);
    else write_part(p, work, sum, rows);
}

template <bool kPacked>
__global__ void __launch_bounds__(kConsumers + kProducers, 1) attention_kernel(Problem p) {
    extern __shared__ char memory[];
    Shared& s = *reinterpret_cast<Shared*>((shared_address(memory) + 1023) / 1024 * 1024 -
                                           shared_address(memory) + memory);
    const Work work(p);
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(&s.full[i], kProducers + 1);  // their copies, and the bits of what exists
            barrier_init(&s.empty[i], kConsumers);
        }
        fence_barrier_init();
    }
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x >= kConsumers) {
        fewer_registers<kPacked ? 72 : 56>();
        if constexpr (kPacked) gather_packed(p, work, s);
        else gather(p, work, s);
    } else {
        more_registers<kPacked ? 216 : 224>();
        compute(p, work, s);
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

int launch_attention(void (*kernel)(Problem), const Problem& p, int64_t blocks, void* stream) {
    size_t shared = sizeof(Shared) + 1024;  // to align it
    int status = allow_shared(kernel, shared);
    return status ? status
                  : launch(kernel, dim3(blocks), kConsumers + kProducers, shared, stream, p);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// o [n, heads, dim] and lse [n, heads] of q [n, heads, dim] over rows of window [window_rows, dim]
// and entries [entry_rows, dim]; indices [n, width], -1 for none. Where plain > 0, the rows of both
// pools are packed entries with `plain` dimensions in codes. Where shares > 1, that many CTAs share a
// token's blocks of 64 keys, none without any, by way of part [n, heads, shares, dim] and part_sums
// [n, heads, shares, 2].
DSV4_EXPORT int dsv4_attention(const void* q, const void* window, int64_t window_rows,
                               const int* window_index, int64_t window_width, const void* entries,
                               int64_t entry_rows, const int* entry_index, int64_t entry_width,
                               const float* sink, float scale, int64_t n, int64_t heads,
                               int64_t dim, int64_t plain, int64_t shares, float* part,
                               float* part_sums, void* o, float* lse, int dtype, void* stream) {
    Keys keys = {{window, window_index, window_rows, (int)window_width},
                 {entries, entry_index, entry_rows, (int)entry_width}};
    int64_t blocks = blocks_of(window_width) + blocks_of(entry_width);
    if (shares > kMostShares) return kUnsupported;
    if (dtype == DSV4_BF16 && dim == kDim && (plain == 0 || plain == kPlain) && scale > 0 &&
        blocks > 0) {
        Problem p = {(const bf16*)q, keys, sink, scale, heads, (int)shares,
                     (int)ceil_div(blocks, shares), (bf16*)o, lse, part, (Softmax*)part_sums};
        int status = launch_attention(plain ? attention_kernel<true> : attention_kernel<false>, p,
                                      n * ceil_div(heads, kHeads) * shares, stream);
        if (status || shares == 1) return status;
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
