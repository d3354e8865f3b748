// One warp multiplies 16 weight rows, streamed from memory once, with up to 8 * NT activation rows.
//
// Loads of weights run kDepth steps ahead of the products; a step is one chunk (16 bytes) a thread
// and row. Activations come from L1 or L2; the other warps hide that.
#pragma once

#include <type_traits>

#include "decode.cuh"

namespace dsv4 {

// The place of a thread in its warp's tile, as mma.m16n8k16 wants it.
struct Lane {
    int group, member;  // group: weight row (and row + 8), activation row; member: chunk of a step
    __device__ Lane() : group(threadIdx.x % 32 / 4), member(threadIdx.x % 4) {}
};

// The next steps of a warp's 16 weight rows, kDepth of them in registers or on their way there.
template <class Policy, int kDepth> struct Weights {
    uint4 codes[kDepth][2];
    typename Policy::Scale scales[kDepth][2];
    const char* data[2];  // at the step that the loop has come to
    decltype(Policy::scale_row(dsv4_weight{}, 0)) scale[2];
    int chunks, last;
    Lane lane;

    // Rows [first_row, first_row + 16), clamped to the matrix; steps [first, last).
    __device__ Weights(const dsv4_weight& w, int64_t first_row, int first, int last)
        : chunks(w.k / Policy::kChunk), last(last) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int64_t row = first_row + lane.group + 8 * h;
            if (row >= w.n) row = w.n - 1;
            data[h] = (const char*)w.data + (row * chunks + first * 4 + lane.member) * 16;
            scale[h] = Policy::scale_row(w, row);
        }
#pragma unroll
        for (int d = 0; d < kDepth; d++) fetch(d, first + d, d);
    }

    // Load `step`, which is `ahead` steps from where `data` points.
    __device__ void fetch(int slot, int step, int ahead) {
        int chunk = step * 4 + lane.member;
        bool valid = step < last && chunk < chunks;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            codes[slot][h] = valid ? load_stream(data[h] + ahead * 64) : make_uint4(0, 0, 0, 0);
            // A block's scale belongs to sums, of which every member of the quad has some.
            scales[slot][h] = step < last && (valid || Policy::kBlockScale)
                                  ? Policy::load_scale(scale[h], valid ? chunk : step * 4)
                                  : typename Policy::Scale{};
        }
    }

    // body(slot, step) for every step from `first` on, with the loads of later ones under way.
    template <class Body> __device__ void for_each_step(int first, Body body) {
#pragma unroll 1
        for (int base = first; base < last; base += kDepth) {
#pragma unroll
            for (int d = 0; d < kDepth; d++) {
                if (base + d >= last) break;
                body(d, base + d);
                fetch(d, base + d + kDepth, d + kDepth);
            }
            data[0] += 64 * kDepth;
            data[1] += 64 * kDepth;
        }
    }
};

// Steps of a row of k columns.
template <class Policy> __host__ __device__ inline int steps_of(int64_t k) {
    return (k / Policy::kChunk + 3) / 4;
}

template <class Policy, int NT>
struct Stream : Weights<Policy, NT == 1 ? Policy::kDepth : Policy::kDepth - 1> {
    using Base = Weights<Policy, NT == 1 ? Policy::kDepth : Policy::kDepth - 1>;
    using Base::Base, Base::chunks, Base::codes, Base::lane, Base::last, Base::scales;

    // Activations of one chunk, in the order of its columns: two halves.
    static constexpr int kHalf = Policy::kChunk / 2;
    using Vector = std::conditional_t<kHalf == 4, uint2, uint4>;
    static constexpr int kVectors = kHalf * 2 / sizeof(Vector);
    struct X {
        Vector half[NT][2][kVectors];
    };

    // Activation rows x[t] (null: zeros) of this thread's group, at its chunk of `step`.
    __device__ void fetch_x(X& out, const bf16* const (&x)[NT], int step) const {
        int chunk = step * 4 + lane.member;
        bool valid = step < last && chunk < chunks;
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
            for (int v = 0; v < 2 * kVectors; v++)
                out.half[t][v / kVectors][v % kVectors] =
                    valid && x[t] != nullptr
                        ? ((const Vector*)(x[t] + chunk * (int64_t)Policy::kChunk))[v]
                        : Vector{};
    }

    // sum[t] += rows of W times activation rows 8 t ..., over the steps from `first` on.
    // Element 0, 1 of sum[t]: weight row lane.group, activation rows 2 * lane.member, + 1;
    // element 2, 3: weight row lane.group + 8. Without the policy's factor and the global scale.
    __device__ void run(const bf16* const (&x)[NT], int first, float (&sum)[NT][4]) {
        this->for_each_step(first, [&](int slot, int at) {
            X now;
            fetch_x(now, x, at);
            step(slot, now, sum);
        });
    }

    __device__ void step(int slot, const X& x, float (&sum)[NT][4]) const {
        float part[NT][4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t a[2][Policy::kProducts][2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint4& v = codes[slot][h];
                Policy::operand(half == 0 ? make_uint2(v.x, v.y) : make_uint2(v.z, v.w),
                                scales[slot][h], half, a[h]);
            }
#pragma unroll
            for (int t = 0; t < NT; t++) {
                uint32_t b[Policy::kProducts][2];
                Policy::column(x.half[t][half], b);
#pragma unroll
                for (int j = 0; j < Policy::kProducts; j++)
                    mma(Policy::kBlockScale ? part[t] : sum[t], a[0][j][0], a[1][j][0], a[0][j][1],
                        a[1][j][1], b[j][0], b[j][1]);
            }
        }
        if constexpr (Policy::kBlockScale)
#pragma unroll
            for (int i = 0; i < 4 * NT; i++)
                sum[i / 4][i % 4] += part[i / 4][i % 4] * scales[slot][i % 4 / 2];
    }
};

}  // namespace dsv4
