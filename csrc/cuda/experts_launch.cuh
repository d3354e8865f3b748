// The launches of experts of few pairs: which products one holds, and how its blocks wait for one another;
// before them the list of pairs by expert, after them the sum over a token's experts.
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

// ---------------------------------------------------------------- between: both products

struct Nothing {};  // no shared expert in a launch

enum Products { kHiddenOnly = 1, kDownOnly = 2, kBoth = 3 };

// All finishing warps of the launch have left their hidden vectors.
__device__ inline void wait_for_hidden(const Ticket* ticket) {
    unsigned done;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(&ticket->hidden) : "memory");
    } while (done < gridDim.x * kFinishers);
}

__device__ inline void leave_hidden(Ticket* ticket) {
    __syncwarp();
    if (threadIdx.x % 32 > 0) return;
    __threadfence();
    atomicAdd(&ticket->hidden, 1);
}

// By every finishing warp and by that which has waited; the last makes the ticket good for the next launch.
__device__ inline void leave(Ticket* ticket) {
    __syncwarp();
    if (threadIdx.x % 32 > 0) return;
    __threadfence();
    if (atomicAdd(&ticket->all, 1) == gridDim.x * (kFinishers + 1) - 1) ticket->hidden = ticket->all = 0;
}

template <class Policy, class Shared, bool kToken> struct Launch {
    static constexpr bool kShares = !std::is_same_v<Shared, Nothing>;
    static constexpr Product kDown = kToken ? Product::kDownToken : Product::kDown;
    const Moe &m, &shared;
    Ticket* ticket;
    int products;
    FewShared& s;
    char* memory;

    template <class P, Product kProduct, int kPart = 0>
    __device__ Few<P, kProduct, kPart> few(const Moe& of) const {
        return Few<P, kProduct, kPart>(of, s, memory);
    }

    __device__ void multiply() const {
        Progress done;
        const auto at_once = [] {};
        if (products & kHiddenOnly) {
            if constexpr (kShares)  // whose weights no earlier kernel chooses
                few<Shared, Product::kHidden, 1>(shared).multiply(done, wait_for_previous);
            else wait_for_previous();
            few<Policy, Product::kHidden>(m).multiply(done, at_once);
        }
        if (!(products & kDownOnly)) return;
        const auto ready = [&] {
            if (products == kDownOnly) wait_for_previous();
            else if (threadIdx.x == 0) wait_for_hidden(ticket);  // the others wait for this thread
        };
        if constexpr (kToken) named_barrier(kTokenKnown, (kMultipliers + 1) * 32);
        if constexpr (kShares) {
            few<Shared, Product::kDown, 1>(shared).multiply(done, ready);
            few<Policy, kDown>(m).multiply(done, at_once);
        } else {
            few<Policy, kDown>(m).multiply(done, ready);
        }
        if (products == kBoth && threadIdx.x < 32) leave(ticket);
    }

    __device__ void finish(int me) const {
        wait_for_previous();
        Progress done;
        if (products & kHiddenOnly) {
            if constexpr (kShares) few<Shared, Product::kHidden, 1>(shared).finish(me, done);
            few<Policy, Product::kHidden>(m).finish(me, done);
        }
        if (products == kBoth) leave_hidden(ticket);
        if (products & kDownOnly) {
            if constexpr (kShares) few<Shared, Product::kDown, 1>(shared).finish(me, done);
            // One token: the block that has a tile of the shared expert's result adds it to the others'.
            if constexpr (kShares && kToken) named_barrier(kHandOver, kFinishers * 32);
            few<Policy, kDown>(m).finish(me, done);
        }
        if (products == kBoth) leave(ticket);
    }

    // By a warp that has nothing else to do.
    __device__ void look_up_token() const {
        wait_for_previous();
        if (threadIdx.x % 32 < m.k) s.down[threadIdx.x % 32] = m.table[m.expert_of(threadIdx.x % 32)].w2;
        named_barrier(kTokenKnown, (kMultipliers + 1) * 32);
    }
};

template <class Policy, class Shared, bool kToken>
__global__ void __launch_bounds__(kFewThreads, 1)
    few_kernel(const __grid_constant__ Moe m, const __grid_constant__ Moe shared, Ticket* ticket,
               int products) {
    extern __shared__ __align__(128) char memory[];
    __shared__ FewShared s;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kFinishers; i++) {
            barrier_init(&s.summed[i], kMultipliers * 32);
            barrier_init(&s.taken[i], 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    // A launch of the second product alone may start only once that of the first has waited: the list is
    // complete by then, and weights are copied before the hidden vectors are there.
    if (products == kHiddenOnly) wait_for_previous();
    let_next_start();
    using Parts = Launch<Policy, Shared, kToken>;
    const Parts launch{m, shared, ticket, Parts::kShares ? kBoth : products, s, memory};
    const int warp = threadIdx.x / 32;
    if (warp < kMultipliers) {
        more_registers<104>();
        launch.multiply();
    } else {
        fewer_registers<64>();
        if (warp < kMultipliers + kFinishers) launch.finish(warp - kMultipliers);
        else if (kToken && warp == kMultipliers + kFinishers && products & kDownOnly)
            launch.look_up_token();
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
    const int64_t hidden = Few<Policy, Product::kHidden>::bytes(m);
    const int64_t down = token ? Few<Policy, Product::kDownToken>::bytes(m)
                               : Few<Policy, Product::kDown>::bytes(m);
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

template <class Policy, class Shared, bool kToken>
int launch_few(const Moe& m, const Moe& shared, Ticket* ticket, int products, void* stream) {
    auto kernel = few_kernel<Policy, Shared, kToken>;
    int64_t bytes = few_bytes<Policy>(m, kToken);
    if constexpr (!std::is_same_v<Shared, Nothing>) {
        const int64_t other = few_bytes<Shared>(shared, false);
        bytes = other > bytes ? other : bytes;
    }
    int status = allow_shared(kernel, bytes);
    if (status != cudaSuccess) return status;
    return launch(kernel, block_count(), kFewThreads, bytes, stream, m, shared, ticket, products);
}

// Both products, in one launch if there is a ticket.
template <class Policy, class Shared, bool kToken>
int both_products(const Moe& m, const Moe& shared, Ticket* ticket, void* stream) {
    if (ticket != nullptr)
        return launch_few<Policy, Shared, kToken>(m, shared, ticket, kBoth, stream);
    int status = launch_few<Policy, Shared, kToken>(m, shared, ticket, kHiddenOnly, stream);
    if (status != cudaSuccess) return status;
    return launch_few<Policy, Shared, kToken>(m, shared, ticket, kDownOnly, stream);
}

// Everything behind the list of pairs. m.most is known.
template <class Policy, class Shared>
int few_pairs(const Moe& m, const Moe& shared, Ticket* ticket, void* stream) {
    if (is_token<Policy>(m))
        return both_products<Policy, Shared, true>(m, shared, ticket, stream);
    const int status = both_products<Policy, Shared, false>(m, shared, ticket, stream);
    return status == cudaSuccess ? combine(m, stream) : status;
}

}  // namespace dsv4
