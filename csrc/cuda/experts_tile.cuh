// Experts of many pairs, for the formats whose scale multiplies sums or that have none: tiles of 64
// pairs of one expert (tile.cuh).
#pragma once

#include "experts.cuh"
#include "tile.cuh"

namespace dsv4 {

// The pairs of a tile, and the sums of its products in shared memory.
template <class Policy> struct TileMemory {
    typename Tile<Policy>::Shared shared;
    int pairs[kTileTokens];  // -1: none
    float factor;            // of the product's sums
};

__device__ inline int pair_of_thread(const Moe& m, const Work& work) {
    int i = threadIdx.x;
    return i < work.count ? m.pair(work.first + i) : -1;
}

// hidden[pair, row]: 64 rows of gate and the same of up, as neighbouring row tiles of one warp.
template <class Policy>
__global__ void __launch_bounds__(kTileThreads, 2) hidden_tile_kernel(const Moe m) {
    extern __shared__ __align__(16) char bytes[];
    auto& memory = *reinterpret_cast<TileMemory<Policy>*>(bytes);
    let_next_start();
    wait_for_previous();
    if ((int)blockIdx.y >= m.piece_count()) return;
    Work work = m.work_of(blockIdx.y);
    const Expert& expert = m.table[work.expert];
    int64_t row0 = blockIdx.x * (int64_t)(kTileRows / 2);
    if (threadIdx.x < kTileTokens) {
        int pair = pair_of_thread(m, work);
        memory.pairs[threadIdx.x] = pair;
        memory.shared.rows[threadIdx.x] = pair < 0 ? nullptr : m.x_of(pair);
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
    if ((int)blockIdx.y >= m.piece_count()) return;
    Work work = m.work_of(blockIdx.y);
    const dsv4_weight& w = m.table[work.expert].w2;
    int64_t row0 = blockIdx.x * (int64_t)kTileRows;
    if (threadIdx.x < kTileTokens) {
        int pair = pair_of_thread(m, work);
        memory.pairs[threadIdx.x] = pair;
        memory.shared.rows[threadIdx.x] = pair < 0 ? nullptr : m.hidden_of(pair);
    }
    if (threadIdx.x == 0) memory.factor = Policy::kFactor * w.global_scale;
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
                memory.shared.sums[token][row] * memory.factor;
    }
}

template <class Policy> int launch_tiles(const Moe& m, void* stream) {
    const int64_t pairs = m.n * m.k;
    const int64_t pieces = m.order == nullptr ? ceil_div(pairs, m.most)
                                              : min(pairs, pairs / m.most + m.count);  // at most
    constexpr size_t kShared = sizeof(TileMemory<Policy>);
    int status = allow_shared(hidden_tile_kernel<Policy>, kShared);
    if (status == cudaSuccess) status = allow_shared(down_tile_kernel<Policy>, kShared);
    if (status == cudaSuccess)
        status = launch(hidden_tile_kernel<Policy>, dim3(ceil_div(m.inner, kTileRows / 2), pieces),
                        kTileThreads, kShared, stream, m);
    if (status == cudaSuccess)
        status = launch(down_tile_kernel<Policy>, dim3(ceil_div(m.d, kTileRows), pieces),
                        kTileThreads, kShared, stream, m);
    return status;
}

}  // namespace dsv4
