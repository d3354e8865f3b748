// Op compressor: gated pooling of 4 (overlapping) or 128 tokens into one entry, state kept in place.

#include "dispatch.cuh"

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
        weights = weights * shrink + weight;
        sum = sum * shrink + weight * value;
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

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// Pools every window that closes -> pooled [windows, dim], and keeps the open one in the states
// [batch, ratio or 2 * ratio, width]. sequences [batch, 4]: start, length, first row, first window (a
// sequence with one whose window stays open gets a row of zeros); most_windows: of any sequence.
DSV4_EXPORT int dsv4_compressor(const float* kv, const float* score, const float* ape,
                                float* kv_state, float* score_state, const int64_t* sequences,
                                int64_t batch, int64_t ratio, int64_t width, int overlap,
                                int64_t most_windows, float* pooled, void* stream) {
    int64_t dim = overlap ? width / 2 : width;
    Problem p = {kv, score, ape, kv_state, score_state, (const Sequence*)sequences, width, dim,
                 (int)ratio, (bool)overlap, pooled};
    if (most_windows > 65536) return kUnsupported;
    dim3 grid(ceil_div(dim, kThreads), batch, most_windows > 2 ? most_windows - 1 : 1);
    return launch(compressor_kernel, grid, kThreads, 0, stream, p);
}
