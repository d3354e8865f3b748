// hc_post, hc_pre and a norm for a few bfloat16 tokens in a decode step: kernels small enough to run beside others.
//
// The kernels before and after read weights and fill the processors. A cluster that needs whole ones waits until
// those are done; these blocks take their places early and have their weights when the streams are there.
// The first kernel mixes the sublayer's output in and multiplies, columns by columns; the second adds up,
// collapses and norms, a block a token. post and comb, which nobody needs before the next sublayer has run,
// are left to a third.
#pragma once

#include "dispatch.cuh"
#include "hopper.cuh"
#include "hyper_math.cuh"

namespace dsv4 {

constexpr int kFewTokens = 8, kFewWidth = 4096;  // tokens at most; d
constexpr int kMixColumns = 64, kMixBlocks = kFewWidth / kMixColumns;  // of every stream, in a block
constexpr int kMixLine = 32;  // floats that a block leaves a token: the mixes, the sum of squares, nothing

struct FewStreams {
    bf16* y;                      // [n, d] to be mixed in
    const float *routed, *shared;  // [n, d] whose sum y is, and becomes; or null
    const bf16* x;                // [n, 4, d]
    const float *post, *comb;     // [n, 4], [n, 4, 4] to mix y in by
    bf16* new_x;               // [n, 4, d] the streams after that
    int n;
    const float* fn;  // [24, 4 * d]
    HyperParameters p;
    float* sums;  // [n, kMixBlocks, kMixLine]
    bf16* u;      // [n, d]
    const void* weight;  // [d] of u's norm
    int weight_dtype;
    float weight_eps;
    bf16* normed;  // [n, d]
};

// ---------------------------------------------------------------- products

// Of 32 values of every lane: lane i gets the sum of all lanes' value i. Halves are exchanged, then quarters, ...
template <int kHalf = 16> __device__ inline float sum_of_lane(float (&value)[32]) {
    if constexpr (kHalf > 0) {
        const bool upper = threadIdx.x & kHalf;
#pragma unroll
        for (int i = 0; i < kHalf; i++) {
            const float sent = upper ? value[i] : value[i + kHalf];
            const float kept = upper ? value[i + kHalf] : value[i];
            value[i] = kept + __shfl_xor_sync(~0u, sent, kHalf);
        }
        sum_of_lane<kHalf / 2>(value);
    }
    return value[0];
}

// Two floats, loaded where this stands: ptxas moves plain loads behind the wait.
__device__ inline float2 load_early(const float* from) {
    float2 v;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from));
    return v;
}

// Two columns of y, made first where it is a sum.
__device__ inline Vector<bf16, 2> sublayer_columns(const FewStreams& in, int at, bool mine) {
    if (in.routed == nullptr) return *(const Vector<bf16, 2>*)(in.y + at);
    const float2 a = *(const float2*)(in.routed + at), b = *(const float2*)(in.shared + at);
    const Vector<bf16, 2> y = {from_float<bf16>(a.x + b.x), from_float<bf16>(a.y + b.y)};
    if (mine) *(Vector<bf16, 2>*)(in.y + at) = y;
    return y;
}

// A warp a stream, two columns a lane. grid (kMixBlocks, tokens side by side).
__global__ void __launch_bounds__(32 * kStreams) mix_kernel(const FewStreams in) {
    using Two = Vector<bf16, 2>;
    __shared__ float parts[kStreams][kMixLine];
    let_next_start();
    const int stream = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = blockIdx.x * kMixColumns + 2 * lane;
    float2 weight[kMixes];
#pragma unroll
    for (int m = 0; m < kMixes; m++)
        weight[m] = load_early(in.fn + (m * kStreams + stream) * kFewWidth + column);
    wait_for_previous();
    for (int token = blockIdx.y; token < in.n; token += gridDim.y) {
        const bf16* x = in.x + token * kStreams * kFewWidth + column;
        Two old[kStreams];
#pragma unroll
        for (int j = 0; j < kStreams; j++) old[j] = *(const Two*)(x + j * kFewWidth);
        const Two y = sublayer_columns(in, token * kFewWidth + column, stream == 0);
        float comb[kCombs], mixed[2];
#pragma unroll
        for (int j = 0; j < kStreams; j++)
            comb[j * kStreams] = in.comb[token * kCombs + j * kStreams + stream];
        expand_streams(y, old, in.post[token * kStreams + stream], comb, mixed);
        const Two mine = {from_float<bf16>(mixed[0]), from_float<bf16>(mixed[1])};
        *(Two*)(in.new_x + (token * kStreams + stream) * kFewWidth + column) = mine;
        const float a = to_float(mine.at[0]), b = to_float(mine.at[1]);
        float value[32] = {};
#pragma unroll
        for (int m = 0; m < kMixes; m++) value[m] = fmaf(a, weight[m].x, b * weight[m].y);
        value[kMixes] = fmaf(a, a, b * b);
        parts[stream][lane] = sum_of_lane(value);
        __syncthreads();
        if (stream == 0) {
            float sum = 0;
#pragma unroll
            for (int j = 0; j < kStreams; j++) sum += parts[j][lane];
            in.sums[(token * kMixBlocks + blockIdx.x) * kMixLine + lane] = sum;
        }
        __syncthreads();
    }
}

// ---------------------------------------------------------------- gates, collapse, norm

constexpr int kTokenWarps = kFewWidth / 256, kTokenThreads = 32 * kTokenWarps;
constexpr int kShare = kMixBlocks / kTokenWarps;  // blocks whose sums a warp adds up

// Eight columns of the streams, weighted with pre.
__device__ inline uint4 collapsed(const uint4 (&streams)[kStreams], const float (&pre)[kStreams]) {
    float value[8] = {};
#pragma unroll
    for (int j = 0; j < kStreams; j++) {
        const uint32_t words[4] = {streams[j].x, streams[j].y, streams[j].z, streams[j].w};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            value[2 * w] += pre[j] * low_bf16(words[w]);
            value[2 * w + 1] += pre[j] * high_bf16(words[w]);
        }
    }
    return {pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]),
            pack_bf16(value[4], value[5]), pack_bf16(value[6], value[7])};
}

// The weights of the norm for eight columns, as they are: of bfloat16 or float32.
struct Gain {
    bool wide;
    uint4 raw[2];

    __device__ Gain(const FewStreams& in, int column) : wide(in.weight_dtype == DSV4_F32), raw{} {
        const char* from = (const char*)in.weight + column * (wide ? 4 : 2);
        raw[0] = load_once(from);
        if (wide) raw[1] = load_once(from + 16);
    }
    // Of columns 2 i and 2 i + 1.
    __device__ float2 pair(int i) const {
        const uint32_t words[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                                   raw[1].x, raw[1].y, raw[1].z, raw[1].w};
        if (wide) return {__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1])};
        return {low_bf16(words[i]), high_bf16(words[i])};
    }
};

// The RMS norm of u, of which every thread has eight columns. Adds up as rms_norm does: 256 columns in a
// warp, then in the order of columns.
__device__ inline void norm_row(const FewStreams& in, bf16* to, const uint4& u, const Gain& gain,
                                float* squares) {
    const uint32_t words[4] = {u.x, u.y, u.z, u.w};
    float own = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        own += low_bf16(words[w]) * low_bf16(words[w]);
        own += high_bf16(words[w]) * high_bf16(words[w]);
    }
    own = warp_sum(own);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = own;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int i = 0; i < kTokenWarps; i++) total += squares[i];
    const float factor = 1 / sqrtf(total / (float)kFewWidth + in.weight_eps);
    uint32_t y[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const float2 by = gain.pair(w);
        y[w] = pack_bf16(low_bf16(words[w]) * factor * by.x, high_bf16(words[w]) * factor * by.y);
    }
    store16(to, y[0], y[1], y[2], y[3]);
}

// What the mixes of a token are gated by: lane m has mix m, of which `sum` is without its factors.
struct Mix {
    float scale = 0, base = 0;

    __device__ explicit Mix(const HyperParameters& p) {
        const int lane = threadIdx.x % 32;
        if (lane >= kMixes) return;
        scale = p.scale[lane < kStreams ? 0 : lane < 2 * kStreams ? 1 : 2];
        base = p.base[lane];
    }
    __device__ float logit(float sum, float norm_eps) const {
        const float square = __shfl_sync(~0u, sum, kMixes);
        const float rho = rsqrtf(square / (float)(kStreams * kFewWidth) + norm_eps);
        return sum * rho * scale + base;
    }
};

// One block a token, 256 columns a warp.
__global__ void __launch_bounds__(kTokenThreads, 2) collapse_token_kernel(const FewStreams in) {
    __shared__ float parts[kTokenWarps][kMixLine], squares[kTokenWarps];
    let_next_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = 8 * threadIdx.x;
    const int64_t token = blockIdx.x;
    const Gain gain(in, column);
    const Mix mix(in.p);
    wait_for_previous();
    const bf16* x = in.new_x + token * kStreams * kFewWidth + column;
    const float* from = in.sums + (token * kMixBlocks + warp * kShare) * kMixLine + lane;
    float part[kShare], some = 0, sum = 0;
    uint4 streams[kStreams];
#pragma unroll
    for (int i = 0; i < kShare; i++) part[i] = from[i * kMixLine];
#pragma unroll
    for (int j = 0; j < kStreams; j++) streams[j] = *(const uint4*)(x + j * kFewWidth);
#pragma unroll
    for (int i = 0; i < kShare; i++) some += part[i];
    parts[warp][lane] = some;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTokenWarps; i++) sum += parts[i][lane];
    const float gate = sigmoid(mix.logit(sum, in.p.norm_eps));
    float pre[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; j++) pre[j] = __shfl_sync(~0u, gate + in.p.eps, j);
    const uint4 u = collapsed(streams, pre);
    store16(in.u + token * kFewWidth + column, u.x, u.y, u.z, u.w);
    norm_row(in, in.normed + token * kFewWidth + column, u, gain, squares);
}

// ---------------------------------------------------------------- post and comb

// One warp a token; the sums are added up as above.
__global__ void __launch_bounds__(32)
    gates_kernel(const float* sums, const HyperParameters p, float* post, float* comb) {
    __shared__ float logits[kMixes];
    const int lane = threadIdx.x;
    const int64_t token = blockIdx.x;
    let_next_start();
    const Mix mix(p);
    wait_for_previous();
    const float* from = sums + token * (kMixBlocks * kMixLine) + lane;
    float part[kMixBlocks], sum = 0;
#pragma unroll
    for (int i = 0; i < kMixBlocks; i++) part[i] = from[i * kMixLine];
#pragma unroll
    for (int warp = 0; warp < kTokenWarps; warp++) {
        float some = 0;
#pragma unroll
        for (int i = 0; i < kShare; i++) some += part[warp * kShare + i];
        sum += some;
    }
    const float logit = mix.logit(sum, p.norm_eps);
    if (lane >= kStreams && lane < 2 * kStreams)
        post[token * kStreams + lane - kStreams] = 2 * sigmoid(logit);
    if (lane < kMixes) logits[lane] = logit;
    __syncwarp();
    if (lane > 0) return;
    float matrix[kStreams][kStreams];
#pragma unroll
    for (int i = 0; i < kCombs; i++) matrix[i / kStreams][i % kStreams] = logits[2 * kStreams + i];
    sinkhorn(matrix, p.iters, p.eps);
#pragma unroll
    for (int i = 0; i < kStreams; i++)
        *(float4*)(comb + token * kCombs + kStreams * i) = {matrix[i][0], matrix[i][1], matrix[i][2],
                                                            matrix[i][3]};
}

// Both kernels but the last; up to kFewTokens tokens.
inline int collapse_few(const FewStreams& in, void* stream) {
    const dim3 grid(kMixBlocks, in.n < 4 ? in.n : 4);
    const int status = launch(mix_kernel, grid, 32 * kStreams, 0, stream, in);
    if (status != cudaSuccess) return status;
    return launch(collapse_token_kernel, dim3(in.n), kTokenThreads, 0, stream, in);
}

}  // namespace dsv4
