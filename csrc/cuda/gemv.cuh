// One to four activation rows: fewer instructions a weight than stream.cuh, so that the stream from
// memory and not the decoding sets the pace.
//
// The activations are held in shared memory as fp16, each row times a power of two that brings its
// largest element near 2^14: bf16's eight bits stay exact down to 2^-31 of the largest, and what is
// smaller is off by no more than 2^-39 of it. In fp16 an e2m1 code is one byte (e5m2, times 2^-14)
// and e4m3 converts in one instruction. A block of NVFP4 is not multiplied by its scale: with one
// activation row, seven of the eight columns of the second operand are free, so each of the eight
// blocks of a step gets a column to itself, and its scale multiplies the sum.
#pragma once

#include "halves.cuh"

namespace dsv4 {

// Activation rows in shared memory, columns [0, 8 * vectors): zeros behind the last one.
struct HalfRows {
    uint4* at;       // [rows][vectors]
    uint4* zero;     // two vectors of zeros
    uint32_t* peak;  // [rows] bits of the largest finite magnitude
    int vectors;

    __host__ __device__ static size_t bytes(int rows, int vectors) {
        return (rows * vectors + 2) * sizeof(uint4) + rows * sizeof(uint32_t);
    }
    __device__ HalfRows(void* memory, int rows, int vectors)
        : at((uint4*)memory), zero(at + rows * vectors), peak((uint32_t*)(at + rows * vectors + 2)),
          vectors(vectors) {}

    __device__ int exponent(int row) const { return RowScale::exponent_of(peak[row]); }
    __device__ float restore(float x, int row) const { return RowScale::undo(x, exponent(row)); }
};

// Fill `to` from bf16 rows row_of(0 ... rows - 1) (null: zeros) of `columns` elements, a multiple of
// eight. All threads of the block, with a barrier at the end; the rows are read twice.
template <bool kPermuted, class RowOf>
__device__ void stage_rows(const HalfRows& to, int rows, int columns, RowOf row_of) {
    if (threadIdx.x < rows) to.peak[threadIdx.x] = 0;
    if (threadIdx.x < 2) to.zero[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    int present = columns / 8 < to.vectors ? columns / 8 : to.vectors;
    for (int r = 0; r < rows; r++) {
        const bf16* row = row_of(r);
        uint32_t most = 0;
        if (row != nullptr)
#pragma unroll 4
            for (int v = threadIdx.x; v < present; v += blockDim.x)
                most = max(most, largest_of(*(const uint4*)(row + v * 8)));
        most = __reduce_max_sync(~0u, most);
        if (threadIdx.x % 32 == 0) atomicMax(&to.peak[r], most);
    }
    __syncthreads();
    for (int r = 0; r < rows; r++) {
        const bf16* row = row_of(r);
        int exponent = to.exponent(r);
#pragma unroll 4
        for (int v = threadIdx.x; v < to.vectors; v += blockDim.x) {
            bool there = row != nullptr && v < present;
            uint4 x = there ? *(const uint4*)(row + v * 8) : make_uint4(0, 0, 0, 0);
            to.at[r * to.vectors + v] = to_halves<kPermuted>(x, exponent);
        }
    }
    __syncthreads();
}

// ---------------------------------------------------------------- products

// One warp: 16 weight rows times T staged activation rows.
template <class Policy, int T> struct Gemv : Weights<Policy, T == 1 ? 4 : 3> {
    using Base = Weights<Policy, T == 1 ? 4 : 3>;
    using Base::Base, Base::codes, Base::lane, Base::scales;
    using Format = Half<Policy>;

    static constexpr int kVectors = Policy::kChunk / 8;  // of a chunk
    __host__ __device__ static int staged_vectors(int steps) { return steps * 4 * kVectors; }

    // out[t][h]: this thread's weight row (lane.group + 8 h) times activation row t; the same in all
    // threads of a quad. Step s reads the staged vectors of step s - origin. Without the format's
    // factor, the global scale and the activations' exponents.
    __device__ void run(const HalfRows& x, int first, int origin, float (&out)[T][2]) {
        if constexpr (Policy::kBlockScale) run_block_scaled(x, first, origin, out);
        else run_scaled_columns(x, first, origin, out);
    }

    // Column 2 m + p of the second operand: half p of member m's chunk.
    __device__ void run_scaled_columns(const HalfRows& x, int first, int origin,
                                       float (&out)[T][2]) {
        bool mine = lane.group / 2 == lane.member;
        bool halves[2] = {mine && lane.group % 2 == 0, mine && lane.group % 2 == 1};
        float sum[T][2] = {};
        this->for_each_step(first, [&](int slot, int step) {
            float c[T][4] = {};
            int at = ((step - origin) * 4 + lane.member) * kVectors;
            const uint32_t words[2][4] = {
                {codes[slot][0].x, codes[slot][0].y, codes[slot][0].z, codes[slot][0].w},
                {codes[slot][1].x, codes[slot][1].y, codes[slot][1].z, codes[slot][1].w}};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t a[2][4];
                Format::operand(words[0][i], a[0]);
                Format::operand(words[1][i], a[1]);
#pragma unroll
                for (int t = 0; t < T; t++) {
                    const uint4* from = halves[i / 2] ? x.at + t * x.vectors + at + i : x.zero;
                    uint4 b = *from;
                    mma_half(c[t], a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                    mma_half(c[t], a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
                }
            }
            float2 s0 = Format::scales(scales[slot][0]), s1 = Format::scales(scales[slot][1]);
#pragma unroll
            for (int t = 0; t < T; t++) {
                sum[t][0] += c[t][0] * s0.x + c[t][1] * s0.y;
                sum[t][1] += c[t][2] * s1.x + c[t][3] * s1.y;
            }
        });
#pragma unroll
        for (int i = 0; i < 2 * T; i++) {
            float value = sum[i / 2][i % 2];
            value += __shfl_xor_sync(~0u, value, 1);
            out[i / 2][i % 2] = value + __shfl_xor_sync(~0u, value, 2);
        }
    }

    // Column t: activation row t; a step lies in one block of scales.
    __device__ void run_block_scaled(const HalfRows& x, int first, int origin, float (&out)[T][2]) {
        float sum[4] = {};
        bool mine = lane.group < T;
        this->for_each_step(first, [&](int slot, int step) {
            float c[4] = {};
            int at = ((step - origin) * 4 + lane.member) * kVectors;
            const uint32_t words[2][4] = {
                {codes[slot][0].x, codes[slot][0].y, codes[slot][0].z, codes[slot][0].w},
                {codes[slot][1].x, codes[slot][1].y, codes[slot][1].z, codes[slot][1].w}};
#pragma unroll
            for (int v = 0; v < kVectors; v++) {
                uint4 b = mine ? x.at[lane.group * x.vectors + at + v] : x.zero[0];
                uint32_t a[2][2];
                Format::operand(words[0][2 * v], a[0]);
                Format::operand(words[1][2 * v], a[1]);
                mma_half(c, a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
                Format::operand(words[0][2 * v + 1], a[0]);
                Format::operand(words[1][2 * v + 1], a[1]);
                mma_half(c, a[0][0], a[1][0], a[0][1], a[1][1], b.z, b.w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += c[i] * scales[slot][i / 2];
        });
        // Thread `member` of the quad has the rows 2 * member and 2 * member + 1.
#pragma unroll
        for (int t = 0; t < T; t++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                out[t][h] = __shfl_sync(~0u, sum[2 * h + t % 2], (threadIdx.x & 28) + t / 2);
    }
};

// Formats that Gemv takes.
template <class Policy> constexpr bool kHasHalf = true;
template <> inline constexpr bool kHasHalf<Bf16> = false;

}  // namespace dsv4
