// What the kernels of the routed experts share: the problem, its pieces of work, SwiGLU.
//
// A pair is one (token, slot): pair p belongs to token p / k. A piece is up to a fixed number of pairs
// of one expert; pieces are listed on the GPU, so nothing returns to the host.
#pragma once

#include "decode.cuh"

namespace dsv4 {

struct Expert {
    dsv4_weight w1, w2, w3;  // gate [i, d], down [d, i], up [i, d]
};

// Pairs order[first ... first + count) of one expert.
struct Work {
    int expert, first, count;
};

struct Moe {
    const Expert* table;   // [count]
    const int32_t* ids;    // [n * k]; null: every pair goes to expert 0
    const float* routing;  // [n * k]; null: 1
    const bf16* x;         // [n, d]
    bf16* hidden;          // [n * k, inner]
    float* partial;        // [n * k, d]
    float* y;              // [n, d]
    Work* work;            // the pieces, where `order` is not null
    int32_t* pieces;       // how many
    int32_t* order;        // [n * k] pairs by expert; null: pairs in their own order
    float* undo;           // [n * k] of activation rows that are times a power of two
    int64_t n, k, d, inner, count;
    float limit;
    int most;              // pairs of a piece

    __device__ int expert_of(int64_t pair) const {
        int expert = ids == nullptr ? 0 : ids[pair];
        if (expert < 0 || expert >= count) __trap();
        return expert;
    }
    // Without a list there is either one expert for all pairs, or one token.
    __device__ int piece_count() const {
        if (order != nullptr) return *pieces;
        return ids == nullptr ? (int)((n + most - 1) / most) : (int)k;
    }
    __device__ Work work_of(int piece) const {
        if (order != nullptr) return work[piece];
        if (ids != nullptr) return {expert_of(piece), piece, 1};
        int first = piece * most, left = (int)n - first;
        return {0, first, left < most ? left : most};
    }
    __device__ int pair(int i) const { return order == nullptr ? i : order[i]; }
    __device__ const bf16* x_of(int pair) const { return x + pair / (int)k * d; }
    __device__ const bf16* hidden_of(int pair) const { return hidden + pair * inner; }
    __device__ float weight_of(int pair) const { return routing == nullptr ? 1.0f : routing[pair]; }
};

// silu(min(gate, limit)) * clamp(up, -limit, limit) to a few units in the last place; NaN stays NaN.
__device__ inline float swiglu(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return __fdividef(gate, 1 + __expf(-gate)) * up;
}

__device__ inline float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// 4, 8 or 16 bytes to shared memory, past the registers; zeros instead if not valid.
template <int kBytes>
__device__ inline void copy_small(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from),
                 "n"(kBytes), "r"(valid ? kBytes : 0)
                 : "memory");
}

// The items [first, last) of this block, of `total` shared out evenly.
struct Items {
    int first, last;
    __device__ explicit Items(int total)
        : first((int)((int64_t)total * blockIdx.x / gridDim.x)),
          last((int)((int64_t)total * (blockIdx.x + 1) / gridDim.x)) {}
};

// Of one launch. The last: w2 of all experts of the only token.
enum class Product { kHidden, kDown, kDownToken };

// Stages of a ring in shared memory, in the order in which producer and consumers go round.
struct Turn {
    int stage = 0, parity = 0;
    __device__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

}  // namespace dsv4
