// Ops experts and shared_expert for few tokens: gate and up with clamped SwiGLU and routing weight,
// then down, each expert's weights streamed once; the sum over a token's experts in slot order.
//
// A pair is one (token, slot): pair p belongs to token p / k. Blocks find the pairs of their expert
// themselves, so nothing is sorted and nothing returns to the host.

#include <assert.h>

#include "stream.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kTokens = 8;

struct Expert {
    dsv4_weight w1, w2, w3;  // gate [i, d], down [d, i], up [i, d]
};

struct Moe {
    const Expert* table;  // [count]
    const int32_t* ids;   // [n * k]; null: every pair goes to expert 0
    const float* routing; // [n * k]; null: 1
    const bf16* x;        // [n, d]
    bf16* hidden;         // [n * k, inner]
    float* partial;       // [n * k, d]
    float* y;             // [n, d]
    int64_t n, k, d, inner, count;
    float limit;

    __device__ int64_t pairs() const { return n * k; }
    __device__ int expert_of(int64_t pair) const { return ids == nullptr ? 0 : ids[pair]; }
};

// The expert of candidate blockIdx.y, or -1 if another block has it. With fewer pairs than experts
// a candidate is a pair, and the first one that chose an expert stands for it.
__device__ int expert_of_block(const Moe& m) {
    int64_t candidate = blockIdx.y;
    if (m.ids == nullptr || m.pairs() > m.count) return candidate;
    int expert = m.ids[candidate];
    assert(expert >= 0 && expert < m.count && "experts: an expert id is out of range");
    bool earlier = false;
    for (int64_t p = threadIdx.x; p < candidate; p += kThreads) earlier |= m.ids[p] == expert;
    return __syncthreads_or(earlier) ? -1 : expert;
}

// The next pairs of `expert`, at most kTokens, from `cursor` on, into chosen[]; each warp for itself.
__device__ int next_pairs(const Moe& m, int expert, int64_t& cursor, int* chosen) {
    int lane = threadIdx.x % 32, count = 0;
    __syncwarp();
    while (cursor < m.pairs() && count < kTokens) {
        int64_t pair = cursor + lane;
        unsigned found = __ballot_sync(~0u, pair < m.pairs() && m.expert_of(pair) == expert);
        int rank = count + __popc(found & ((1u << lane) - 1));
        bool mine = found >> lane & 1;
        if (mine && rank < kTokens) chosen[rank] = pair;
        unsigned left = __ballot_sync(~0u, mine && rank >= kTokens);
        count += __popc(found & ~left);
        cursor += left ? __ffs(left) - 1 : 32;
    }
    __syncwarp();
    return count;
}

// silu(min(gate, limit)) * clamp(up, -limit, limit); NaN stays NaN.
__device__ float swiglu(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1 + expf(-gate)) * up;
}

__device__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

using Sums = float[kWarps][16][kTokens + 1];

// A warp's share of `steps`: [first, last) of part `part` of `parts`.
struct Share {
    int first, last;
    __device__ Share(int steps, int part, int parts) {
        int size = (steps + parts - 1) / parts;
        first = part * size;
        last = first + size < steps ? first + size : steps;
    }
};

template <class Policy> using Rows = Stream<Policy, 1>;

__device__ void keep(Sums& sums, const Lane& lane, const float (&sum)[1][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        sums[threadIdx.x / 32][lane.group + i / 2 * 8][2 * lane.member + i % 2] = sum[0][i];
}

// hidden[pair, row] for 16 rows of the block's expert: half the warps stream gate, half up.
template <class Policy>
__global__ void __launch_bounds__(kThreads, 2) hidden_kernel(const Moe m) {
    constexpr int kParts = kWarps / 2;
    __shared__ Sums sums;
    __shared__ int chosen[kWarps][kTokens];
    let_next_start();
    wait_for_previous();
    int expert = expert_of_block(m);
    if (expert < 0) return;
    int warp = threadIdx.x / 32;
    const dsv4_weight w = warp < kParts ? m.table[expert].w1 : m.table[expert].w3;
    int64_t row0 = blockIdx.x * 16;
    Share share(Rows<Policy>::steps(w.k), warp % kParts, kParts);
    for (int64_t cursor = 0;;) {
        int count = next_pairs(m, expert, cursor, chosen[warp]);
        if (count == 0) return;
        Rows<Policy> stream(w, row0, share.first, share.last);
        int group = stream.lane.group;
        const bf16* x[1] = {group < count ? m.x + chosen[warp][group] / m.k * m.d : nullptr};
        float sum[1][4] = {};
        stream.run(x, share.first, sum);
        keep(sums, stream.lane, sum);
        __syncthreads();
        int row = threadIdx.x % 16, token = threadIdx.x / 16;
        if (token < count && row0 + row < m.inner) {
            float gate = 0, up = 0;
            for (int i = 0; i < kParts; i++) {
                gate += sums[i][row][token];
                up += sums[kParts + i][row][token];
            }
            gate = rounded(gate * Policy::kFactor * m.table[expert].w1.global_scale);
            up = rounded(up * Policy::kFactor * m.table[expert].w3.global_scale);
            int pair = chosen[warp][token];
            float weight = m.routing == nullptr ? 1.0f : m.routing[pair];
            m.hidden[pair * m.inner + row0 + row] =
                __float2bfloat16_rn(swiglu(gate, up, m.limit) * weight);
        }
        __syncthreads();
    }
}

// partial[pair, row] for kWarps / split tiles of 16 rows of the block's expert.
template <class Policy>
__global__ void __launch_bounds__(kThreads, 2) down_kernel(const Moe m, int split) {
    __shared__ Sums sums;
    __shared__ int chosen[kWarps][kTokens];
    let_next_start();
    wait_for_previous();
    int expert = expert_of_block(m);
    if (expert < 0) return;
    int warp = threadIdx.x / 32, tiles = kWarps / split;
    const dsv4_weight w = m.table[expert].w2;
    int64_t block_row = blockIdx.x * (int64_t)tiles * 16, row0 = block_row + warp / split * 16;
    Share share(row0 < m.d ? Rows<Policy>::steps(w.k) : 0, warp % split, split);
    for (int64_t cursor = 0;;) {
        int count = next_pairs(m, expert, cursor, chosen[warp]);
        if (count == 0) return;
        Rows<Policy> stream(w, row0, share.first, share.last);
        int group = stream.lane.group;
        const bf16* x[1] = {group < count ? m.hidden + chosen[warp][group] * m.inner : nullptr};
        float sum[1][4] = {};
        stream.run(x, share.first, sum);
        keep(sums, stream.lane, sum);
        __syncthreads();
        for (int i = threadIdx.x; i < tiles * 16 * count; i += kThreads) {
            int row = i % (tiles * 16), token = i / (tiles * 16);
            if (block_row + row >= m.d) continue;
            float total = 0;
            for (int s = 0; s < split; s++) total += sums[row / 16 * split + s][row % 16][token];
            m.partial[chosen[warp][token] * m.d + block_row + row] =
                total * Policy::kFactor * w.global_scale;
        }
        __syncthreads();
    }
}

// y[token, row] for 16 rows of one token: the warps share the columns of all its experts.
template <class Policy>
__global__ void __launch_bounds__(kThreads, 2) down_token_kernel(const Moe m) {
    __shared__ float sums[kWarps][16];
    let_next_start();
    wait_for_previous();
    int64_t row0 = blockIdx.x * 16, token = blockIdx.y;
    int warp = threadIdx.x / 32;
    int steps = Rows<Policy>::steps(m.inner);
    Share share(steps * (int)m.k, warp, kWarps);
    float total[2] = {};  // of rows group and group + 8, activation column 0
    Lane lane;
    for (int at = share.first; at < share.last;) {
        int64_t pair = token * m.k + at / steps;
        int first = at % steps;
        int last = share.last - at < steps - first ? first + share.last - at : steps;
        int expert = m.expert_of(pair);
        assert(expert >= 0 && expert < m.count && "experts: an expert id is out of range");
        const dsv4_weight w = m.table[expert].w2;
        Rows<Policy> stream(w, row0, first, last);
        const bf16* x[1] = {lane.group == 0 ? m.hidden + pair * m.inner : nullptr};
        float sum[1][4] = {};
        stream.run(x, first, sum);
        total[0] += sum[0][0] * Policy::kFactor * w.global_scale;
        total[1] += sum[0][2] * Policy::kFactor * w.global_scale;
        at += last - first;
    }
    if (lane.member == 0) {
        sums[warp][lane.group] = total[0];
        sums[warp][lane.group + 8] = total[1];
    }
    __syncthreads();
    if (threadIdx.x < 16 && row0 + threadIdx.x < m.d) {
        float sum = 0;
        for (int i = 0; i < kWarps; i++) sum += sums[i][threadIdx.x];
        m.y[token * m.d + row0 + threadIdx.x] = sum;
    }
}

// y[token] = the sum of its pairs' partial results, in slot order.
__global__ void __launch_bounds__(kThreads) combine_kernel(const Moe m) {
    let_next_start();
    wait_for_previous();
    int64_t column = blockIdx.x * (int64_t)kThreads + threadIdx.x, token = blockIdx.y;
    if (column >= m.d) return;
    float total = 0;
    for (int64_t s = 0; s < m.k; s++) total += m.partial[(token * m.k + s) * m.d + column];
    m.y[token * m.d + column] = total;
}

constexpr int kTokensOneByOne = 2;  // up to here each token streams its own experts in the second kernel

template <class Policy> int experts(Moe m, void* stream) {
    int64_t pairs = m.n * m.k;
    int64_t candidates = m.ids == nullptr ? 1 : pairs < m.count ? pairs : m.count;
    int status = launch(hidden_kernel<Policy>, dim3(ceil_div(m.inner, 16), candidates), kThreads, 0,
                        stream, m);
    if (status != cudaSuccess) return status;
    if (m.n <= kTokensOneByOne && m.k > 1)
        return launch(down_token_kernel<Policy>, dim3(ceil_div(m.d, 16), m.n), kThreads, 0, stream,
                      m);
    int steps = Rows<Policy>::steps(m.inner), split = 1;
    while (split < kWarps && (steps > 8 * split || m.d * split * candidates < 16 * 2048)) split *= 2;
    if (m.k == 1) m.partial = m.y;
    status = launch(down_kernel<Policy>, dim3(ceil_div(m.d, 16 * kWarps / split), candidates),
                    kThreads, 0, stream, m, split);
    if (status != cudaSuccess || m.k == 1) return status;
    return launch(combine_kernel, dim3(ceil_div(m.d, kThreads), m.n), kThreads, 0, stream, m);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y [n, d] float32 = sum over slots of routing * expert(x), x [n, d] bf16. `table` holds `count` times
// w1, w2, w3 (struct dsv4_weight, in device memory), all of `format`, inner columns in w2. ids and
// routing [n, k], or both null with k = 1. hidden [n * k, inner] bf16 and partial [n * k, d] float32
// are scratch.
DSV4_EXPORT int dsv4_experts(const void* x, int64_t n, int64_t d, const int32_t* ids,
                             const float* routing, int64_t k, const void* table, int64_t count,
                             int64_t inner, int format, float limit, void* hidden, float* partial,
                             float* y, void* stream) {
    Moe m = {(const Expert*)table, ids, routing, (const bf16*)x, (bf16*)hidden, partial, y,
             n, k, d, inner, count, limit};
    if (n * k == 0) return cudaSuccess;
    return with_policy(format, d, [&](auto policy) {
        using Policy = decltype(policy);
        if (inner % Policy::kChunk) return kUnsupported;
        return experts<Policy>(m, stream);
    });
}
