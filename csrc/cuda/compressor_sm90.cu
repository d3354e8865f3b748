// Op compressor: gated pooling of 4 (overlapping) or 128 tokens into one entry, state kept in place.
//
// A decode step has a kernel of its own, with little code: each of its instructions runs once, so what
// fetching them takes counts. It may go on with the entry's norm, rope and place in the cache.

#include <assert.h>

#include "dispatch.cuh"
#include "norm_rope.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kBatch = 8;  // loads in flight

// What one sequence brings: tokens at `row` of the inputs, whose first position is `start`.
struct Sequence {
    int64_t start, length, row, window;  // window: row of its first entry in the output, -1 for none
};

// Without overlap a window pools its own columns [0, d); with it, columns [0, d) of the window before
// and [d, 2d) of its own.
struct Problem {
    const float *kv, *score, *ape;  // [n, width], [n, width], [ratio, width]
    float *kv_state, *score_state;  // [sequences, slots, width]
    const Sequence* sequences;
    int64_t width, dim;
    int ratio;
    bool overlap;
    float* pooled;  // [windows, dim]
};

// A softmax-weighted mean, one term after another.
struct Mean {
    float most = -INFINITY, weights = 0, sum = 0;

    __device__ void add(float score, float value) {
        if (score == -INFINITY) return;
        float larger = fmaxf(most, score), shrink = expf(most - larger);
        float weight = expf(score - larger);
        most = larger;
        weights = __fmaf_rn(weights, shrink, weight);  // not the compiler's choice: all kernels agree
        sum = __fmaf_rn(sum, shrink, weight * value);
    }
    __device__ float value() const { return sum / weights; }
};

// One column of one sequence. Tokens are counted from the start of the open window.
struct Column {
    const Problem& p;
    const Sequence sequence;
    const int64_t state, column;  // state: offset of slot 0 of this column
    const int filled;             // tokens of the open window from earlier steps

    __device__ Column(const Problem& p, int64_t b, int64_t column)
        : p(p), sequence(p.sequences[b]),
          state(b * (p.overlap ? 2 : 1) * p.ratio * p.width + column), column(column),
          filled(p.sequences[b].start % p.ratio) {}

    __device__ int64_t slot(int i) const {  // of the open window
        return state + ((p.overlap ? p.ratio : 0) + i) * p.width;
    }
    __device__ float2 token(int64_t i) const {  // score with ape, kv
        if (i < filled) return {p.score_state[slot(i)], p.kv_state[slot(i)]};
        int64_t at = (sequence.row + i - filled) * p.width + column;
        return {p.score[at] + p.ape[i % p.ratio * p.width + column], p.kv[at]};
    }
    __device__ float2 before(int i) const {  // of the window before the open one, with overlap
        return {p.score_state[state + i * p.width], p.kv_state[state + i * p.width]};
    }
    // f(i, term(i)) for i of a window, in order; loads come first, as stores in f keep them back.
    template <class T, class F> __device__ void visit(T term, F f) const {
        for (int first = 0; first < p.ratio; first += kBatch) {
            float2 terms[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; i++)
                if (first + i < p.ratio) terms[i] = term(first + i);
#pragma unroll
            for (int i = 0; i < kBatch; i++)
                if (first + i < p.ratio) f(first + i, terms[i]);
        }
    }
    __device__ void add_window(Mean& mean, int64_t window) const {
        visit([&](int i) { return token(window * p.ratio + i); },
              [&](int, float2 term) { mean.add(term.x, term.y); });
    }
    __device__ void add_window_before_first(Mean& mean) const {
        visit([&](int i) { return before(i); },
              [&](int, float2 term) { mean.add(term.x, term.y); });
    }
    __device__ void put(int64_t at, float2 term) const {
        p.score_state[at] = term.x;
        p.kv_state[at] = term.y;
    }
    // What the next step needs: the last closed window (overlap only), and the open one.
    __device__ void keep() const {
        int64_t tokens = filled + sequence.length, closed = tokens / p.ratio;
        if (closed == 0) {
            for (int i = filled; i < tokens; i++) put(slot(i), token(i));
            return;
        }
        if (p.overlap)
            visit([&](int i) { return token((closed - 1) * p.ratio + i); },
                  [&](int i, float2 term) { put(state + i * p.width, term); });
        visit(
            [&](int i) {
                int64_t from = closed * p.ratio + i;
                return from < tokens ? token(from) : float2{-INFINITY, 0};
            },
            [&](int i, float2 term) { put(slot(i), term); });
    }
};

__device__ void pool(const Problem& p, int64_t b, int64_t channel, int64_t window) {
    Column own(p, b, p.overlap ? p.dim + channel : channel), before(p, b, channel);
    Mean mean;
    if (p.overlap && window > 0) before.add_window(mean, window - 1);
    if (p.overlap && window == 0) before.add_window_before_first(mean);
    own.add_window(mean, window);
    p.pooled[(own.sequence.window + window) * p.dim + channel] = mean.value();
}

// One thread a channel. Block z = 0 of a sequence takes the two windows that may need the state, then
// writes it; block z takes window z + 1.
__global__ void __launch_bounds__(kThreads) compressor_kernel(Problem p) {
    let_next_start();
    wait_for_previous();
    int64_t channel = (int64_t)blockIdx.x * kThreads + threadIdx.x, b = blockIdx.y;
    if (channel >= p.dim) return;
    const Sequence sequence = p.sequences[b];
    int64_t windows = (sequence.start % p.ratio + sequence.length) / p.ratio;
    if (blockIdx.z > 0) {
        if (blockIdx.z + 1 < windows) pool(p, b, channel, blockIdx.z + 1);
        return;
    }
    if (windows == 0 && sequence.window >= 0) p.pooled[sequence.window * p.dim + channel] = 0;
    for (int64_t window = 0; window < 2 && window < windows; window++) pool(p, b, channel, window);
    Column(p, b, channel).keep();
    if (p.overlap) Column(p, b, p.dim + channel).keep();
}

// ---------------------------------------------------------------- one token a sequence

constexpr int kOverlapRatio = 4;
constexpr int kMostBlocks = 4;  // of a cluster: its first one has 8 channels a thread in the end

// What follows the pooling of a window: norm, rope and its row of the cache.
template <class W> struct Finish {
    NormRope<W> how;
    const int64_t *positions, *slots;  // [windows]; slots: rows of y
    int64_t count;                     // rows of y
    bf16* y;
    int64_t stride;
    // [windows, dim] or null, all of them: what the norm and the rope return, rows of zeros for windows that
    // stay open; p.pooled then what op compressor does.
    bf16 *normed, *turned;
};

// The state of one sequence and what its token adds.
template <bool kOverlap> struct Token {
    const Problem& p;
    float *score_state, *kv_state;  // slot 0
    int64_t row;
    int ratio, filled;

    __device__ Token(const Problem& p, const Sequence& sequence, int64_t b)
        : p(p), row(sequence.row * p.width), ratio(kOverlap ? kOverlapRatio : p.ratio),
          filled((int)(sequence.start % ratio)) {
        const int64_t state = b * (kOverlap ? 2 : 1) * ratio * p.width;
        score_state = p.score_state + state;
        kv_state = p.kv_state + state;
    }
    __device__ float2 token(int64_t column) const {
        return {p.score[row + column] + p.ape[filled * p.width + column], p.kv[row + column]};
    }
    __device__ float2 get(int slot, int64_t column) const {
        return {score_state[slot * p.width + column], kv_state[slot * p.width + column]};
    }
    __device__ void put(int slot, int64_t column, float2 term) const {
        score_state[slot * p.width + column] = term.x;
        kv_state[slot * p.width + column] = term.y;
    }
    __device__ int open(int i) const { return kOverlap ? ratio + i : i; }  // slot of the open window
    __device__ bool closes() const { return filled + 1 == ratio; }

    // The window stays open.
    __device__ void keep(int64_t channel) const {
        put(open(filled), channel, token(channel));
        if (kOverlap) put(open(filled), p.dim + channel, token(p.dim + channel));
    }
    // The window closes: its entry, and the state of the next one.
    __device__ float close(int64_t channel) const {
        constexpr int kTerms = kOverlap ? kOverlapRatio : 16;  // loads in flight
        const int64_t own = kOverlap ? p.dim + channel : channel;
        const float2 last = token(own), other_last = kOverlap ? token(channel) : last;
        float2 before[kTerms], other[kTerms];
#pragma unroll
        for (int i = 0; kOverlap && i < kTerms; i++) {
            before[i] = get(i, channel);
            other[i] = i + 1 < ratio ? get(open(i), channel) : other_last;
        }
        // The next terms are on their way while these are added.
        float2 terms[kTerms], next[kTerms];
        auto load = [&](int first, float2(&to)[kTerms]) {
#pragma unroll
            for (int i = 0; i < kTerms; i++)
                if (first + i < ratio)
                    to[i] = first + i + 1 < ratio ? get(open(first + i), own) : last;
        };
        Mean mean;
        load(0, terms);
#pragma unroll 1
        for (int first = 0; first < ratio; first += kTerms) {
            if constexpr (!kOverlap) load(first + kTerms, next);
#pragma unroll
            for (int i = 0; kOverlap && i < kTerms; i++) mean.add(before[i].x, before[i].y);
#pragma unroll
            for (int i = 0; i < kTerms; i++) {
                if (first + i >= ratio) break;
                mean.add(terms[i].x, terms[i].y);
                if (kOverlap) put(first + i, own, terms[i]);
                if (kOverlap) put(first + i, channel, other[i]);
                put(open(first + i), own, {-INFINITY, 0});
                if (kOverlap) put(open(first + i), channel, {-INFINITY, 0});
                if (!kOverlap) terms[i] = next[i];
            }
        }
        return mean.value();
    }
};

// One thread a channel, a block of kThreads channels; those of a sequence form a cluster, whose first one
// finishes the entry, if that is wanted.
template <bool kOverlap, bool kFinish, class W>
__global__ void __launch_bounds__(kThreads) token_kernel(const Problem p, const Finish<W> finish) {
    __shared__ float entry[kThreads], partial[kThreads / 32];
    let_next_start();
    wait_for_previous();
    const int64_t b = blockIdx.y, channel = (int64_t)blockIdx.z * kThreads + threadIdx.x;
    const Sequence sequence = p.sequences[b];
    const Token<kOverlap> token(p, sequence, b);
    float pooled = 0;
    if (channel < p.dim) {
        if (token.closes()) pooled = token.close(channel);
        else token.keep(channel);
    }
    if (p.pooled && channel < p.dim && sequence.window >= 0)
        p.pooled[sequence.window * p.dim + channel] = pooled;
    if constexpr (!kFinish) return;
    const int64_t to = finish.slots[sequence.window];
    if (!token.closes() && !p.pooled) return;  // all blocks of the cluster
    assert(to < finish.count && "cache_write: a slot is past the end of the cache");
    entry[threadIdx.x] = pooled;
    const bool alone = gridDim.z == 1;
    if (alone) __syncthreads();
    else cluster_barrier();
    if (blockIdx.z == 0) {
        const int first = threadIdx.x * Vector<bf16>::kSize;
        Vector<bf16> v;
        if (first < p.dim)
#pragma unroll
            for (int j = 0; j < Vector<bf16>::kSize; j++) {
                const float* at = &entry[first % kThreads + j];
                v.at[j] = from_float<bf16>(alone ? *at : load_from_block(at, first / kThreads));
            }
        bf16* y = to < 0 ? nullptr : finish.y + to * finish.stride;
        bf16* normed = p.pooled ? finish.normed + sequence.window * p.dim : nullptr;
        bf16* turned = p.pooled ? finish.turned + sequence.window * p.dim : nullptr;
        norm_rope_row<kThreads>(finish.how, v, finish.positions[sequence.window], y, partial, normed, turned);
    }
    if (!alone) cluster_barrier();  // the channels are read before their block ends
}

template <bool kFinish, class W>
int one_token(const Problem& p, const Finish<W>& finish, int64_t batch, void* stream) {
    const int64_t blocks = ceil_div(p.dim, kThreads);
    auto kernel = p.overlap ? token_kernel<true, kFinish, W> : token_kernel<false, kFinish, W>;
    return launch_clusters(kFinish ? (int)blocks : 1, kernel, dim3(1, batch, blocks), kThreads, 0,
                           stream, p, finish);
}

// Whether the kernels for one token take these windows.
bool takes_one_token(int64_t ratio, bool overlap) { return !overlap || ratio == kOverlapRatio; }

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// Pools every window that closes -> pooled [windows, dim], and keeps the open one in the states
// [batch, ratio or 2 * ratio, width]. sequences [batch, 4]: start, length, first row, first window (a
// sequence with one whose window stays open gets a row of zeros); most_windows: of any sequence;
// single: every length is 1.
DSV4_EXPORT int dsv4_compressor(const float* kv, const float* score, const float* ape,
                                float* kv_state, float* score_state, const int64_t* sequences,
                                int64_t batch, int64_t ratio, int64_t width, int overlap,
                                int64_t most_windows, int single, float* pooled, void* stream) {
    int64_t dim = overlap ? width / 2 : width;
    Problem p = {kv, score, ape, kv_state, score_state, (const Sequence*)sequences, width, dim,
                 (int)ratio, (bool)overlap, pooled};
    if (most_windows > 65536) return kUnsupported;
    if (single && takes_one_token(ratio, overlap))
        return one_token<false>(p, Finish<float>{}, batch, stream);
    dim3 grid(ceil_div(dim, kThreads), batch, most_windows > 2 ? most_windows - 1 : 1);
    return launch(compressor_kernel, grid, kThreads, 0, stream, p);
}

// One token a sequence, every sequence with a window: each that closes is pooled, rounded to bfloat16,
// multiplied by its norm and `weight` [dim], rotated at positions[window] by freqs [half], and written to
// y [count, dim] with a row stride, row slots[window] (negative: nowhere). Unless null, all three get what
// the ops return one by one, zeros for windows that stay open: pooled [batch, dim], normed and turned.
DSV4_EXPORT int dsv4_compressed_entry(const float* kv, const float* score, const float* ape,
                                      float* kv_state, float* score_state,
                                      const int64_t* sequences, int64_t batch, int64_t ratio,
                                      int64_t width, int overlap, const void* weight,
                                      int weight_dtype, float eps, const int64_t* positions,
                                      const float* freqs, int64_t half, const int64_t* slots,
                                      int64_t count, void* y, int64_t stride, float* pooled,
                                      void* normed, void* turned, void* stream) {
    constexpr int V = Vector<bf16>::kSize;
    const int64_t dim = overlap ? width / 2 : width;
    if (!takes_one_token(ratio, overlap) || dim % V || dim > kMostBlocks * kThreads ||
        2 * half % V || 2 * half > dim || stride % V)
        return kUnsupported;
    Problem p = {kv, score, ape, kv_state, score_state, (const Sequence*)sequences, width, dim,
                 (int)ratio, (bool)overlap, pooled};
    return with_dtype(weight_dtype, [&](auto tag) {
        using W = type_of<decltype(tag)>;
        NormRope<W> how = {(int)dim, (int)half, eps, (const W*)weight, freqs};
        Finish<W> finish = {how, positions, slots, count, (bf16*)y, stride, (bf16*)normed, (bf16*)turned};
        return one_token<true>(p, finish, batch, stream);
    });
}
