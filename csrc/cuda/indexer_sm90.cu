// Op index_score: score every visible compressed entry of a sequence for every token; with the rope of its queries.

#include "indexer_token.cuh"

namespace dsv4 {
namespace {

// ---------------------------------------------------------------- any dtype and width

constexpr int kAnyWarps = 8;

// One warp an entry of one token.
template <class T>
__global__ void __launch_bounds__(32 * kAnyWarps) score_any_kernel(Problem p) {
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32;
    int64_t entry = (int64_t)blockIdx.x * kAnyWarps + threadIdx.x / 32, token = blockIdx.y;
    if (entry >= p.total) return;
    float score = -INFINITY;
    if (entry < p.visible(token)) {
        const T* key = (const T*)p.keys + (p.sequence_of(token) * p.capacity + entry) * p.dim;
        const T* q = (const T*)p.q + token * p.heads * p.dim;
        score = 0;
        for (int h = 0; h < p.heads; h++) {
            float dot = 0;
            for (int i = lane; i < p.dim; i += 32) dot += to_float(q[h * p.dim + i]) * to_float(key[i]);
            score += p.weight(token * p.heads + h) * relu(warp_sum(dot));
        }
    }
    if (lane == 0) p.score[token * p.total + entry] = score;
}

// ---------------------------------------------------------------- bfloat16, 128 wide, many tokens
//
// A warp keeps 32 entries in registers as the left operand and runs through tokens; the heads of a
// token's query, in shared memory, are the columns of the product. Columns are permuted alike in both
// operands, so that all loads are 16 bytes.

constexpr int kMostHeads = 64;
constexpr int kWarps = 8, kEntries = 32 * kWarps;
constexpr int kPitch = 2 * kDim + 64;  // bytes a head of the query; 64 spread the banks

struct Query {
    alignas(16) char q[kMostHeads * kPitch];
    float weight[kMostHeads];
};

// Starts the copy of a token's query; its weights are there after the next barrier.
__device__ void load_query(const Problem& p, int64_t token, Query& to) {
    const bf16* from = (const bf16*)p.q + token * p.heads * kDim;
    for (int i = threadIdx.x; i < p.heads * (kDim / 8); i += blockDim.x)
        copy16(shared_address(to.q) + i / 16 * kPitch + i % 16 * 16, from + i * 8, true);
    if (threadIdx.x < p.heads) to.weight[threadIdx.x] = p.weight(token * p.heads + threadIdx.x);
}

// 32 entries from `first`: [tile][row r or r + 8][columns 32 g + 8 t ...]; zeros past the pool.
struct Entries {
    uint4 at[2][2][kDim / 32];

    __device__ void load(const Problem& p, int64_t sequence, int64_t first) {
        const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int tile = 0; tile < 2; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64_t entry = first + 16 * tile + 8 * half + r;
                const bf16* from = (const bf16*)p.keys + (sequence * p.capacity + entry) * kDim;
#pragma unroll
                for (int g = 0; g < kDim / 32; g++)
                    at[tile][half][g] =
                        entry < p.capacity ? load_once(from + 32 * g + 8 * t) : uint4{};
            }
    }
};

// score[tile][half] += sum over 8 heads of weight * relu(q . entry), this thread's two columns.
__device__ inline void score_heads(const Query& query, const Entries& entries, int head,
                                   float (&score)[2][2]) {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float dot[2][4] = {};
#pragma unroll
    for (int g = 0; g < kDim / 32; g++) {
        uint4 b = *(const uint4*)(query.q + (head + r) * kPitch + 64 * g + 16 * t);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint4 low = entries.at[tile][0][g], high = entries.at[tile][1][g];
            mma(dot[tile], low.x, high.x, low.y, high.y, b.x, b.y);
            mma(dot[tile], low.z, high.z, low.w, high.w, b.z, b.w);
        }
    }
    float2 w = *(const float2*)(query.weight + head + 2 * t);
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            score[tile][half] += w.x * relu(dot[tile][2 * half]) + w.y * relu(dot[tile][2 * half + 1]);
}

// The scores of a warp's entries for one token.
__device__ inline void score_entries(const Problem& p, const Query& query, const Entries& entries,
                                     int64_t token, int64_t first, int64_t visible) {
    const int r = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float score[2][2] = {};
    if (first < visible) {
#pragma unroll 2
        for (int head = 0; head < p.heads; head += 8) score_heads(query, entries, head, score);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float& s = score[i / 2][i % 2];
        s += __shfl_xor_sync(~0u, s, 1);
        s += __shfl_xor_sync(~0u, s, 2);
    }
    // Lane 4 r + t writes entry 8 t + r.
    float mine = t < 2 ? (t == 0 ? score[0][0] : score[0][1]) : t == 2 ? score[1][0] : score[1][1];
    int64_t entry = first + 8 * t + r;
    if (entry < p.total) p.score[token * p.total + entry] = entry < visible ? mine : -INFINITY;
}

// Entries [256 x, ...) for tokens [y * tokens, ...).
__global__ void __launch_bounds__(32 * kWarps, 2) score_kernel(Problem p, int64_t tokens) {
    __shared__ Query query[2];
    let_next_start();
    wait_for_previous();
    const int64_t begin = blockIdx.y * tokens;
    const int64_t end = begin + tokens < p.n ? begin + tokens : p.n;
    const int64_t first = (int64_t)blockIdx.x * kEntries + threadIdx.x / 32 * 32;
    Entries entries;
    int64_t loaded = -1;
    load_query(p, begin, query[0]);
    copy_commit();
    for (int64_t token = begin; token < end; token++) {
        const int64_t visible = p.visible(token), sequence = p.sequence_of(token);
        if (sequence != loaded && first < visible) {
            entries.load(p, sequence, first);
            loaded = sequence;
        }
        if (token + 1 < end) load_query(p, token + 1, query[(token + 1 - begin) % 2]);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        score_entries(p, query[(token - begin) % 2], entries, token, first, visible);
        __syncthreads();  // the query has been read
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// score [n, total] float32 = scale * sum over heads of weights * relu(q . key), -inf where an entry
// j >= (positions[n] + 1) / ratio. q [n, heads, dim], keys [sequences, capacity, dim] of `dtype`,
// weights [n, heads] of `weights_dtype`; token i belongs to sequence[i], or to sequence i where that is
// null. A block takes `tokens` tokens one after another.
DSV4_EXPORT int dsv4_index_score(const void* q, const void* keys, int dtype, const void* weights,
                                 int weights_dtype, const int64_t* sequence,
                                 const int64_t* positions, int64_t ratio, int64_t n, int64_t heads,
                                 int64_t dim, int64_t capacity, int64_t total, float scale,
                                 int64_t tokens, int64_t processors, float* score, void* stream) {
    Problem p = {q, keys, weights, sequence, positions, n, capacity, total, (int)heads, (int)dim,
                 (int)ratio, scale, weights_dtype == DSV4_F32, score, nullptr, 0, nullptr};
    if (total == 0 || n == 0) return cudaSuccess;
    if (total > 1 << 30) return kUnsupported;
    const bool fits = dtype == DSV4_BF16 && dim == kDim;
    if (fits && heads == kHeads && tokens == 1) return score_tokens<false>(p, processors, stream);
    if (fits && heads % 8 == 0 && heads <= kMostHeads) {
        dim3 grid(ceil_div(total, kEntries), ceil_div(n, tokens));
        return launch(score_kernel, grid, 32 * kWarps, 0, stream, p, tokens);
    }
    return with_dtype(dtype, [&](auto tag) {
        dim3 grid(ceil_div(total, kAnyWarps), n);
        return launch(score_any_kernel<type_of<decltype(tag)>>, grid, 32 * kAnyWarps, 0, stream, p);
    });
}

// The same of one token a sequence, with q [n, 64, 128] bfloat16 before its rope by positions and freqs
// [half], half a multiple of 4; turned [n, 64, 128] receives q after it, or is null.
DSV4_EXPORT int dsv4_rope_index_score(const void* q, const float* freqs, int64_t half, void* turned,
                                      const void* keys, const void* weights, int weights_dtype,
                                      const int64_t* positions, int64_t ratio, int64_t n,
                                      int64_t capacity, int64_t total, float scale,
                                      int64_t processors, float* score, void* stream) {
    if (total > 1 << 30 || half % 4 || 2 * half > kDim) return kUnsupported;
    if (total == 0 || n == 0) return cudaSuccess;
    const Problem p = {q, keys, weights, nullptr, positions, n, capacity, total, kHeads, kDim,
                       (int)ratio, scale, weights_dtype == DSV4_F32, score, freqs, (int)half, (bf16*)turned};
    return score_tokens<true>(p, processors, stream);
}
