// Ops experts and shared_expert: gate and up with clamped SwiGLU and routing weight, then down, then
// the sum over a token's experts in slot order. Few tokens: each expert's weights are streamed once
// (stream.cuh). Many: in tiles of 64 pairs of one expert (tile.cuh).
//
// A pair is one (token, slot): pair p belongs to token p / k. With several tokens a first kernel lists
// the pairs of each expert, so nothing returns to the host.

#include <assert.h>

#include "gemv.cuh"
#include "tile.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kMostExperts = 1024;

struct Expert {
    dsv4_weight w1, w2, w3;  // gate [i, d], down [d, i], up [i, d]
};

// Pairs of one expert: order[first ... first + count).
struct Work {
    int expert, first, count;
};

struct Moe {
    const Expert* table;   // [count]
    const int32_t* ids;    // [n * k]; null: every pair goes to expert 0
    const float* routing;  // [n * k]; null: 1
    const bf16* x;         // [n, d]
    bf16* hidden;          // [n * k, inner]
    float* partial;        // [n * k, d]
    float* y;              // [n, d]
    Work* work;            // the unused ones at the end have count 0
    int32_t* order;        // [n * k] pairs by expert; null: one token, whose pairs are listed by ids
    int64_t n, k, d, inner, count;
    float limit;

    __device__ int expert_of(int64_t pair) const {
        int expert = ids == nullptr ? 0 : ids[pair];
        assert(expert >= 0 && expert < count && "experts: an expert id is out of range");
        return expert;
    }
    __device__ Work work_of(int block) const {
        if (ids == nullptr) return {0, 0, (int)n};
        return order == nullptr ? Work{expert_of(block), block, 1} : work[block];
    }
    __device__ int pair(int i) const { return order == nullptr ? i : order[i]; }
};

// Lists the pairs of each expert, in pieces of at most `most`, and fills up to `candidates` pieces. One
// block; the order of an expert's pairs does not matter to any result.
__global__ void __launch_bounds__(kMostExperts) list_kernel(const Moe m, int candidates, int most) {
    __shared__ int counts[kMostExperts], pairs_to[kMostExperts], pieces_to[kMostExperts];
    let_next_start();
    wait_for_previous();
    int e = threadIdx.x, pairs = m.n * m.k;
    counts[e] = 0;
    __syncthreads();
    for (int p = e; p < pairs; p += kMostExperts) atomicAdd(&counts[m.expert_of(p)], 1);
    __syncthreads();
    int mine = counts[e], pieces = (mine + most - 1) / most;
    pairs_to[e] = mine;
    pieces_to[e] = pieces;
    for (int step = 1; step < kMostExperts; step *= 2) {  // sums of all up to and with e
        __syncthreads();
        int a = e >= step ? pairs_to[e - step] : 0, b = e >= step ? pieces_to[e - step] : 0;
        __syncthreads();
        pairs_to[e] += a;
        pieces_to[e] += b;
    }
    __syncthreads();
    int first = pairs_to[e] - mine;
    for (int i = 0; i < pieces; i++)
        m.work[pieces_to[e] - pieces + i] = {e, first + i * most, min(most, mine - i * most)};
    for (int c = pieces_to[kMostExperts - 1] + e; c < candidates; c += kMostExperts)
        m.work[c] = {0, 0, 0};
    counts[e] = first;
    __syncthreads();
    for (int p = e; p < pairs; p += kMostExperts) m.order[atomicAdd(&counts[m.expert_of(p)], 1)] = p;
}

// silu(min(gate, limit)) * clamp(up, -limit, limit); NaN stays NaN.
__device__ float swiglu(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1 + expf(-gate)) * up;
}

__device__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// A warp's share of `steps`: [first, last) of part `part` of `parts`.
struct Share {
    int first, last;
    __device__ Share(int steps, int part, int parts) {
        int size = (steps + parts - 1) / parts;
        first = part * size;
        last = first + size < steps ? first + size : steps;
    }
};

// Two ways for a block to multiply tiles of 16 weight rows with up to kTokens activation rows
// row_of(0), ... (null: zeros). The warp's sums end up in sums[warp][row][token], after a barrier.

template <class Policy_> struct ManyColumns {
    using Policy = Policy_;
    static constexpr int kTokens = 8;
    static constexpr float kFactor = Policy::kFactor;
    using Sums = float[kWarps][16][kTokens + 1];

    static size_t shared(int64_t) { return 0; }
    template <class RowOf>
    __device__ static void multiply(void*, Sums& sums, const dsv4_weight& w, int64_t row0,
                                    Share share, RowOf row_of) {
        Stream<Policy, 1> stream(w, row0, share.first, share.last);
        const Lane& lane = stream.lane;
        const bf16* x[1] = {row_of(lane.group)};
        float sum[1][4] = {};
        stream.run(x, share.first, sum);
#pragma unroll
        for (int i = 0; i < 4; i++)
            sums[threadIdx.x / 32][lane.group + i / 2 * 8][2 * lane.member + i % 2] = sum[0][i];
        __syncthreads();
    }
};

template <class Policy_, int T> struct FewColumns {
    using Policy = Policy_;
    static constexpr int kTokens = T;
    static constexpr float kFactor = Half<Policy>::kFactor;
    using Sums = float[kWarps][16][kTokens + 1];

    static size_t shared(int64_t k) {
        return HalfRows::bytes(T, Gemv<Policy, T>::staged_vectors(steps_of<Policy>(k)));
    }
    template <class RowOf>
    __device__ static void multiply(void* memory, Sums& sums, const dsv4_weight& w, int64_t row0,
                                    Share share, RowOf row_of) {
        Gemv<Policy, T> rows(w, row0, share.first, share.last);
        HalfRows x(memory, T, rows.staged_vectors(steps_of<Policy>(w.k)));
        stage_rows<Half<Policy>::kPermuted>(x, T, w.k, row_of);
        float out[T][2];
        rows.run(x, share.first, 0, out);
        if (rows.lane.member == 0)
#pragma unroll
            for (int i = 0; i < 2 * T; i++)
                sums[threadIdx.x / 32][rows.lane.group + i % 2 * 8][i / 2] =
                    x.restore(out[i / 2][i % 2], i / 2);
        __syncthreads();
    }
};

// hidden[pair, row] for 16 rows of one expert: half the warps stream gate, half up.
template <class Way> __global__ void __launch_bounds__(kThreads, 2) hidden_kernel(const Moe m) {
    constexpr int kParts = kWarps / 2, kTokens = Way::kTokens;
    extern __shared__ __align__(16) char memory[];
    __shared__ typename Way::Sums sums;
    let_next_start();
    wait_for_previous();
    Work work = m.work_of(blockIdx.y);
    if (work.count == 0) return;
    const Expert& expert = m.table[work.expert];
    int warp = threadIdx.x / 32, row = threadIdx.x % 16, token = threadIdx.x / 16;
    int64_t row0 = blockIdx.x * 16;
    Share share(steps_of<typename Way::Policy>(m.d), warp % kParts, kParts);
    for (int at = 0; at < work.count; at += kTokens) {
        Way::multiply(memory, sums, warp < kParts ? expert.w1 : expert.w3, row0, share, [&](int i) {
            return at + i < work.count ? m.x + m.pair(work.first + at + i) / m.k * m.d : nullptr;
        });
        if (token < kTokens && at + token < work.count && row0 + row < m.inner) {
            float gate = 0, up = 0;
            for (int i = 0; i < kParts; i++) {
                gate += sums[i][row][token];
                up += sums[kParts + i][row][token];
            }
            gate = rounded(gate * Way::kFactor * expert.w1.global_scale);
            up = rounded(up * Way::kFactor * expert.w3.global_scale);
            int64_t pair = m.pair(work.first + at + token);
            float weight = m.routing == nullptr ? 1.0f : m.routing[pair];
            m.hidden[pair * m.inner + row0 + row] =
                __float2bfloat16_rn(swiglu(gate, up, m.limit) * weight);
        }
        __syncthreads();
    }
}

// partial[pair, row] for kWarps / split tiles of 16 rows of one expert.
template <class Way>
__global__ void __launch_bounds__(kThreads, 2) down_kernel(const Moe m, int split) {
    constexpr int kTokens = Way::kTokens;
    extern __shared__ __align__(16) char memory[];
    __shared__ typename Way::Sums sums;
    let_next_start();
    wait_for_previous();
    Work work = m.work_of(blockIdx.y);
    if (work.count == 0) return;
    const dsv4_weight& w = m.table[work.expert].w2;
    int warp = threadIdx.x / 32, tiles = kWarps / split;
    int64_t block_row = blockIdx.x * (int64_t)tiles * 16, row0 = block_row + warp / split * 16;
    Share share(row0 < m.d ? steps_of<typename Way::Policy>(m.inner) : 0, warp % split, split);
    for (int at = 0; at < work.count; at += kTokens) {
        Way::multiply(memory, sums, w, row0, share, [&](int i) {
            return at + i < work.count ? m.hidden + m.pair(work.first + at + i) * m.inner : nullptr;
        });
        for (int i = threadIdx.x; i < tiles * 16 * min(kTokens, work.count - at); i += kThreads) {
            int row = i % (tiles * 16), token = i / (tiles * 16);
            if (block_row + row >= m.d) continue;
            float total = 0;
            for (int s = 0; s < split; s++) total += sums[row / 16 * split + s][row % 16][token];
            int64_t pair = m.pair(work.first + at + token);
            m.partial[pair * m.d + block_row + row] = total * Way::kFactor * w.global_scale;
        }
        __syncthreads();
    }
}

// y[row] for 16 rows of the only token: the warps share the columns of all its experts.
template <class Policy>
__global__ void __launch_bounds__(kThreads, 2) down_token_kernel(const Moe m) {
    extern __shared__ __align__(16) char memory[];
    __shared__ float sums[kWarps][16];
    let_next_start();
    wait_for_previous();
    int64_t row0 = blockIdx.x * 16;
    int warp = threadIdx.x / 32, steps = steps_of<Policy>(m.inner);
    Share share(steps * (int)m.k, warp, kWarps);
    HalfRows hidden(memory, m.k, Gemv<Policy, 1>::staged_vectors(steps));
    float total[2] = {};  // of rows group and group + 8
    int at = share.first;
    do {  // once even without steps, for the barriers in stage_rows
        int slot = min(at / steps, (int)m.k - 1), first = at % steps;
        int last = min(steps, first + max(0, share.last - at));
        const dsv4_weight& w = m.table[m.expert_of(slot)].w2;
        Gemv<Policy, 1> rows(w, row0, first, last);
        if (at == share.first)
            stage_rows<Half<Policy>::kPermuted>(hidden, m.k, m.inner,
                                                [&](int s) { return m.hidden + s * m.inner; });
        HalfRows mine = hidden;
        mine.at += slot * hidden.vectors;
        float out[1][2];
        rows.run(mine, first, 0, out);
        for (int h = 0; h < 2; h++)
            total[h] += hidden.restore(out[0][h], slot) * Half<Policy>::kFactor * w.global_scale;
        at += max(1, last - first);
    } while (at < share.last);
    Lane lane;
    if (lane.member == 0) {
        sums[warp][lane.group] = total[0];
        sums[warp][lane.group + 8] = total[1];
    }
    __syncthreads();
    if (threadIdx.x < 16 && row0 + threadIdx.x < m.d) {
        float sum = 0;
        for (int i = 0; i < kWarps; i++) sum += sums[i][threadIdx.x];
        m.y[row0 + threadIdx.x] = sum;
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

constexpr size_t kMostShared = 100 * 1024;  // so that two blocks fit

inline int combine(const Moe& m, void* stream) {
    if (m.k == 1) return cudaSuccess;  // the partial results are y
    return launch(combine_kernel, dim3(ceil_div(m.d, kThreads), m.n), kThreads, 0, stream, m);
}

// ---------------------------------------------------------------- many tokens

// The pairs of a tile, and the sums of its products in shared memory.
template <class Policy> struct TileMemory {
    typename Tile<Policy>::Shared shared;
    int pairs[kTileTokens];  // -1: none
};

// Piece blockIdx.y of the pairs: with ids null, every token is a pair of expert 0.
__device__ Work piece_of(const Moe& m) {
    if (m.ids != nullptr) return m.work[blockIdx.y];
    int first = blockIdx.y * kTileTokens;
    return {0, first, (int)min((int64_t)kTileTokens, m.n - first)};
}

__device__ int pair_of_thread(const Moe& m, const Work& work) {
    int i = threadIdx.x;
    return i < work.count ? (m.ids == nullptr ? work.first + i : m.order[work.first + i]) : -1;
}

// hidden[pair, row]: 64 rows of gate and the same of up, as neighbouring row tiles of one warp.
template <class Policy>
__global__ void __launch_bounds__(kTileThreads, 2) hidden_tile_kernel(const Moe m) {
    extern __shared__ __align__(16) char bytes[];
    auto& memory = *reinterpret_cast<TileMemory<Policy>*>(bytes);
    let_next_start();
    wait_for_previous();
    Work work = piece_of(m);
    if (work.count == 0) return;
    const Expert& expert = m.table[work.expert];
    int64_t row0 = blockIdx.x * (int64_t)(kTileRows / 2);
    if (threadIdx.x < kTileTokens) {
        int pair = pair_of_thread(m, work);
        memory.pairs[threadIdx.x] = pair;
        memory.shared.rows[threadIdx.x] = pair < 0 ? nullptr : m.x + pair / m.k * m.d;
    }
    Tile<Policy> tile(memory.shared, [&](int t, int64_t& row) {
        row = row0 + t / 2 * 16;
        return t % 2 == 0 ? &expert.w1 : &expert.w3;
    });
    tile.run(0, steps_of<Policy>(m.d));
    float gate_factor = Policy::kFactor * expert.w1.global_scale;
    float up_factor = Policy::kFactor * expert.w3.global_scale;
#pragma unroll
    for (int t = 0; t < Tile<Policy>::NT; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = tile.token_of(t, i), pair = memory.pairs[token];
            float weight = pair < 0 || m.routing == nullptr ? 1.0f : m.routing[pair];
            float gate = rounded(tile.sum[0][t][i] * gate_factor);
            float up = rounded(tile.sum[1][t][i] * up_factor);
            memory.shared.sums[token][tile.row_of(0, i) / 32 * 16 + tile.row_of(0, i) % 16] =
                swiglu(gate, up, m.limit) * weight;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileTokens * kTileRows / 2; i += kTileThreads) {
        int row = i % (kTileRows / 2), token = i / (kTileRows / 2), pair = memory.pairs[token];
        if (pair >= 0 && row0 + row < m.inner)
            m.hidden[pair * m.inner + row0 + row] =
                __float2bfloat16_rn(memory.shared.sums[token][row]);
    }
}

// partial[pair, row] for 128 rows.
template <class Policy>
__global__ void __launch_bounds__(kTileThreads, 2) down_tile_kernel(const Moe m) {
    extern __shared__ __align__(16) char bytes[];
    auto& memory = *reinterpret_cast<TileMemory<Policy>*>(bytes);
    let_next_start();
    wait_for_previous();
    Work work = piece_of(m);
    if (work.count == 0) return;
    const dsv4_weight& w = m.table[work.expert].w2;
    int64_t row0 = blockIdx.x * (int64_t)kTileRows;
    if (threadIdx.x < kTileTokens) {
        int pair = pair_of_thread(m, work);
        memory.pairs[threadIdx.x] = pair;
        memory.shared.rows[threadIdx.x] = pair < 0 ? nullptr : m.hidden + pair * m.inner;
    }
    Tile<Policy> tile(memory.shared, [&](int t, int64_t& row) {
        row = row0 + 16 * t;
        return &w;
    });
    tile.run(0, steps_of<Policy>(m.inner));
    tile.keep_sums();
    __syncthreads();
    for (int i = threadIdx.x; i < kTileTokens * kTileRows; i += kTileThreads) {
        int row = i % kTileRows, token = i / kTileRows, pair = memory.pairs[token];
        if (pair >= 0 && row0 + row < m.d)
            m.partial[pair * m.d + row0 + row] =
                memory.shared.sums[token][row] * Policy::kFactor * w.global_scale;
    }
}

template <class Policy> int many_tokens(const Moe& m, int64_t pieces, void* stream) {
    constexpr size_t kShared = sizeof(TileMemory<Policy>);
    int status = allow_shared(hidden_tile_kernel<Policy>, kShared);
    if (status == cudaSuccess) status = allow_shared(down_tile_kernel<Policy>, kShared);
    if (status == cudaSuccess)
        status = launch(hidden_tile_kernel<Policy>, dim3(ceil_div(m.inner, kTileRows / 2), pieces),
                        kTileThreads, kShared, stream, m);
    if (status == cudaSuccess)
        status = launch(down_tile_kernel<Policy>, dim3(ceil_div(m.d, kTileRows), pieces),
                        kTileThreads, kShared, stream, m);
    return status == cudaSuccess ? combine(m, stream) : status;
}

// ---------------------------------------------------------------- all

template <class Way> int one_by_one(const Moe& m, int64_t candidates, void* stream) {
    using Policy = typename Way::Policy;
    size_t wide = Way::shared(m.d), narrow = Way::shared(m.inner);
    if (wide > kMostShared || narrow > kMostShared) return kUnsupported;
    int status = allow_shared(hidden_kernel<Way>, wide);
    if (status == cudaSuccess) status = allow_shared(down_kernel<Way>, narrow);
    if (status == cudaSuccess)
        status = launch(hidden_kernel<Way>, dim3(ceil_div(m.inner, 16), candidates), kThreads, wide,
                        stream, m);
    if (status != cudaSuccess) return status;
    int steps = steps_of<Policy>(m.inner), split = 1;
    if constexpr (kHasHalf<Policy>) {
        size_t all = HalfRows::bytes(m.k, Gemv<Policy, 1>::staged_vectors(steps));
        if (m.n == 1 && m.k > 1 && all <= kMostShared) {
            status = allow_shared(down_token_kernel<Policy>, all);
            if (status != cudaSuccess) return status;
            return launch(down_token_kernel<Policy>, dim3(ceil_div(m.d, 16)), kThreads, all, stream,
                          m);
        }
    }
    while (split < kWarps && (steps > 8 * split || m.d * split * candidates < 16 * 2048)) split *= 2;
    status = launch(down_kernel<Way>, dim3(ceil_div(m.d, 16 * kWarps / split), candidates), kThreads,
                    narrow, stream, m, split);
    return status == cudaSuccess ? combine(m, stream) : status;
}

// Chosen by how many pairs an expert has on average.
template <class Policy> int few_tokens(const Moe& m, int64_t candidates, void* stream) {
    if constexpr (kHasHalf<Policy>) {
        int status = kUnsupported;
        if (m.n == 1) status = one_by_one<FewColumns<Policy, 1>>(m, candidates, stream);
        else if (m.n * m.k <= 2 * m.count)
            status = one_by_one<FewColumns<Policy, 2>>(m, candidates, stream);
        if (status != kUnsupported) return status;
    }
    return one_by_one<ManyColumns<Policy>>(m, candidates, stream);
}

// Room for the pieces of all experts.
inline int64_t most_pieces(int64_t pairs, int64_t count, int most) {
    return min(pairs, pairs / most + count);
}

template <class Policy> int experts(Moe m, void* stream) {
    int64_t pairs = m.n * m.k;
    bool many = pairs > 8 * m.count;
    int most = many ? kTileTokens : (int)pairs, status = cudaSuccess;
    int64_t pieces = m.ids == nullptr ? (many ? ceil_div(m.n, kTileTokens) : 1)
                                      : most_pieces(pairs, m.count, most);
    if (m.ids == nullptr || m.n == 1) m.order = nullptr;
    else status = launch(list_kernel, 1, kMostExperts, 0, stream, m, (int)pieces, most);
    if (status != cudaSuccess) return status;
    if (m.k == 1) m.partial = m.y;
    return many ? many_tokens<Policy>(m, pieces, stream) : few_tokens<Policy>(m, pieces, stream);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y [n, d] float32 = sum over slots of routing * expert(x), x [n, d] bf16. `table` holds `count` times
// w1, w2, w3 (struct dsv4_weight, in device memory), all of `format`, inner columns in w2. ids and
// routing [n, k], or both null with k = 1. Scratch: hidden [n * k, inner] bf16, partial [n * k, d]
// float32, lists 4 * n * k int32.
DSV4_EXPORT int dsv4_experts(const void* x, int64_t n, int64_t d, const int32_t* ids,
                             const float* routing, int64_t k, const void* table, int64_t count,
                             int64_t inner, int format, float limit, void* hidden, float* partial,
                             int32_t* lists, float* y, void* stream) {
    Work* work = (Work*)(lists + n * k);  // no more experts than pairs
    Moe m = {(const Expert*)table, ids, routing, (const bf16*)x, (bf16*)hidden, partial, y,
             work, lists, n, k, d, inner, count, limit};
    if (n * k == 0) return cudaSuccess;
    if (count > kMostExperts || n * k > INT32_MAX / 64) return kUnsupported;
    return with_policy(format, d, [&](auto policy) {
        using Policy = decltype(policy);
        if (inner % Policy::kChunk) return kUnsupported;
        return experts<Policy>(m, stream);
    });
}
