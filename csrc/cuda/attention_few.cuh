// Attention of few tokens: a cluster for each token and 16 or 32 of its heads, a share of the keys a CTA.
//
// A CTA copies its one or two blocks of 64 keys at once, a quarter of the width after the other, and
// multiplies what has landed. Heads are the columns of both products, so that
// few of them cost little: logits^T [64 keys, heads] = k q^T, and output^T [512, heads] = v^T p^T. Warpgroup
// w computes the logits of block w and half of the output's width. The shares meet in distributed shared
// memory: each CTA leaves its sums in its own, then adds up one slice of all of theirs.
#pragma once

#include "attention_packed.cuh"
#include "rope.cuh"

namespace dsv4 {

constexpr int kFewThreads = 256, kFewBlocks = 2, kMostRanks = 16;
constexpr int kPartPitch = kDim + 4;  // floats; 4 spread the banks
constexpr int kChunks = kHalf / 64;   // of the output that a warpgroup has
constexpr int kPieces = 4;            // of the width, multiplied one after another as they arrive
constexpr int kUnits = 64 / kPieces;  // of 16 bytes, in a piece of a row
constexpr int kRowsOfLane = 8 * kUnits / 32;  // of the eight that a warp copies

template <int kColumns> struct Few {
    char q[kColumns * kDim * 2];  // 8 chunks of kColumns rows of 128 bytes, swizzled
    char weights[kFewBlocks][kColumns * kBlock * 2];
    float most[kFewBlocks][4][kColumns], sums[kFewBlocks][4][kColumns];  // of each warp's 16 keys
    Softmax shares[kMostRanks][kColumns];                                // from every CTA
    float factor[kMostRanks][kColumns];                                  // of a CTA's sums
    float sink[kColumns];
    alignas(8) uint8_t exists[kFewBlocks][8];                                       // a bit a key
    uint64_t landed[kPieces];
};

template <int kColumns, bool kPacked> struct FewHeads {
    const Problem& p;
    Few<kColumns>& s;
    char* keys;  // [blocks][kTileBytes]; later the sums, [kColumns][kPartPitch] floats
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int w = __shfl_sync(~0u, thread / 128, 0);  // so that the compiler knows it to be uniform
    const int t = lane % 4, row = warp % 4 * 16 + lane / 4;
    const int groups, head, rank, ranks, first, blocks;
    const int64_t token;

    __device__ FewHeads(const Problem& p, Few<kColumns>& s, char* keys)
        : p(p), s(s), keys(keys), groups((p.heads + kColumns - 1) / kColumns),
          head(blockIdx.x % groups * kColumns), rank(blockIdx.z), ranks(p.shares),
          first(rank * p.per_share),
          blocks(min(first + p.per_share, blocks_of(p.keys.window.width) +
                                              blocks_of(p.keys.entries.width)) - first),
          token(blockIdx.x / groups) {}

    __device__ void init_barriers() const {
        if (thread == 0) {
            for (int i = 0; i < kPieces; i++) barrier_init(&s.landed[i], (i ? 1 : 2) * kFewThreads);
            fence_barrier_init();
        }
        __syncthreads();
    }

    // Copies of q and of all blocks; a warp takes eight keys of a block, lane r % 8 knows that of r.
    __device__ void gather() {
        int index[kFewBlocks];
#pragma unroll
        for (int b = 0; b < kFewBlocks; b++)
            index[b] = b < blocks ? index_of(p, token, first + b, 8 * warp + lane % 8) : -1;
        const float sink = thread < kColumns && head + thread < p.heads ? p.sink[head + thread] : 0;
        int key[kFewBlocks][kRowsOfLane];
#pragma unroll
        for (int b = 0; b < kFewBlocks; b++) {
            if (b >= blocks) break;
            const uint32_t exist = __ballot_sync(~0u, index[b] >= 0) & 0xff;
            if (lane == 0) s.exists[b][warp] = exist;
            if constexpr (!kPacked) find_rows(b, index[b], key[b]);
        }
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++) {
            copy_q(piece);
            if constexpr (!kPacked) {
#pragma unroll
                for (int b = 0; b < kFewBlocks; b++)
                    if (b < blocks) copy_block(b, key[b], piece);
            }
            copy_arrive(&s.landed[piece]);
        }
        if constexpr (kPacked) {  // q is on its way; the second block comes into the L2 meanwhile
            if (blocks > 1) EntryRows(p, first + 1, index[1]).prefetch(lane);
#pragma unroll
            for (int b = 0; b < kFewBlocks; b++)
                if (b < blocks) decode_block(b, index[b]);
        }
        if (thread < kColumns) s.sink[thread] = sink;
        fence_async_proxy();
        barrier_arrive(&s.landed[0]);  // what it has written itself
    }

    // A piece of q; 16 threads share a row.
    __device__ void copy_q(int piece) const {
        const bf16* q = p.q + (token * p.heads + head) * kDim;
        const int unit = kUnits * piece + thread % kUnits;
#pragma unroll
        for (int i = 0; i < kColumns / 4 / kPieces; i++) {
            const int at = (i * kFewThreads + thread) / kUnits;
            const bool exists = head + at < p.heads;
            copy16(shared_address(s.q) + unit / 8 * (kColumns * 128) + at * 128 +
                       ((unit % 8 ^ at % 8) << 4),
                   q + (exists ? at * kDim + unit * 8 : 0), exists);
        }
    }
    // kUnits lanes share a row of a block: of those that a lane copies, where they are in the pool.
    __device__ void find_rows(int b, int indices, int (&key)[kRowsOfLane]) const {
        const Pool pool = pool_of(p, first + b);
#pragma unroll
        for (int i = 0; i < kRowsOfLane; i++)
            key[i] = checked(pool, __shfl_sync(~0u, indices, 8 / kRowsOfLane * i + lane / kUnits));
    }
    // A piece of them.
    __device__ void copy_block(int b, const int (&key)[kRowsOfLane], int piece) const {
        const Pool pool = pool_of(p, first + b);
        const uint32_t to = shared_address(keys) + b * kTileBytes;
        const int unit = kUnits * piece + lane % kUnits;
#pragma unroll
        for (int i = 0; i < kRowsOfLane; i++) {
            const int row = 8 * warp + 8 / kRowsOfLane * i + lane / kUnits;
            copy16(to + unit_offset(row, unit),
                   (const char*)pool.keys + (int64_t)max(key[i], 0) * (2 * kDim) + 16 * unit,
                   key[i] >= 0);
        }
    }
    __device__ void decode_block(int b, int indices) const {
        const Pool pool = pool_of(p, first + b);
        EntryCodes codes[8];
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const int key = checked(pool, __shfl_sync(~0u, indices, r));
            if (key >= 0)
                codes[r] = EntryCodes((const char*)pool.keys + (int64_t)key * kEntryBytes, lane);
        }
#pragma unroll
        for (int r = 0; r < 8; r++) codes[r].store(keys + b * kTileBytes, 8 * warp + r, lane);
    }

    __device__ void wait_for_keys() const {
        for (int piece = 0; piece < kPieces; piece++) barrier_wait(&s.landed[piece], 0);
        fence_async_proxy();
    }

    // Logits of this warpgroup's block, in log2 units, and the largest of each warp and head.
    __device__ void multiply_keys(float (&logit)[kColumns / 2]) {
        const uint64_t a = matrix_descriptor(shared_address(keys) + w * kTileBytes, 16, 1024);
        const uint64_t b = matrix_descriptor(shared_address(s.q), 16, 1024);
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++) {
            barrier_wait(&s.landed[piece], 0);
            fence_async_proxy();
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < kDim / 16 / kPieces; i++) {
                const int k = piece * (kDim / 16 / kPieces) + i;
                wgmma(logit, a + ((k / 4 * kChunk + k % 4 * 32) >> 4),
                                b + ((k / 4 * (kColumns * 128) + k % 4 * 32) >> 4), k > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        const uint64_t exists = *(const uint64_t*)s.exists[w];
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) {
            logit[i] *= p.scale * kLog2e;
            if (!(exists >> (row + i / 2 % 2 * 8) & 1)) logit[i] = -INFINITY;
        }
        float most[kColumns / 4];
#pragma unroll
        for (int i = 0; i < kColumns / 4; i++)
            most[i] = fmaxf(logit[i / 2 * 4 + i % 2], logit[i / 2 * 4 + i % 2 + 2]);
        const float all = over_keys(most, [](float a, float b) { return fmaxf(a, b); });
        if (own_column() >= 0) s.most[w][warp % 4][own_column()] = all;
    }

    // Of values of this thread's columns, over the lanes that share them: one column's, own_column().
    template <int n, class Combine> __device__ float over_keys(float (&value)[n], Combine combine) const {
        int left = n;
#pragma unroll
        for (int offset = 16; offset >= 4; offset /= 2) {
            const bool upper = lane & offset;
            if (left == 1) {
                value[0] = combine(value[0], __shfl_xor_sync(~0u, value[0], offset));
                continue;
            }
            left /= 2;
#pragma unroll
            for (int i = 0; i < n / 2; i++) {
                if (i >= left) break;
                const float sent = upper ? value[i] : value[i + left];
                const float kept = upper ? value[i + left] : value[i];
                value[i] = combine(kept, __shfl_xor_sync(~0u, sent, offset));
            }
        }
        return value[0];
    }
    // -1 where another lane has it.
    __device__ int own_column() const {
        const int i = lane / (kColumns == 32 ? 4 : 8);
        return kColumns < 32 && lane & 4 ? -1 : i / 2 * 8 + 2 * t + i % 2;
    }

    // The largest logit of a head, of all blocks.
    __device__ float most_of(int column) const {
        const float* from = &s.most[0][0][column];
        float most = -INFINITY;
#pragma unroll 4
        for (int i = 0; i < 4 * blocks; i++) most = fmaxf(most, from[i * kColumns]);
        return most;
    }

    // Logits -> weights [heads, keys] and their sums.
    __device__ void weigh(float (&logit)[kColumns / 2]) {
        const float all = most_of(lane % kColumns);
        float sum[kColumns / 4];
        uint32_t weight[kColumns / 4];  // keys 0-7 and 8-15 of this warp, of each 8 heads
#pragma unroll
        for (int i = 0; i < kColumns / 4; i++) {
            const float most = __shfl_sync(~0u, all, i / 2 * 8 + 2 * t + i % 2);
            const float from = most == -INFINITY ? 0 : most;
            float &low = logit[i / 2 * 4 + i % 2], &high = logit[i / 2 * 4 + i % 2 + 2];
            low = exp2f(low - from);
            high = exp2f(high - from);
            sum[i] = low + high;
        }
#pragma unroll
        for (int i = 0; i < kColumns / 4; i++) weight[i] = pack_bf16(logit[2 * i], logit[2 * i + 1]);
        // Lane l has the address of head l % 8 of the eight that matrix l / 8 is of.
#pragma unroll
        for (int i = 0; i < kColumns / 4; i += 4) {
            const int column = 4 * i + lane / 16 * 8 + lane % 8, eight = warp % 4 * 2 + lane / 8 % 2;
            store_transposed(shared_address(s.weights[w]) + column * 128 + ((eight ^ column % 8) << 4),
                             weight[i], weight[i + 1], weight[i + 2], weight[i + 3]);
        }
        const float total = over_keys(sum, [](float a, float b) { return a + b; });
        if (own_column() >= 0) s.sums[w][warp % 4][own_column()] = total;
        fence_async_proxy();
    }

    // To every CTA: the softmax of this one's share, of each head.
    __device__ void announce() const {
        for (int i = thread; i < ranks * kColumns; i += kFewThreads) {
            const int column = i % kColumns;
            Softmax share = {most_of(column), 0};
            const float* sums = &s.sums[0][0][column];
#pragma unroll 4
            for (int k = 0; k < 4 * blocks; k++) share.sum += sums[k * kColumns];
            remote_write(remote_address(shared_address(&s.shares[rank][column]), i / kColumns),
                         *(uint64_t*)&share);
        }
    }

    // Starts the sums of this warpgroup's half of the width.
    __device__ void multiply_values(float (&sum)[kChunks][kColumns / 2]) const {
        const uint64_t b = matrix_descriptor(shared_address(s.weights), 16, 1024);
        wgmma_fence();
        for (int block = 0; block < blocks; block++) {
            const uint64_t a = matrix_descriptor(
                shared_address(keys) + block * kTileBytes + w * (kTileBytes / 2), kChunk, 1024);
#pragma unroll
            for (int c = 0; c < kChunks; c++)
#pragma unroll
                for (int k = 0; k < kBlock / 16; k++)
                    wgmma<false, true>(sum[c], a + ((c * kChunk + k * 16 * 128) >> 4),
                                    b + ((block * (int)sizeof(s.weights[0]) + k * 32) >> 4),
                                    block + k > 0);
        }
        wgmma_commit();
    }

    // Leaves them in shared memory in place of the keys.
    __device__ void store_sums(const float (&sum)[kChunks][kColumns / 2]) const {
        __syncthreads();  // nobody reads keys any more
        float* part = (float*)keys + w * kHalf + row;
#pragma unroll
        for (int c = 0; c < kChunks; c++)
#pragma unroll
            for (int i = 0; i < kColumns / 2; i++)
                part[(i / 4 * 8 + 2 * t + i % 2) * kPartPitch + 64 * c + i / 2 % 2 * 8] = sum[c][i];
    }

    // Two pairs of a row of o, of which the first is `pair`; every rounding is that of op rope.
    __device__ uint2 turned_back(uint2 pairs, int pair) const {
        auto turned = [&](uint32_t word, int i) {
            const float2 cs = turn(p.positions[token], p.freqs[i], true);
            const float even = low_bf16(word), odd = high_bf16(word);
            return pack_bf16(__fmaf_rn(even, cs.x, -__fmul_rn(odd, cs.y)),
                             __fmaf_rn(even, cs.y, __fmul_rn(odd, cs.x)));
        };
        return {turned(pairs.x, pair), turned(pairs.y, pair + 1)};
    }

    // What each CTA's sums are to be multiplied by, and lse.
    __device__ void weigh_shares() {
        for (int i = thread; i < ranks * kColumns; i += kFewThreads) {
            const int column = i % kColumns;
            Softmax all = {-INFINITY, 0};
#pragma unroll 5
            for (int k = 0; k < ranks; k++) all.most = fmaxf(all.most, s.shares[k][column].most);
#pragma unroll 5
            for (int k = 0; k < ranks; k++)
                all.sum += s.shares[k][column].sum * weight_of(s.shares[k][column].most, all.most);
            const Softmax total = with_sink(all, s.sink[column]);
            s.factor[i / kColumns][column] =
                weight_of(s.shares[i / kColumns][column].most, total.most) / total.sum;
            if (i / kColumns == rank && rank == 0 && head + column < p.heads)
                p.lse[token * p.heads + head + column] = lse_of(total);
        }
    }

    // This CTA's slice of the heads' output, of all shares.
    __device__ void combine() const {
        constexpr int kQuads = kColumns * (kDim / 4);
        for (int quad = kQuads * rank / ranks + thread; quad < kQuads * (rank + 1) / ranks;
             quad += kFewThreads) {
            const int column = quad / (kDim / 4), at = quad % (kDim / 4);
            const uint32_t part =
                shared_address(keys) + (column * kPartPitch + 4 * at) * sizeof(float);
            if (head + column >= p.heads) break;
            float4 result = {};
#pragma unroll 5
            for (int i = 0; i < ranks; i++) {
                const float4 v = remote_load4(remote_address(part, i));
                const float factor = s.factor[i][column];
                result.x += v.x * factor;
                result.y += v.y * factor;
                result.z += v.z * factor;
                result.w += v.w * factor;
            }
            const int64_t out = token * p.heads + head + column;
            uint2 pairs = {pack_bf16(result.x, result.y), pack_bf16(result.z, result.w)};
            if (p.unturned) store8(p.unturned + out * kDim + 4 * at, pairs.x, pairs.y);
            if (p.positions && 4 * at >= kPlain) pairs = turned_back(pairs, (4 * at - kPlain) / 2);
            store8(p.o + out * kDim + 4 * at, pairs.x, pairs.y);
        }
    }
};

// grid (tokens * groups of heads, 1, shares), a cluster along z.
template <int kColumns, bool kPacked>
__global__ void __launch_bounds__(kFewThreads) attention_few_kernel(Problem p) {
    extern __shared__ char memory[];
    char* keys = (shared_address(memory) + 1023) / 1024 * 1024 - shared_address(memory) + memory;
    auto& s = *reinterpret_cast<Few<kColumns>*>(keys + p.per_share * kTileBytes);
    FewHeads<kColumns, kPacked> few(p, s, keys);
    few.init_barriers();
    cluster_arrive_relaxed();
    let_next_start();
    if (!p.beside) wait_for_previous();
    few.gather();
    float logit[kColumns / 2];
    if (few.w < few.blocks) few.multiply_keys(logit);
    else few.wait_for_keys();
    __syncthreads();
    if (few.w < few.blocks) few.weigh(logit);
    __syncthreads();
    cluster_wait();  // all CTAs have started
    float sum[kChunks][kColumns / 2];
    few.multiply_values(sum);
    few.announce();
    wgmma_wait<0>();
    few.store_sums(sum);
    cluster_sync();
    few.weigh_shares();
    __syncthreads();
    few.combine();
    cluster_sync();  // others may still read this CTA's sums
    if (p.beside) wait_for_previous();  // what follows waits for this kernel alone
}

// The sums take the place of the keys, and of q where there is a single block.
template <int kColumns> size_t few_shared(int per_share) {
    static_assert(kColumns * kPartPitch * sizeof(float) <= kTileBytes + sizeof(Few<kColumns>::q));
    return 1024 + per_share * kTileBytes + sizeof(Few<kColumns>);
}

// What a kernel needs before it is launched in clusters of `ranks`.
template <class Kernel> int allow_clusters(Kernel kernel, int ranks, size_t shared) {
    int status = allow_shared(kernel, shared);
    if (!status && ranks > 8)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return status;
}

template <int kColumns, bool kPacked> int launch_few(const Problem& p, int64_t n, void* stream) {
    const size_t shared = few_shared<kColumns>(p.per_share);
    int status = allow_clusters(attention_few_kernel<kColumns, kPacked>, p.shares, shared);
    if (status) return status;
    const int64_t groups = ceil_div(p.heads, kColumns);
    return launch_clusters(p.shares, attention_few_kernel<kColumns, kPacked>,
                           dim3(n * groups, 1, p.shares), dim3(kFewThreads), shared, stream, p);
}

}  // namespace dsv4
