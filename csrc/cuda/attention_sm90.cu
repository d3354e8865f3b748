// Op attention: softmax over window rows and selected entries with a sink, K = V, shared by all heads.

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {
namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// A pool of keys, and for each token the rows of it that it attends to, -1 for none.
struct Pool {
    const void* keys;
    const int* index;  // [n, width]
    int64_t rows;      // of the pool
    int width;
};
struct Keys {
    Pool window, entries;
    __device__ Pool pick(bool second) const { return second ? entries : window; }
};

// What a row of logits amounts to: the largest, and the sum of 2^(logit - largest), in log2 units.
struct Softmax {
    float most, sum;
};
// 2^(x - most) where both may be -inf.
__device__ inline float weight_of(float x, float most) {
    return exp2f(x - (most == -INFINITY ? 0 : most));
}
__device__ inline Softmax with_sink(Softmax s, float sink) {
    float most = fmaxf(s.most, sink * kLog2e);
    return {most, s.sum * weight_of(s.most, most) + weight_of(sink * kLog2e, most)};
}
__device__ inline float lse_of(Softmax s) {
    return (s.most == -INFINITY ? 0 : s.most) * kLn2 + logf(s.sum);
}

// ---------------------------------------------------------------- any dtype and head width

constexpr int kWarps = 4, kMostWidth = 512;

// One block a token and head; each warp takes every fourth key, lane i elements i, i + 32, ...
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    attention_any_kernel(const T* q, Keys keys, const float* sink, float scale, int64_t heads,
                         int dim, T* o, float* lse) {
    constexpr int kElements = kMostWidth / 32;
    __shared__ float value[kWarps][kMostWidth];
    __shared__ Softmax part[kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x, token = row / heads;
    let_next_start();
    wait_for_previous();
    float query[kElements], sum[kElements] = {};
    for (int i = 0; i < kElements; i++) {
        int at = lane + 32 * i;
        query[i] = at < dim ? to_float(q[row * dim + at]) * (scale * kLog2e) : 0;
    }
    Softmax s = {-INFINITY, 0};
    for (int which = 0; which < 2; which++) {
        Pool pool = keys.pick(which);
        for (int k = warp; k < pool.width; k += kWarps) {
            int64_t index = pool.index[token * pool.width + k];
            if (index < 0) continue;
            if (index >= pool.rows) __trap();
            const T* key = (const T*)pool.keys + index * dim;
            float element[kElements], dot = 0;
#pragma unroll
            for (int i = 0; i < kElements; i++) {
                element[i] = lane + 32 * i < dim ? to_float(key[lane + 32 * i]) : 0;
                dot += query[i] * element[i];
            }
            dot = warp_sum(dot);
            float most = fmaxf(s.most, dot), shrink = weight_of(s.most, most);
            float p = weight_of(dot, most);
            s = {most, s.sum * shrink + p};
#pragma unroll
            for (int i = 0; i < kElements; i++) sum[i] = sum[i] * shrink + p * element[i];
        }
    }
    if (lane == 0) part[warp] = s;
    for (int i = 0; i < kElements; i++) value[warp][lane + 32 * i] = sum[i];
    __syncthreads();
    Softmax all = part[0];
    for (int w = 1; w < kWarps; w++) all.most = fmaxf(all.most, part[w].most);
    all.sum = 0;
    for (int w = 0; w < kWarps; w++) all.sum += part[w].sum * weight_of(part[w].most, all.most);
    Softmax total = with_sink(all, sink[row % heads]);
    for (int i = threadIdx.x; i < dim; i += 32 * kWarps) {
        float result = 0;
        for (int w = 0; w < kWarps; w++)
            result += value[w][i] * weight_of(part[w].most, total.most);
        o[row * dim + i] = from_float<T>(result / total.sum);
    }
    if (threadIdx.x == 0) lse[row] = lse_of(total);
}

// ---------------------------------------------------------------- bfloat16, 512 wide: tensor cores
//
// A CTA takes one token, 64 of its heads and a share of its keys, 64 at a time. One warpgroup gathers
// keys into a two-stage ring in the layout that wgmma reads, both as K (contracted over the width)
// and as V (contracted over keys). Two warpgroups each compute the weights of 32 of the keys, exchange
// them through shared memory, and each keeps one half of the output's width in registers. With more
// than one share the unnormalised sums go to memory, and a second kernel combines them.

constexpr int kDim = 512, kHeads = 64, kBlock = 64;  // head width; heads and keys of a tile
constexpr int kStages = 2, kConsumers = 256, kProducers = 128;
constexpr int kChunk = 64 * 128;              // bytes: 64 rows of 64 elements, 128-byte swizzle
constexpr int kTileBytes = kBlock * kDim * 2;  // 8 chunks
constexpr int kHalf = kDim / 2, kOutPitch = 2 * kHalf + 16;  // bytes; 16 spread the banks

struct Shared {
    alignas(1024) char q[kTileBytes];  // later the output, on its way to memory
    alignas(1024) char keys[kStages][kTileBytes];
    alignas(1024) char weights[kHeads * kBlock * 2];  // 64 rows of 128 bytes, swizzled
    float rows[2][kHeads];                            // of each warpgroup: largest logit, sum
    uint64_t exists[kStages];                         // a bit a key
    uint64_t full[kStages], empty[kStages];
};

struct Problem {
    const bf16* q;
    Keys keys;
    const float* sink;
    float scale;
    int64_t heads;
    int shares, per_share;  // of a token's key blocks, and blocks in one
    bf16* o;
    float* lse;
    float* part;         // [n, heads, shares, 512] unnormalised
    Softmax* part_sums;  // [n, heads, shares]
};

__host__ __device__ inline int blocks_of(int64_t keys) { return (keys + kBlock - 1) / kBlock; }

// Which token, heads and blocks of keys this CTA has.
struct Work {
    int64_t token;
    int head, heads, share, first, last;

    __device__ Work(const Problem& p) {
        int groups = (p.heads + kHeads - 1) / kHeads;
        int64_t at = blockIdx.x;
        share = at % p.shares;
        at /= p.shares;
        head = at % groups * kHeads;
        token = at / groups;
        heads = p.heads - head < kHeads ? p.heads - head : kHeads;
        int blocks = blocks_of(p.keys.window.width) + blocks_of(p.keys.entries.width);
        first = share * p.per_share;
        last = first + p.per_share < blocks ? first + p.per_share : blocks;
    }
};

// ---- gathering

// Where 16-byte unit `unit` (0 to 63) of row `row` lies in a tile.
__device__ inline uint32_t unit_offset(int row, int unit) {
    return unit / 8 * kChunk + row * 128 + ((unit % 8 ^ row % 8) << 4);
}

// The pool row of key `row` of a block of keys: which pool, and the index, -1 for none.
struct Row {
    const bf16* pool;
    int index;
};
__device__ inline Row row_of(const Problem& p, int64_t token, int block, int row) {
    int blocks = blocks_of(p.keys.window.width);
    Pool pool = p.keys.pick(block >= blocks);
    int column = (block - (block >= blocks ? blocks : 0)) * kBlock + row;
    int index = column < pool.width ? pool.index[token * pool.width + column] : -1;
    if (index >= pool.rows) __trap();
    return {(const bf16*)pool.keys, index};
}

// The producers: q once, then every block of keys into the stage that is free; rows that do not exist
// are zeros, so that 0 * row is 0.
__device__ void gather(const Problem& p, const Work& work, Shared& s) {
    const int thread = threadIdx.x - kConsumers, warp = thread / 32, lane = thread % 32;
    const bf16* q = p.q + (work.token * p.heads + work.head) * kDim;
    for (int i = thread; i < kHeads * kDim / 8; i += kProducers) {
        bool exists = i / 64 < work.heads;
        copy16(shared_address(s.q) + unit_offset(i / 64, i % 64), q + (exists ? i * 8 : 0), exists);
    }
    Row low = row_of(p, work.token, work.first, lane);
    Row high = row_of(p, work.token, work.first, lane + 32);
    for (int block = work.first; block < work.last; block++) {
        int i = block - work.first, stage = i % kStages;
        const bf16* pool = low.pool;
        int mine = warp < 2 ? low.index : high.index;  // lane l has row 32 (warp / 2) + l
        uint64_t exists = __ballot_sync(~0u, low.index >= 0) |
                          (uint64_t)__ballot_sync(~0u, high.index >= 0) << 32;
        if (block + 1 < work.last) {
            low = row_of(p, work.token, block + 1, lane);
            high = row_of(p, work.token, block + 1, lane + 32);
        }
        if (i >= kStages) barrier_wait(&s.empty[stage], (i / kStages - 1) % 2);
        if (thread == 0) {
            s.exists[stage] = exists;
            barrier_arrive(&s.full[stage]);
        }
        uint32_t base = shared_address(s.keys[stage]);
        if (exists) {
#pragma unroll 4
            for (int r = 0; r < 16; r++) {
                int row = 16 * warp + r, index = __shfl_sync(~0u, mine, row % 32);
                const bf16* from = pool + (int64_t)max(index, 0) * kDim + lane * 8;
                copy16(base + unit_offset(row, lane), from, index >= 0);
                copy16(base + unit_offset(row, lane + 32), from + 256, index >= 0);
            }
        }
        copy_arrive(&s.full[stage]);
    }
    copy_commit();
    copy_wait<0>();
}

// ---- computing

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
        fewer_registers<56>();
        gather(p, work, s);
    } else {
        more_registers<224>();
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

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// o [n, heads, dim] and lse [n, heads] of q [n, heads, dim] over rows of window [window_rows, dim]
// and entries [entry_rows, dim]; indices [n, width], -1 for none. Where shares > 1, that many CTAs
// share a token's blocks of 64 keys, none without any, by way of part [n, heads, shares, dim] and
// part_sums [n, heads, shares, 2].
DSV4_EXPORT int dsv4_attention(const void* q, const void* window, int64_t window_rows,
                               const int* window_index, int64_t window_width, const void* entries,
                               int64_t entry_rows, const int* entry_index, int64_t entry_width,
                               const float* sink, float scale, int64_t n, int64_t heads,
                               int64_t dim, int64_t shares, float* part, float* part_sums, void* o,
                               float* lse, int dtype, void* stream) {
    Keys keys = {{window, window_index, window_rows, (int)window_width},
                 {entries, entry_index, entry_rows, (int)entry_width}};
    int64_t blocks = blocks_of(window_width) + blocks_of(entry_width);
    if (shares > kMostShares) return kUnsupported;
    if (dtype == DSV4_BF16 && dim == kDim && scale > 0 && blocks > 0) {
        Problem p = {(const bf16*)q, keys, sink, scale, heads, (int)shares,
                     (int)ceil_div(blocks, shares), (bf16*)o, lse, part, (Softmax*)part_sums};
        size_t shared = sizeof(Shared) + 1024;
        int status = allow_shared(attention_kernel, shared);
        if (status) return status;
        status = launch(attention_kernel, dim3(n * ceil_div(heads, kHeads) * shares),
                        kConsumers + kProducers, shared, stream, p);
        if (status || shares == 1) return status;
        return launch(combine_kernel, dim3(n * heads), kDim / 4, 0, stream, (const float*)part,
                      (const Softmax*)part_sums, sink, heads, (int)shares, (bf16*)o, lse);
    }
    if (dim > kMostWidth) return kUnsupported;
    return with_dtype(dtype, [&](auto tag) {
        using T = type_of<decltype(tag)>;
        return launch(attention_any_kernel<T>, dim3(n * heads), 32 * kWarps, 0, stream,
                      (const T*)q, keys, sink, scale, heads, (int)dim, (T*)o, lse);
    });
}
