// Attention of few tokens: a cluster for each token and 16 or 32 of its heads, a share of the keys a CTA.
//
// A CTA copies its one or two blocks of 64 keys at once. Heads are the columns of both products, so that
// few of them cost little: logits^T [64 keys, heads] = k q^T, and output^T [512, heads] = v^T p^T. Warpgroup
// w computes the logits of block w and half of the output's width. The shares meet in distributed shared
// memory: each CTA leaves its sums in its own, then adds up one slice of all of theirs.
#pragma once

#include "attention_gather.cuh"
#include "rope.cuh"

namespace dsv4 {

constexpr int kFewThreads = 256, kFewBlocks = 2, kMostRanks = 16;
constexpr int kPartPitch = kDim + 4;  // floats; 4 spread the banks

template <int kColumns> struct Few {
    char q[kColumns * kDim * 2];  // 8 chunks of kColumns rows of 128 bytes, swizzled
    char weights[kFewBlocks][kColumns * kBlock * 2];
    float most[kFewBlocks][4][kColumns], sums[kFewBlocks][4][kColumns];  // of each warp's 16 keys
    Softmax shares[kMostRanks][kColumns];                                // from every CTA
    float factor[kMostRanks][kColumns];                                  // of a CTA's sums
    float sink[kColumns];
    alignas(8) uint8_t exists[kFewBlocks][8];                                       // a bit a key
};

// c [64, kColumns] (+)= a [64, 16] b [kColumns, 16]^T, both in shared memory, b with contiguous contracted
// columns; of a, kRows says whether its rows are contiguous instead.
template <int kRows>
__device__ __forceinline__ void multiply_few(float (&c)[8], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, 0;\n"
        "}\n"
        : DSV4_F8(c, 0)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kRows));
}
template <int kRows>
__device__ __forceinline__ void multiply_few(float (&c)[16], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, p, 1, 1, %19, 0;\n"
        "}\n"
        : DSV4_F8(c, 0), DSV4_F8(c, 8)
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kRows));
}

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

    // Copies of q and of all blocks; a warp takes eight keys of a block, lane r % 8 knows that of r.
    __device__ void gather() {
        int index[kFewBlocks];
#pragma unroll
        for (int b = 0; b < kFewBlocks; b++)
            index[b] = b < blocks ? index_of(p, token, first + b, 8 * warp + lane % 8) : -1;
        const float sink = thread < kColumns && head + thread < p.heads ? p.sink[head + thread] : 0;
        const bf16* q = p.q + (token * p.heads + head) * kDim;
#pragma unroll
        for (int i = 0; i < kColumns / 4; i++) {
            const int at = i * 4 + thread / 64, unit = thread % 64;
            const bool exists = head + at < p.heads;
            copy16(shared_address(s.q) + unit / 8 * (kColumns * 128) + at * 128 +
                       ((unit % 8 ^ at % 8) << 4),
                   q + (exists ? at * kDim + unit * 8 : 0), exists);
        }
#pragma unroll
        for (int b = 0; b < kFewBlocks; b++) {
            if (b >= blocks) break;
            const uint32_t exist = __ballot_sync(~0u, index[b] >= 0) & 0xff;
            if (lane == 0) s.exists[b][warp] = exist;
            if constexpr (kPacked) decode_block(b, index[b]);
            else copy_block(b, index[b]);
        }
        copy_commit();
        if (thread < kColumns) s.sink[thread] = sink;
        copy_wait<0>();
        fence_async_proxy();
    }

    __device__ void copy_block(int b, int indices) const {
        const Pool pool = pool_of(p, first + b);
        const uint32_t to = shared_address(keys) + b * kTileBytes;
        int key[8];
#pragma unroll
        for (int r = 0; r < 8; r++) key[r] = checked(pool, __shfl_sync(~0u, indices, r));
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const char* from =
                (const char*)pool.keys + (int64_t)max(key[r], 0) * (2 * kDim) + 16 * lane;
            copy16(to + unit_offset(8 * warp + r, lane), from, key[r] >= 0);
            copy16(to + unit_offset(8 * warp + r, lane + 32), from + kDim, key[r] >= 0);
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

    // Logits of this warpgroup's block, in log2 units, and the largest of each warp and head.
    __device__ void multiply_keys(float (&logit)[kColumns / 2]) {
        const uint64_t a = matrix_descriptor(shared_address(keys) + w * kTileBytes, 16, 1024);
        const uint64_t b = matrix_descriptor(shared_address(s.q), 16, 1024);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDim / 16; k++)
            multiply_few<0>(logit, a + ((k / 4 * kChunk + k % 4 * 32) >> 4),
                            b + ((k / 4 * (kColumns * 128) + k % 4 * 32) >> 4), k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        const uint64_t exists = *(const uint64_t*)s.exists[w];
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) {
            logit[i] *= p.scale * kLog2e;
            if (!(exists >> (row + i / 2 % 2 * 8) & 1)) logit[i] = -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) {
            if (i & 2) continue;
            float most = fmaxf(logit[i], logit[i + 2]);
            for (int offset = 4; offset < 32; offset *= 2)
                most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
            if (lane < 4) s.most[w][warp % 4][i / 4 * 8 + 2 * t + i % 2] = most;
        }
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
#pragma unroll
        for (int i = 0; i < kColumns / 2; i++) {
            if (i & 2) continue;
            const int column = i / 4 * 8 + 2 * t + i % 2;
            const float most = most_of(column), from = most == -INFINITY ? 0 : most;
            float sum = 0;
#pragma unroll
            for (int j = i; j <= i + 2; j += 2) {
                const int key = row + j / 2 % 2 * 8;
                const float weight = exp2f(logit[j] - from);
                sum += weight;
                *(bf16*)(s.weights[w] + column * 128 + ((key / 8 ^ column % 8) << 4) + key % 8 * 2) =
                    __float2bfloat16(weight);
            }
            for (int offset = 4; offset < 32; offset *= 2)
                sum += __shfl_xor_sync(~0u, sum, offset);
            if (lane < 4) s.sums[w][warp % 4][column] = sum;
        }
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

    // Sums of this warpgroup's half of the width, left in shared memory in place of the keys.
    __device__ void multiply_values() {
        constexpr int kChunks = kHalf / 64;
        float sum[kChunks][kColumns / 2];
        const uint64_t b = matrix_descriptor(shared_address(s.weights), 16, 1024);
        wgmma_fence();
        for (int block = 0; block < blocks; block++) {
            const uint64_t a = matrix_descriptor(
                shared_address(keys) + block * kTileBytes + w * (kTileBytes / 2), kChunk, 1024);
#pragma unroll
            for (int c = 0; c < kChunks; c++)
#pragma unroll
                for (int k = 0; k < kBlock / 16; k++)
                    multiply_few<1>(sum[c], a + ((c * kChunk + k * 16 * 128) >> 4),
                                    b + ((block * (int)sizeof(s.weights[0]) + k * 32) >> 4),
                                    block + k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
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
#pragma unroll 1
            for (int k = 0; k < ranks; k++) all.most = fmaxf(all.most, s.shares[k][column].most);
#pragma unroll 1
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
    __device__ void combine() {
        constexpr int kUnits = kColumns * (kDim / 4);
        for (int unit = kUnits * rank / ranks + thread; unit < kUnits * (rank + 1) / ranks;
             unit += kFewThreads) {
            const int column = unit / (kDim / 4), at = unit % (kDim / 4);
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
    cluster_arrive_relaxed();
    let_next_start();
    wait_for_previous();
    few.gather();
    __syncthreads();
    float logit[kColumns / 2];
    if (few.w < few.blocks) few.multiply_keys(logit);
    __syncthreads();
    if (few.w < few.blocks) few.weigh(logit);
    __syncthreads();
    cluster_wait();  // all CTAs have started
    few.announce();
    few.multiply_values();
    cluster_sync();
    few.weigh_shares();
    __syncthreads();
    few.combine();
    cluster_sync();  // others may still read this CTA's sums
}

template <int kColumns, bool kPacked> int launch_few(const Problem& p, int64_t n, void* stream) {
    size_t shared = 1024 + p.per_share * kTileBytes + sizeof(Few<kColumns>);
    const size_t part = 1024 + sizeof(float) * kColumns * kPartPitch;
    if (shared < part) shared = part;
    int status = allow_shared(attention_few_kernel<kColumns, kPacked>, shared);
    if (!status && p.shares > 8)
        status = cudaFuncSetAttribute(attention_few_kernel<kColumns, kPacked>,
                                      cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status) return status;
    const int64_t groups = ceil_div(p.heads, kColumns);
    return launch_clusters(p.shares, attention_few_kernel<kColumns, kPacked>,
                           dim3(n * groups, 1, p.shares), dim3(kFewThreads), shared, stream, p);
}

}  // namespace dsv4
