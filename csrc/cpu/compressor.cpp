// Op compressor: gated pooling of `ratio` tokens into one entry; the open window is kept in state.
//
// Of a sequence's tokens, those of the open window lie in the state and the others in kv and score;
// `Sequence` joins the two, so that the pooling sees one list of rows.

#include "parallel.h"
#include "vec.h"

namespace dsv4 {
namespace {

struct Sizes {
    int64_t ratio, width;
    bool overlap;  // entries pool the previous window's first half of the channels as well

    int64_t slots() const { return overlap ? 2 * ratio : ratio; }
    int64_t channels() const { return overlap ? width / 2 : width; }
};

// Rows of one sequence, counted from the first token of the open window.
struct Sequence {
    Sizes sizes;
    float *state_kv, *state_score;  // [slots, width]
    const float *kv, *score, *ape;  // new rows [length, width], ape [ratio, width]
    int64_t filled, length;         // tokens in the state's open window, new tokens

    float* open(float* state) const {
        return state + (sizes.overlap ? sizes.ratio * sizes.width : 0);
    }
    int64_t windows() const { return (filled + length) / sizes.ratio; }

    const float* kv_row(int64_t token) const {
        return token < filled ? open(state_kv) + token * sizes.width
                              : kv + (token - filled) * sizes.width;
    }
    // Score with ape added; the state's scores have it already.
    f32v score_at(int64_t token, int64_t channel, int64_t count) const {
        int64_t at = token % sizes.ratio * sizes.width + channel;
        if (token < filled) return load_upto(open(state_score) + at, count);
        const float* row = score + (token - filled) * sizes.width;
        return load_upto(row + channel, count) + load_upto(ape + at, count);
    }
};

// One pooled token: its kv and score for W channels from `channel`.
struct Item {
    f32v kv, score;
};

// Slot `slot` of window `window`: with overlap the previous window's tokens come first, from the
// first half of the channels; the window before this step's first one lies in the state.
Item item(const Sequence& s, int64_t window, int64_t slot, int64_t channel, int64_t count) {
    int64_t ratio = s.sizes.ratio, width = s.sizes.width;
    if (s.sizes.overlap && slot < ratio) {
        if (window == 0) {
            int64_t at = slot * width + channel;
            return {load_upto(s.state_kv + at, count), load_upto(s.state_score + at, count)};
        }
        window -= 1;
    } else if (s.sizes.overlap) {
        slot -= ratio;
        channel += width / 2;
    }
    int64_t token = window * ratio + slot;
    return {load_upto(s.kv_row(token) + channel, count), s.score_at(token, channel, count)};
}

// out [channels] = sum over slots of softmax(score) * kv, each channel for itself.
void pool(const Sequence& s, int64_t window, float* out) {
    int64_t channels = s.sizes.channels(), slots = s.sizes.slots();
    for (int64_t c = 0; c < channels; c += W) {
        int64_t count = channels - c;
        f32v top = item(s, window, 0, c, count).score;
        for (int64_t i = 1; i < slots; i++) {
            f32v score = item(s, window, i, c, count).score;
            top = score > top ? score : top;
        }
        f32v total = {}, weighted = {};
        for (int64_t i = 0; i < slots; i++) {
            Item one = item(s, window, i, c, count);
            f32v weight = exp(one.score - top);
            total += weight;
            weighted += weight * one.kv;
        }
        store_upto(out + c, weighted / total, count);
    }
}

// Token `token` of the sequence into state row `slot` (counted from the state's start).
void keep(const Sequence& s, int64_t token, int64_t slot) {
    int64_t width = s.sizes.width;
    float *kv = s.state_kv + slot * width, *score = s.state_score + slot * width;
    std::memmove(kv, s.kv_row(token), width * sizeof(float));
    for (int64_t c = 0; c < width; c += W)
        store_upto(score + c, s.score_at(token, c, width - c), width - c);
}

// The last closed window becomes the previous one, the tokens behind it the open one. Rows are
// read before they are overwritten: the previous window is kept first, and rows that stay open
// go to where they are.
void update_state(const Sequence& s) {
    int64_t ratio = s.sizes.ratio, width = s.sizes.width, windows = s.windows();
    int64_t first_open = s.sizes.overlap ? ratio : 0;
    if (s.sizes.overlap && windows > 0)
        for (int64_t i = 0; i < ratio; i++) keep(s, (windows - 1) * ratio + i, i);
    int64_t rest = s.filled + s.length - windows * ratio;
    for (int64_t i = 0; i < ratio; i++) {
        if (i < rest) {
            keep(s, windows * ratio + i, first_open + i);
            continue;
        }
        int64_t at = (first_open + i) * width;
        for (int64_t c = 0; c < width; c++) {
            s.state_kv[at + c] = 0;
            s.state_score[at + c] = -__builtin_inff();
        }
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// Pools every window that closes -> pooled [m, channels], sequence by sequence, and updates the
// state in place. kv, score [tokens, width]; kv_state, score_state [batch, slots, width]; starts,
// lengths [batch]; ape [ratio, width]; all float32. overlap: slots = 2 * ratio, channels =
// width / 2; else slots = ratio, channels = width.
DSV4_EXPORT int dsv4_compressor(const float* kv, const float* score, float* kv_state,
                                float* score_state, const int64_t* starts, const int64_t* lengths,
                                int64_t batch, int64_t ratio, int64_t width, int overlap,
                                const float* ape, float* pooled, int threads) {
    Sizes sizes = {ratio, width, overlap != 0};
    for (int64_t b = 0; b < batch; b++) {
        int64_t state = b * sizes.slots() * width;
        Sequence s = {sizes, kv_state + state, score_state + state, kv,
                      score, ape, starts[b] % ratio, lengths[b]};
        int64_t windows = s.windows(), channels = sizes.channels();
        int64_t work = windows * width * sizes.slots();
        parallel(threads, windows, work, [&](int64_t first, int64_t last, int) {
            for (int64_t w = first; w < last; w++) pool(s, w, pooled + w * channels);
        });
        update_state(s);
        pooled += windows * channels;
        kv += lengths[b] * width;
        score += lengths[b] * width;
    }
    return DSV4_OK;
}
