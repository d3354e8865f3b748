// Scores and top-k of one token a sequence in one kernel, with the rope of its query, where entries are few.
#pragma once

#include "indexer_token.cuh"
#include "topk_few.cuh"

namespace dsv4 {

// A cluster a token. Every CTA scores its share of the entries, two of its warpgroups a tile each, gives all CTAs
// the keys of its scores, and ranks its part of them by comparing with all.
constexpr int kFewCluster = 16, kFewTiles = 2, kFewThreads = 512, kFewWarps = kFewThreads / 32;
constexpr int kFewShare = kFewTiles * kTile, kFewEntries = kFewCluster * kFewShare;

struct FewShared {
    QueryShared query;
    TileShared tiles[kFewTiles];
    alignas(16) uint32_t own[kFewShare], all[kFewEntries];  // keys; 0 where not visible
    uint64_t loaded[kFewTiles], gathered;
};

// This CTA's entries, [begin, end) with room for `share`: their keys into s.own, their scores to memory if wanted.
__device__ inline void score_share(const Problem& p, FewShared& s, int64_t token, int begin, int end, int share,
                                   int visible) {
    const int group = threadIdx.x / kTileThreads, mine = entry_of_thread();
    const int place = group * kTile + mine, entry = begin + place;
    uint32_t key = 0;
    if (group < kFewTiles && begin + group * kTile < end) {
        float dot[32];
        barrier_wait(&s.loaded[group], 0);
        score_tile(s.query, s.tiles[group].keys, dot, [] {});
        const float score = tile_score(s.query, dot);
        if (entry < visible) key = key_of(score);
        if (p.score && mine >= 0 && entry < end)
            p.score[token * p.total + entry] = entry < visible ? score : -INFINITY;
    }
    if (mine >= 0 && place < share) s.own[place] = key;
}

__global__ void __launch_bounds__(kFewThreads, 1) score_topk_kernel(const Problem p, int share, int k, int* index) {
    extern __shared__ __align__(1024) char memory[];
    FewShared& s = *reinterpret_cast<FewShared*>(memory);
    const int rank = cluster_rank(), ctas = cluster_size(), total = (int)p.total;
    const int64_t token = blockIdx.x;
    const int begin = rank * share, end = min(begin + share, total);
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kFewTiles; i++) barrier_init(&s.loaded[i], 1);
        barrier_init(&s.gathered, 1);
        fence_barrier_init();
        barrier_expect(&s.gathered, ctas * share * sizeof(uint32_t));
    }
    cluster_arrive_relaxed();
    wait_for_previous();
    if (threadIdx.x == 0)
        for (int i = 0, first = begin; i < kFewTiles && first < end; i++, first += kTile) {
            const int bytes = min(kTile, end - first) * 2 * kDim;
            barrier_expect(&s.loaded[i], bytes);
            bulk_load(s.tiles[i].keys, (const bf16*)p.keys + (token * p.capacity + first) * kDim, bytes,
                      &s.loaded[i]);
        }
    const TokenQuery<kFewThreads, true> query(p, token, rank == 0);
    query.store(s.query);
    const int visible = min(p.visible_at(query.position), total), wanted = min(visible, k);
    fence_async_proxy();
    __syncthreads();
    score_share(p, s, token, begin, end, share, visible);
    __syncthreads();
    cluster_wait();  // every CTA of the cluster has its barriers
    const int quads = share / 4;
    for (int i = threadIdx.x; i < ctas * quads; i += kFewThreads) {
        const int to = i / quads, at = i % quads * 4;
        remote_store(remote_address(shared_address(s.all + begin + at), to), *(const float4*)(s.own + at),
                     remote_address(shared_address(&s.gathered), to));
    }
    barrier_wait(&s.gathered, 0);
    index += token * k;
    const int each = (visible + ctas - 1) / ctas, first = min(each * rank, visible), last = min(first + each, visible);
    if (each <= kFewWarps) rank_few<1, kFewWarps>(s.all, visible, first, last, wanted, index);
    else rank_few<4, kFewWarps>(s.all, visible, first, last, wanted, index);
    if (rank == 0)
        for (int i = threadIdx.x + wanted; i < k; i += kFewThreads) index[i] = -1;
}

inline int score_topk(const Problem& p, int k, int* index, void* stream) {
    static const int allowed = [] {
        const int status = allow_shared(score_topk_kernel, sizeof(FewShared));
        if (status) return status;
        return (int)cudaFuncSetAttribute(score_topk_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }();
    if (allowed) return allowed;
    const int share = (int)ceil_div(ceil_div(p.total, kFewCluster), 16) * 16;
    const int ctas = p.total <= share ? 2 : (int)ceil_div(p.total, share);  // st.async needs a cluster
    return launch_clusters(ctas, score_topk_kernel, dim3(p.n, 1, ctas), kFewThreads, sizeof(FewShared), stream, p,
                           share, k, index);
}

}  // namespace dsv4
