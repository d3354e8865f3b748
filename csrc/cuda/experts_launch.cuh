// The launches of experts of few pairs: what one holds; before them the list of pairs by expert, after them
// the sum over a token's experts.
#pragma once

#include <assert.h>

#include "experts_few.cuh"

namespace dsv4 {

constexpr int kMostExperts = 1024, kCombineThreads = 256;

// ---------------------------------------------------------------- before: pairs by expert

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

// Lists the pairs of each expert, in pieces of at most m.most. One block of kMostExperts threads; the
// order of an expert's pairs does not matter to any result.
__device__ inline void list_pairs(const Moe& m) {
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

// ---------------------------------------------------------------- after: sums over experts

// The sum of a token's partial results, in slot order; four columns a thread.
static __global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Moe m) {
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
    const int64_t at = token * m.d + column;
    m.store(at, total.x), m.store(at + 1, total.y), m.store(at + 2, total.z);
    m.store(at + 3, total.w);
}

inline int combine(const Moe& m, void* stream) {
    if (m.partial == m.y) return cudaSuccess;  // k = 1
    return launch(combine_kernel, dim3(ceil_div(m.d, 4 * kCombineThreads), m.n), kCombineThreads, 0,
                  stream, m);
}

// ---------------------------------------------------------------- between: the products

struct Nothing {};  // no shared expert in a launch

// One token; the least tile, for few items; a tile of more rows, with less to do an item.
enum class Form { kToken, kFewItems, kManyItems };

template <class Policy, class Shared, Form kForm, bool kDown> struct Launch {
    static constexpr bool kToken = kForm == Form::kToken, kShares = !std::is_same_v<Shared, Nothing>;
    static constexpr Product kBeside = kDown ? Product::kDown : Product::kHidden;
    static constexpr Product kRouted = kDown && kToken ? Product::kDownToken : kBeside;
    static constexpr int kAcross = kForm == Form::kManyItems ? kMultipliers / 2 : kMultipliers;
    const Moe &m, &shared;
    FewShared& s;
    char* memory;

    __device__ Few<Policy, kRouted, kAcross> routed() const { return {m, s, memory}; }
    __device__ Few<Shared, kBeside, kMultipliers, 1> beside() const { return {shared, s, memory}; }

    __device__ void multiply() const {
        Progress done;
        if constexpr (kShares) beside().multiply(done);
        routed().multiply(done);
    }
    __device__ void finish(int me) const {
        wait_for_previous();
        Progress done;
        if constexpr (kShares) beside().finish(me, done);
        // One token: the block that has a tile of the shared expert's result adds it to the others'.
        if constexpr (kShares && kDown && kToken) named_barrier(kHandOver, kFinishers * 32);
        routed().finish(me, done);
    }
};

template <class Policy, class Shared, Form kForm, bool kDown>
__global__ void __launch_bounds__(kFewThreads, 1)
    few_kernel(const __grid_constant__ Moe m, const __grid_constant__ Moe shared) {
    using Parts = Launch<Policy, Shared, kForm, kDown>;
    extern __shared__ __align__(128) char memory[];
    __shared__ FewShared s;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kFinishers; i++) {
            barrier_init(&s.summed[i], kMultipliers * 32);
            barrier_init(&s.taken[i], 32);
        }
        fence_barrier_init();
    }
    // The second product may start only once the first one has waited: ids and list are complete by then,
    // and the weights are copied before the hidden vectors are there.
    if (!kDown) wait_for_previous();
    if (Parts::kRouted == Product::kDownToken && threadIdx.x < m.k)
        s.down[threadIdx.x] = m.table[m.expert_of(threadIdx.x)].w2;
    __syncthreads();
    let_next_start();
    const Parts launch{m, shared, s, memory};
    const int warp = threadIdx.x / 32;
    if (warp < kMultipliers) {
        more_registers<104>();
        launch.multiply();
    } else {
        fewer_registers<64>();
        if (warp < kMultipliers + kFinishers) launch.finish(warp - kMultipliers);
    }
}

// Blocks of which one fits on a multiprocessor.
inline int block_count() {
    int count = 1, device = 0;
    if (cudaGetDevice(&device) == cudaSuccess)
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// Of shared memory; for a product of both launches, or of one token.
template <class Policy> int64_t few_bytes(const Moe& m, bool token) {
    const int64_t hidden = Few<Policy, Product::kHidden, kMultipliers>::bytes(m);
    const int64_t down = token ? Few<Policy, Product::kDownToken, kMultipliers>::bytes(m)
                               : Few<Policy, Product::kDown, kMultipliers>::bytes(m);
    return hidden > down ? hidden : down;
}

constexpr int64_t kFewRoom = 227 * 1024 - sizeof(FewShared);

// Whether one item can take all experts of the only token.
template <class Policy> bool is_token(const Moe& m) {
    return m.n == 1 && m.k > 1 && m.k <= kFewPairs && m.ids != nullptr &&
           few_bytes<Policy>(m, true) <= kFewRoom;
}

// The most pairs of a piece, as fit in shared memory; 0: none do.
template <class Policy> int few_size(Moe m) {
    if (m.d >= 1 << 20 || m.inner >= 1 << 20) return 0;
    for (m.most = m.n == 1 ? 1 : kFewPairs; m.most > 0; m.most /= 2)
        if (few_bytes<Policy>(m, false) <= kFewRoom) break;
    return m.most;
}

template <class Policy, class Shared, Form kForm, bool kDown>
int launch_few(const Moe& m, const Moe& shared, void* stream) {
    auto kernel = few_kernel<Policy, Shared, kForm, kDown>;
    int64_t bytes = few_bytes<Policy>(m, kForm == Form::kToken);
    if constexpr (!std::is_same_v<Shared, Nothing>) {
        const int64_t other = few_bytes<Shared>(shared, false);
        bytes = other > bytes ? other : bytes;
    }
    int status = allow_shared(kernel, bytes);
    if (status != cudaSuccess) return status;
    return launch(kernel, block_count(), kFewThreads, bytes, stream, m, shared);
}

template <class Policy, class Shared, Form kForm>
int both_products(const Moe& m, const Moe& shared, void* stream) {
    const int status = launch_few<Policy, Shared, kForm, false>(m, shared, stream);
    if (status != cudaSuccess) return status;
    return launch_few<Policy, Shared, kForm, true>(m, shared, stream);
}

// Everything behind the list of pairs. m.most is known.
template <class Policy, class Shared>
int few_pairs(const Moe& m, const Moe& shared, void* stream) {
    if (is_token<Policy>(m)) return both_products<Policy, Shared, Form::kToken>(m, shared, stream);
    if constexpr (std::is_same_v<Shared, Nothing>)
        if (m.ids == nullptr)  // the shared expert alone: k = 1
            return both_products<Policy, Shared, Form::kFewItems>(m, shared, stream);
    const int status = both_products<Policy, Shared, Form::kManyItems>(m, shared, stream);
    return status == cudaSuccess ? combine(m, stream) : status;
}

}  // namespace dsv4
