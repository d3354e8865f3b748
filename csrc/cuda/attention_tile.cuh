// The products and the softmax of the tensor-core attention, by two warpgroups that alternate.
//
// Warpgroup w has columns 256 w to 256 w + 255 of the output in registers and computes logits and
// weights of the blocks of parity w. In order of blocks, for each of them, it
//   of its own:     waits for full, q k^T, softmax, writes the weights and announces them, 32 keys at a
//                   time, p v from registers, releases its half of the stage;
//   of the other's: waits for the weights, scales as they say, p v from shared memory, releases.
// So the softmax of one runs beside the products of the other. The largest logit passes from block to
// block, so both scale alike, and which thread comes first changes no bit.
#pragma once

#include "attention_gather.cuh"

namespace dsv4 {

// To 2 units in the last place.
__device__ inline float exp2_approximate(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// A reference for the exponents of a row: it follows the largest logit only where that is this much
// larger, in log2 units. Weights of up to 2^8 lose no precision, and the sums need scaling less often.
constexpr float kSlack = 8;
constexpr int kAtOnce = 8;  // loads from another CTA that a thread has under way

// Where thread `thread` of a warpgroup stores its row of four matrices, rows 0-7, 8-15, 0-7, 8-15 of columns
// 0-7, 0-7, 8-15, 8-15 of its warp's part of `tile`, swizzled; the next 16 columns lie 32 bytes on.
__device__ inline uint32_t weights_at(const char* tile, int thread) {
    const int row = thread / 32 * 16 + thread % 16;
    return shared_address(tile) + row * 128 + ((thread % 32 / 16 ^ thread % 8) << 4);
}

// Warpgroup w of the two. Its number is known to the compiler, and so all addresses of matrices.
template <int w, bool kPacked> struct Consumer {
    Shared& s;
    const float scale;  // to log2 units
    const int lane = threadIdx.x % 32, t = lane % 4;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // and row + 8: this thread's heads
    Softmax of[2];      // weights of this warpgroup's blocks, this thread's columns
    float sum[128];     // [2 rows, 32, 2] of the output, unnormalised

    __device__ Consumer(Shared& s, float scale) : s(s), scale(scale) {}

    __device__ void clear() {
        of[0] = of[1] = {-INFINITY, 0};
#pragma unroll
        for (int i = 0; i < 128; i++) sum[i] = 0;
    }
    // From now on the weights are relative to `most`.
    __device__ void scale_to(float low, float high) {
        if (!__any_sync(~0u, low != of[0].most || high != of[1].most)) return;
        const float shrink[2] = {weight_of(of[0].most, low), weight_of(of[1].most, high)};
        of[0] = {low, of[0].sum * shrink[0]};
        of[1] = {high, of[1].sum * shrink[1]};
#pragma unroll
        for (int i = 0; i < 128; i++) sum[i] *= shrink[i / 2 % 2];
    }

    // logit = q k^T for the 64 heads and keys of the own stage; this warpgroup's half of the width first,
    // which is there.
    __device__ void multiply_keys(float (&logit)[32], int phase) const {
        const uint64_t a = matrix_descriptor(shared_address(s.q), 16, 1024);
        const uint64_t b = matrix_descriptor(shared_address(s.keys[w]), 16, 1024);
#pragma unroll
        for (int k = 0; k < kDim / 16; k++) {
            const uint64_t step = ((k / 4 ^ 4 * w) * kChunk + k % 4 * 32) >> 4;
            if (k == kHalf / 16) barrier_wait(&s.full[w][1 - w], phase);
            if (k % (kHalf / 16) == 0) {
                fence_async_proxy();
                wgmma_fence();
            }
            wgmma(logit, a + step, b + step, k > 0);
        }
        wgmma_commit();
    }
    __device__ uint64_t values(int stage) const {
        return matrix_descriptor(shared_address(s.keys[stage]) + w * (kTileBytes / 2), kChunk, 1024);
    }

    // sum += a b for 16 keys: b their values, a their weights, a descriptor or four registers. A kernel of
    // 512 threads has no instruction for so many sums at once.
    template <class... Weights> __device__ void multiply(uint64_t b, Weights... a) {
        if constexpr (kPacked) {
            wgmma<true>(*(float(*)[64])sum, a..., b);
            wgmma<true>(*(float(*)[64])(sum + 64), a..., b + (2 * kChunk >> 4));
        } else {
            wgmma<true>(sum, a..., b);
        }
    }

    // Masks the logits; the largest of a row.
    __device__ void largest(float (&logit)[32], float (&most)[2], uint64_t exists) const {
        if (~exists) {
            const uint64_t mine = exists >> (2 * t);
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (!(mine >> (i / 4 * 8 + i % 2) & 1)) logit[i] = -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float two[8];
#pragma unroll
            for (int j = 0; j < 8; j++) two[j] = fmaxf(logit[4 * j + 2 * i], logit[4 * j + 2 * i + 1]);
#pragma unroll
            for (int width = 4; width > 0; width /= 2)
#pragma unroll
                for (int j = 0; j < width; j++) two[j] = fmaxf(two[j], two[j + width]);
            most[i] = fmaxf(two[0], __shfl_xor_sync(~0u, two[0], 1));
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 2)) * scale;
    }

    // The weights of the first half of a block. They are computed beside the largest logits, relative to
    // those so far, and anew where one of these is far beyond. (A kernel of 512 threads has no registers
    // for that.)
    __device__ void weigh_first(float (&logit)[32], uint32_t (&weight)[16], uint64_t exists) {
        const float before[2] = {of[0].sum, of[1].sum};
        float most[2];
        largest(logit, most, exists);
        if constexpr (!kPacked) {
            weigh(logit, weight, 0);
            weigh(logit, weight, 1);
        }
        if (kPacked ||
            __any_sync(~0u, most[0] > of[0].most + kSlack || most[1] > of[1].most + kSlack)) {
            for (int i = 0; i < 2; i++) {
                of[i].sum = before[i];
                if (!(most[i] > of[i].most + kSlack)) most[i] = of[i].most;
            }
            scale_to(most[0], most[1]);
            weigh(logit, weight, 0);
            weigh(logit, weight, 1);
        }
        if (t < 2) s.most[w][row + 8 * t] = t ? of[1].most : of[0].most;
    }

    // Logits of 16 keys -> weights, as this thread's bfloat16 operands and in shared memory.
    __device__ void weigh(const float (&logit)[32], uint32_t (&weight)[16], int k) {
        const float from[2] = {of[0].most == -INFINITY ? 0 : of[0].most,
                               of[1].most == -INFINITY ? 0 : of[1].most};
        float value[8];
        const uint32_t to = weights_at(s.weights[w], threadIdx.x % 128);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            value[i] = exp2_approximate(fmaf(logit[8 * k + i], scale, -from[i / 2 % 2]));
            of[i / 2 % 2].sum += value[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) weight[4 * k + i] = pack_bf16(value[2 * i], value[2 * i + 1]);
        store_matrices(to ^ (k * 32), weight[4 * k], weight[4 * k + 1], weight[4 * k + 2],
                       weight[4 * k + 3]);
    }

    // The products of a block of the other's are under way: over before those of the next own one.
    __device__ void end_other(bool under_way) {
        if (under_way) barrier_arrive(&s.empty[1 - w][w]);
    }

    // A block of this warpgroup's parity, while the products of the other's before it may be under way.
    __device__ void own_block(int phase, bool last, bool under_way) {
        barrier_wait(&s.full[w][w], phase);
        const uint64_t exists = s.exists[w][w];
        if (exists) {
            float logit[32];
            uint32_t weight[16];
            multiply_keys(logit, phase);
            wgmma_wait<1>();
            end_other(under_way);
            wgmma_wait<0>();
            if (last) barrier_arrive(&s.q_empty);
            const uint64_t b = values(w);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half == 0) {
                    weigh_first(logit, weight, exists);
                } else {
                    weigh(logit, weight, 2);
                    weigh(logit, weight, 3);
                }
                fence_async_proxy();
                barrier_arrive(&s.weighed[w][half]);
                wgmma_fence();
#pragma unroll
                for (int k = 2 * half; k < 2 * half + 2; k++)
                    multiply(b + (k * 16 * 128 >> 4), weight[4 * k], weight[4 * k + 1],
                             weight[4 * k + 2], weight[4 * k + 3]);
                wgmma_commit();
            }
        } else {
            barrier_wait(&s.full[w][1 - w], phase);
            wgmma_wait<0>();
            end_other(under_way);
            if (last) barrier_arrive(&s.q_empty);
            if (t < 2) s.most[w][row + 8 * t] = t ? of[1].most : of[0].most;
            for (int half = 0; half < 2; half++) barrier_arrive(&s.weighed[w][half]);
        }
        wgmma_wait<0>();
        barrier_arrive(&s.empty[w][w]);
    }

    // Starts a block of the other one's.
    __device__ void begin_other(int phase) {
        const int stage = 1 - w;
        barrier_wait(&s.full[stage][w], phase);
        fence_async_proxy();  // for the keys; who writes weights has one of its own
        const uint64_t exists = s.exists[stage][w];
        barrier_wait(&s.weighed[stage][0], phase);
        if (exists) {
            scale_to(s.most[stage][row], s.most[stage][row + 8]);
            const uint64_t a = matrix_descriptor(shared_address(s.weights[stage]), 16, 1024);
            const uint64_t b = values(stage);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (half) barrier_wait(&s.weighed[stage][1], phase);
                wgmma_fence();
#pragma unroll
                for (int k = 2 * half; k < 2 * half + 2; k++)
                    multiply(b + (k * 16 * 128 >> 4), a + (k * 32 >> 4));
            }
            wgmma_commit();
        } else {
            barrier_wait(&s.weighed[stage][1], phase);
        }
    }

    // Afterwards the sums are those of whole rows; `turn` is the number of the work.
    __device__ void finish(int turn) {
        float(&sums)[2][kHeads] = s.sums[turn % 2];
        for (int i = 0; i < 2; i++) {
            of[i].sum += __shfl_xor_sync(~0u, of[i].sum, 1);
            of[i].sum += __shfl_xor_sync(~0u, of[i].sum, 2);
            if (t == i) sums[w][row + 8 * i] = of[i].sum;
        }
        barrier_arrive(&s.summed);
        barrier_wait(&s.summed, turn % 2);
        for (int i = 0; i < 2; i++) of[i].sum = sums[0][row + 8 * i] + sums[1][row + 8 * i];
    }
};

// Normalised output, and lse; 64 columns at a time through this warp's part of the weights.
template <int w, bool kPacked>
__device__ void write_output(const Problem& p, const Work& work, Consumer<w, kPacked>& c,
                             const float (&sink)[2]) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int head = c.row + 8 * i;
        const Softmax total = with_sink(c.of[i], sink[i]);
        factor[i] = weight_of(c.of[i].most, total.most) / total.sum;
        if (head < work.heads && w == 0 && c.t == 0)
            p.lse[(int64_t)work.token * p.heads + work.head + head] = lse_of(total);
    }
    int thread = threadIdx.x % 128;
    asm volatile("" : "+r"(thread));  // so that the addresses are computed anew, not kept in registers
    const int head = thread / 32 * 16 + thread % 32 / 8, unit = thread % 8;
    const uint32_t to_part = weights_at(c.s.weights[w], thread);
    const uint32_t from = shared_address(c.s.weights[w]) + head * 128 + ((unit ^ head % 8) << 4);
    bf16* to = p.o + ((int64_t)work.token * p.heads + work.head + head) * kDim + w * kHalf + 8 * unit;
#pragma unroll
    for (int chunk = 0; chunk < kHalf / 64; chunk++) {
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float* sum = c.sum + 32 * chunk + 8 * k;
            store_matrices(to_part ^ (k * 32), pack_bf16(sum[0] * factor[0], sum[1] * factor[0]),
                           pack_bf16(sum[2] * factor[1], sum[3] * factor[1]),
                           pack_bf16(sum[4] * factor[0], sum[5] * factor[0]),
                           pack_bf16(sum[6] * factor[1], sum[7] * factor[1]));
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 v = shared_load16((from ^ (i % 2 * 64)) + i * 512);
            if (head + 4 * i < work.heads) store16(to + 4 * i * kDim + 64 * chunk, v.x, v.y, v.z, v.w);
        }
    }
}

// Several shares: what the combining kernel needs.
template <int w, bool kPacked>
__device__ void write_part(const Problem& p, const Work& work, const Consumer<w, kPacked>& c) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int head = c.row + 8 * i;
        if (head >= work.heads) continue;
        const int64_t at = ((int64_t)work.token * p.heads + work.head + head) * p.shares + work.share;
        if (w == 0 && c.t == 0) p.part_sums[at] = c.of[i];
        float* to = p.part + at * kDim + w * kHalf + 2 * c.t;
#pragma unroll
        for (int j = 0; j < 32; j++)
            *(float2*)(to + 8 * j) = {c.sum[4 * j + 2 * i], c.sum[4 * j + 2 * i + 1]};
    }
}

// Two shares, a cluster: each CTA leaves its sums in place of keys and q, which nobody reads any more;
// the first two warps of a warpgroup in the first CTA, the others in the second, add them to theirs.
// False for the warps that have nothing more to do.
template <int w, bool kPacked> __device__ bool join(Consumer<w, kPacked>& c) {
    const int thread = c.row / 16 * 32 + c.lane;  // of the warpgroup
    const int rank = cluster_rank();
    const bool adds = thread / 64 == rank;
    float4* sums = (float4*)c.s.keys[w] + thread;  // [32][128]
    float4* softmax = (float4*)c.s.q + threadIdx.x;
    if (!adds) {
#pragma unroll
        for (int i = 0; i < 32; i++)
            sums[128 * i] = {c.sum[4 * i], c.sum[4 * i + 1], c.sum[4 * i + 2], c.sum[4 * i + 3]};
        *softmax = {c.of[0].most, c.of[0].sum, c.of[1].most, c.of[1].sum};
    }
    cluster_sync();
    if (adds) {
        const uint32_t from = remote_address(shared_address(sums), 1 - rank);
        const float4 other = remote_load4(remote_address(shared_address(softmax), 1 - rank));
        const float most[2] = {fmaxf(c.of[0].most, other.x), fmaxf(c.of[1].most, other.z)};
        const float factor[2] = {weight_of(other.x, most[0]), weight_of(other.z, most[1])};
        c.scale_to(most[0], most[1]);
        c.of[0].sum += other.y * factor[0];
        c.of[1].sum += other.w * factor[1];
#pragma unroll
        for (int i = 0; i < 32; i += kAtOnce) {
            float4 v[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; j++) v[j] = remote_load4(from + 128 * 16 * (i + j));
#pragma unroll
            for (int j = 0; j < kAtOnce; j++) {
                float* sum = c.sum + 4 * (i + j);
                sum[0] += v[j].x * factor[0];
                sum[1] += v[j].y * factor[0];
                sum[2] += v[j].z * factor[1];
                sum[3] += v[j].w * factor[1];
            }
        }
    }
    cluster_sync();  // the other CTA may still read this one's sums
    return adds;
}

// Warpgroup w, through all works of this CTA.
template <int w, bool kPacked> __device__ void compute(const Problem& p, Shared& s) {
    Consumer<w, kPacked> c(s, p.scale * kLog2e);
    int g = 0;
    for (int turn = 0; first_work() + turn * works_at_once() < p.works; turn++) {
        int at = first_work() + turn * works_at_once();
        const Work begun(p, at);
        const int end = g + begun.last - begun.first;
        c.clear();
        barrier_wait(&s.q_full, turn % 2);
        if (end - g == 1 && g % kStages != w) barrier_arrive(&s.q_empty);  // it has no block of its own
        while (g < end) {
            const bool under_way = g % kStages != w;
            if (under_way) c.begin_other(g++ / kStages % 2);
            if (g < end) {
                c.own_block(g / kStages % 2, g + kStages >= end, under_way);
                g++;
            } else {
                wgmma_wait<0>();
                c.end_other(under_way);
            }
        }
        asm volatile("" : "+r"(at));  // so that `work` is computed anew, not kept in registers
        const Work work(p, at);
        float sink[2];  // on their way during the exchange
        for (int i = 0; i < 2; i++)
            sink[i] = c.row + 8 * i < work.heads ? p.sink[work.head + c.row + 8 * i] : 0;
        c.finish(turn);
        if (p.part) write_part(p, work, c);
        else if (p.shares == 1 || join(c)) write_output(p, work, c, sink);
    }
}

}  // namespace dsv4
