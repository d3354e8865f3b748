// Op gate: scores sqrt(softplus(x W^T)), the best k experts or those of a token's id, their weights.
//
// Of bfloat16, up to some hundred tokens: every block multiplies 64 experts by 128 columns, so that all of
// the matrix is on its way at once, and before the kernel ahead has ended. The second kernel adds up the
// partial sums and chooses. Else: a matrix product (op linear), then the second kernel.

#include <assert.h>

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {
namespace {

// ---------------------------------------------------------------- the product

constexpr int kProductWarps = 4;           // of 16 experts each
constexpr int kColumns = 128;              // of a block
constexpr int kLoads = kColumns / 32;      // 16 bytes each, of a row of the matrix in a thread
constexpr int kPitch = 2 * kColumns + 64;  // bytes a token in shared memory; 64 spread the banks
constexpr int kMostTiles = 8;              // of eight tokens, in a block

struct Product {
    const bf16 *x, *weight;  // [n, d], [count, d]
    int n, d, count;
    float* sums;  // [ceil(d / kColumns), n, count]
};

// Columns of x and weight are permuted alike, so that every thread loads 16 bytes at a time.
template <int Tiles>
__global__ void __launch_bounds__(32 * kProductWarps) gate_sums_kernel(const Product p) {
    __shared__ alignas(16) char x[8 * Tiles * kPitch];
    let_next_start();
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first = (blockIdx.x * kProductWarps + threadIdx.x / 32) * 16;  // expert
    const int token0 = blockIdx.z * 8 * Tiles, column = blockIdx.y * kColumns;
    uint4 low[kLoads] = {}, high[kLoads] = {};
#pragma unroll
    for (int g = 0; g < kLoads; g++) {
        const int at = column + 32 * g + 8 * t, expert = first + r;
        const bf16* row = p.weight + expert * (int64_t)p.d + at;
        // Not ld.global.nc, which ptxas moves behind the wait.
        if (at < p.d && expert < p.count) low[g] = load_once(row);
        if (at < p.d && expert + 8 < p.count) high[g] = load_once(row + 8 * (int64_t)p.d);
    }
    wait_for_previous();
#pragma unroll
    for (int j = 0; j < Tiles; j++) {  // 128 threads, eight tokens of 16 times 16 bytes
        const int line = 8 * j + threadIdx.x / 16, at = threadIdx.x % 16 * 8, token = token0 + line;
        const bool valid = token < p.n && column + at < p.d;
        const bf16* from = p.x + token * (int64_t)p.d + column + at;
        copy16(shared_address(x + line * kPitch + 2 * at), valid ? from : p.x, valid);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    float sum[Tiles][4] = {};
#pragma unroll
    for (int g = 0; g < kLoads; g++)
#pragma unroll
        for (int tile = 0; tile < Tiles; tile++) {
            const uint4 a = low[g], b = high[g];
            const uint4 c = *(const uint4*)(x + (8 * tile + r) * kPitch + 64 * g + 16 * t);
            mma(sum[tile], a.x, b.x, a.y, b.y, c.x, c.y);
            mma(sum[tile], a.z, b.z, a.w, b.w, c.z, c.w);
        }
#pragma unroll
    for (int tile = 0; tile < Tiles; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int expert = first + r + i / 2 * 8, token = token0 + 8 * tile + 2 * t + i % 2;
            if (expert < p.count && token < p.n)
                p.sums[(blockIdx.y * (int64_t)p.n + token) * p.count + expert] = sum[tile][i];
        }
}

template <int Tiles> int gate_sums(const Product& p, void* stream) {
    dim3 grid(ceil_div(p.count, 16 * kProductWarps), ceil_div(p.d, kColumns), ceil_div(p.n, 8 * Tiles));
    return launch(gate_sums_kernel<Tiles>, grid, 32 * kProductWarps, 0, stream, p);
}

// ---------------------------------------------------------------- the choice

constexpr int kThreads = 256;
constexpr int kMostChosen = 32;
constexpr int kFewTokens = 8;

// How experts are chosen, and where to.
struct Choice {
    const float* bias;    // [count] or null
    const void* tid2eid;  // [vocabulary, k] int32 or int64, or null
    int tid2eid_bytes;
    int64_t vocabulary;
    const int64_t* tokens;
    int k;
    float scale;
    float* routing;   // [n, k]
    int32_t* chosen;  // [n, k]
};

// log(1 + e^x), and x itself where float32 cannot tell them apart, as torch does.
__device__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

// A number whose order as an unsigned integer is the float's order; NaN comes last, as the largest; none is 0.
__device__ uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return isnan(x) ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One warp: the k experts of the highest ranks, best first, the lowest of equal ones.
template <int kEach> __device__ void choose_best(const uint32_t* rank, int k, int* slot) {
    const int lane = threadIdx.x;
    uint32_t left[kEach];  // of experts lane * kEach + j
#pragma unroll
    for (int j = 0; j < kEach; j++) left[j] = rank[lane * kEach + j];
    for (int i = 0; i < k; i++) {
        uint32_t best = left[0];
#pragma unroll
        for (int j = 1; j < kEach; j++) best = max(best, left[j]);
        const uint32_t top = __reduce_max_sync(~0u, best);
        if (lane != __ffs(__ballot_sync(~0u, best == top)) - 1) continue;
        int at = 0;
#pragma unroll
        for (int j = kEach - 1; j >= 0; j--)
            if (left[j] == top) at = j;
#pragma unroll
        for (int j = 0; j < kEach; j++)
            if (j == at) left[j] = 0;
        slot[i] = lane * kEach + at;
    }
}

__device__ int expert_of_token(const Choice& to, int64_t token, int slot, int count) {
    assert(token >= 0 && token < to.vocabulary && "gate: a token id is outside tid2eid");
    const int64_t at = token * to.k + slot;
    const int64_t expert =
        to.tid2eid_bytes == 8 ? ((const int64_t*)to.tid2eid)[at] : ((const int32_t*)to.tid2eid)[at];
    assert(expert >= 0 && expert < count && "gate: tid2eid names no expert");
    return (int)expert;
}

// One block a token. sums [parts, n, count] add up to x W^T; scores [n, count] may be the same memory if
// there is one part. kEach: experts that a lane of the first warp looks at; kAtOnce: sums of one that are on
// their way together.
template <int kEach, int kAtOnce>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(const float* sums, int parts, float* scores, int count, const Choice to) {
    __shared__ float plain[32 * kEach];
    __shared__ alignas(16) uint32_t rank[32 * kEach];
    __shared__ int slot[kMostChosen];
    let_next_start();
    const int64_t row = blockIdx.x, n = gridDim.x;
    wait_for_previous();
    const int64_t token = to.tid2eid == nullptr ? 0 : to.tokens[row];
    for (int e = threadIdx.x; e < 32 * kEach; e += kThreads) {
        const bool valid = e < count;
        const float bias = valid && to.bias != nullptr ? to.bias[e] : 0;  // with the sums, not behind a store
        float sum = 0;
        if (valid) {
#pragma unroll kAtOnce
            for (int part = 0; part < parts; part++) sum += sums[(part * n + row) * count + e];
        }
        const float score = valid ? sqrtf(softplus(sum)) : 0;
        if (valid) scores[row * count + e] = score;
        plain[e] = score;
        rank[e] = valid ? ordered(score + bias) : 0;
    }
    __syncthreads();
    const int lane = threadIdx.x;
    if (lane >= 32) return;
    if (to.tid2eid == nullptr) choose_best<kEach>(rank, to.k, slot);
    else if (lane < to.k) slot[lane] = expert_of_token(to, token, lane, count);
    __syncwarp();
    float sum = 0;
    for (int i = 0; i < to.k; i++) sum += plain[slot[i]];
    if (lane >= to.k) return;
    to.routing[row * to.k + lane] = plain[slot[lane]] / sum * to.scale;
    to.chosen[row * to.k + lane] = slot[lane];
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// sums [ceil(d / 128), n, count] float32 that add up to x W^T, of x [n, d] and weight [count, d] bfloat16,
// both at multiples of 16 bytes; d a multiple of 8.
DSV4_EXPORT int dsv4_gate_sums(const void* x, int64_t n, int64_t d, const void* weight, int64_t count,
                               float* sums, void* stream) {
    if (d % 8 || n > 1 << 20 || d > 1 << 20 || count > 1024) return kUnsupported;
    const Product p = {(const bf16*)x, (const bf16*)weight, (int)n, (int)d, (int)count, sums};
    auto run = n <= 8    ? gate_sums<1>
               : n <= 16 ? gate_sums<2>
               : n <= 32 ? gate_sums<4>
                         : gate_sums<kMostTiles>;
    return run(p, stream);
}

// sums [parts, n, count] float32 in, scores [n, count] out, which may be the same if there is one part; bias
// [count] or null; tid2eid [vocabulary, k] int32 or int64 (tid2eid_bytes an element) with tokens [n], or
// null; routing, chosen [n, k].
DSV4_EXPORT int dsv4_gate(const float* sums, int64_t parts, float* scores, int64_t n, int64_t count,
                          const float* bias, const void* tid2eid, int tid2eid_bytes,
                          int64_t vocabulary, const int64_t* tokens, int64_t k, float scale,
                          float* routing, int32_t* chosen, void* stream) {
    if (count > 1024 || k > kMostChosen || k > count) return kUnsupported;
    const Choice to = {bias, tid2eid, tid2eid_bytes, vocabulary, tokens, (int)k, scale, routing, chosen};
    // Of a few tokens there are processors enough for many registers.
    auto kernel = count > 512 ? gate_kernel<32, 16> : count > 256 ? gate_kernel<16, 16>
                  : n > kFewTokens ? gate_kernel<8, 16> : gate_kernel<8, 32>;
    return launch(kernel, dim3(n), kThreads, 0, stream, sums, (int)parts, scores, (int)count, to);
}
