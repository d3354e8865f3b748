// A block multiplies 128 weight rows with 64 activation rows: the path for more than a few tokens.
//
// Eight warps, four by rows and two by activations; a warp has two 16-row tiles. A step is 64 bytes
// of every weight row and the same columns of every activation row; copies to shared memory run
// kStages - 1 steps ahead.
#pragma once

#include "stream.cuh"

namespace dsv4 {

constexpr int kTileRows = 128, kTileTokens = 64, kTileThreads = 256, kStages = 3;

template <class Policy> struct Tile {
    static constexpr int kRowTiles = kTileRows / 16;
    static constexpr int NT = kTileTokens / 16;                 // groups of 8 activation rows a warp
    static constexpr int kUnits = 4 * Policy::kChunk / 8;       // 16 bytes of x, a row and step
    static constexpr int kRowScales = Policy::kBlockScale ? 1 : 2;  // for a thread's rows of a tile
    static constexpr int kHalfVectors = Policy::kChunk / 2 / 8; // of half a chunk; 0: half a vector

    struct Stage {
        uint4 x[kTileTokens][kUnits];
        uint4 codes[kRowTiles][2][32];
    };
    struct Shared {
        union {
            Stage stages[kStages];
            float sums[kTileTokens][kTileRows + 4];
        };
        const bf16* rows[kTileTokens];  // activation rows; null: zeros
    };

    Shared& shared;
    const char* data[2];  // of the row tile that this warp copies
    decltype(Policy::scale_row(dsv4_weight{}, 0)) scale[2][kRowScales];  // of those it multiplies
    int chunks, warp;
    Lane lane;
    float sum[2][NT][4] = {};

    // row_of(tile) gives the weight and first row of row tile 0 ... 7; both may differ from tile to tile.
    template <class RowOf>
    __device__ Tile(Shared& memory, RowOf row_of) : shared(memory), warp(threadIdx.x / 32) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const dsv4_weight* w;
            int64_t row = place(row_of, warp, h, w);
            chunks = w->k / Policy::kChunk;
            data[h] = (const char*)w->data + (row * chunks + lane.member) * 16;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                row = place(row_of, warp / 2 * 2 + r, h, w);
                if (h < kRowScales) scale[r][h] = Policy::scale_row(*w, row);
            }
        }
    }

    // This thread's row h of a row tile, clamped to the matrix.
    template <class RowOf>
    __device__ int64_t place(RowOf row_of, int tile, int h, const dsv4_weight*& w) const {
        int64_t row;
        w = row_of(tile, row);
        row += lane.group + 8 * h;
        return row < w->n ? row : w->n - 1;
    }

    // Where unit u of an activation row lies: no two of the eight threads of a load share a bank.
    __device__ static int swizzled(int token, int u) {
        if (kUnits == 16) return u ^ (u >> 3 & 1) ^ (token & 1) << 1;
        return kUnits == 8 ? u ^ (token & 1) : u;
    }

    __device__ void copy_step(int stage, int step, int last) {
        if (step < last) {
            Stage& to = shared.stages[stage];
            bool valid = step * 4 + lane.member < chunks;
#pragma unroll
            for (int h = 0; h < 2; h++)
                copy_async(&to.codes[warp][h][threadIdx.x % 32], data[h] + step * (int64_t)64, valid);
#pragma unroll
            for (int i = threadIdx.x; i < kTileTokens * kUnits; i += kTileThreads) {
                int token = i / kUnits, u = i % kUnits;
                const bf16* row = shared.rows[token];
                bool there = row != nullptr && step * 4 + u * 4 / kUnits < chunks;
                const bf16* from = row + (step * (int64_t)kUnits + u) * 8;
                copy_async(&to.x[token][swizzled(token, u)], there ? from : (const bf16*)data[0],
                           there);
            }
        }
        commit_copies();
    }

    using Scales = typename Policy::Scale[2][kRowScales];
    __device__ void fetch_scales(Scales& out, int step, int last) const {
        int chunk = step * 4 + lane.member;
        bool valid = chunk < chunks;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int h = 0; h < kRowScales; h++)
                out[r][h] = step < last && (valid || Policy::kBlockScale)
                                ? Policy::load_scale(scale[r][h], valid ? chunk : step * 4)
                                : typename Policy::Scale{};
    }

    // sum += steps [first, last). shared.rows must be set; all threads of the block.
    __device__ void run(int first, int last) {
        __syncthreads();
        Scales now, next;
        fetch_scales(now, first, last);
#pragma unroll
        for (int s = 0; s < kStages - 1; s++) copy_step(s, first + s, last);
        for (int step = first, stage = 0; step < last; step++) {
            wait_for_copies<kStages - 2>();
            __syncthreads();
            int free = stage == 0 ? kStages - 1 : stage - 1;
            copy_step(free, step + kStages - 1, last);
            fetch_scales(next, step + 1, last);
            multiply(shared.stages[stage], now);
#pragma unroll
            for (int i = 0; i < 2 * kRowScales; i++)
                now[i / kRowScales][i % kRowScales] = next[i / kRowScales][i % kRowScales];
            stage = stage == kStages - 1 ? 0 : stage + 1;
        }
        wait_for_copies<0>();
        __syncthreads();
    }

    __device__ void multiply(const Stage& from, const Scales& scales) {
        float part[Policy::kBlockScale ? 2 : 1][Policy::kBlockScale ? NT : 1][4] = {};
#pragma unroll(Policy::kHalvesAtOnce)  // both where there are registers for it
        for (int half = 0; half < 2; half++) {
            uint32_t a[2][2][Policy::kProducts][2];
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const uint4* codes = &from.codes[warp / 2 * 2 + r][h][threadIdx.x % 32];
                    Policy::operand(((const uint2*)codes)[half], scales[r][h % kRowScales], half,
                                    a[r][h]);
                }
#pragma unroll
            for (int t = 0; t < NT; t++) {
                uint32_t b[Policy::kProducts][2];
                columns(from, warp % 2 * (kTileTokens / 2) + 8 * t + lane.group, half, b);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int j = 0; j < Policy::kProducts; j++) {
                        float(&to)[4] = Policy::kBlockScale
                                            ? part[Policy::kBlockScale ? r : 0]
                                                  [Policy::kBlockScale ? t : 0]
                                            : sum[r][t];
                        mma(to, a[r][0][j][0], a[r][1][j][0], a[r][0][j][1], a[r][1][j][1],
                            b[j][0], b[j][1]);
                    }
            }
        }
        if constexpr (Policy::kBlockScale)
#pragma unroll
            for (int i = 0; i < 2 * NT * 4; i++) {
                int r = i / (4 * NT), t = i / 4 % NT;
                sum[r][t][i % 4] += part[r][t][i % 4] * scales[r][0];
            }
    }

    __device__ void columns(const Stage& from, int token, int half,
                            uint32_t (&b)[Policy::kProducts][2]) const {
        if constexpr (kHalfVectors == 0) {
            uint2 x[1] = {((const uint2*)&from.x[token][swizzled(token, lane.member)])[half]};
            Policy::column(x, b);
        } else {
            uint4 x[kHalfVectors];
#pragma unroll
            for (int v = 0; v < kHalfVectors; v++) {
                int u = lane.member * (kUnits / 4) + half * kHalfVectors + v;
                x[v] = from.x[token][swizzled(token, u)];
            }
            Policy::column(x, b);
        }
    }

    // The place in `sum` of value i of tile r, group t: its weight row among 128, its activation row.
    __device__ int row_of(int r, int i) const {
        return (warp / 2 * 2 + r) * 16 + lane.group + i / 2 * 8;
    }
    __device__ int token_of(int t, int i) const {
        return warp % 2 * (kTileTokens / 2) + 8 * t + 2 * lane.member + i % 2;
    }
    // Leaves the sums in shared memory, after run() and before a barrier.
    __device__ void keep_sums() {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int t = 0; t < NT; t++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    shared.sums[token_of(t, i)][row_of(r, i)] = sum[r][t][i];
    }
};

}  // namespace dsv4
