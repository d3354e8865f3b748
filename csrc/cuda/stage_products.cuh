// A stage of weights times a warp's own columns of a few activation rows, on the matrix unit.
//
// A second operand has eight columns: activation rows, or for one row of 4-bit weights the blocks that have
// a scale each (kBlocks): a step has eight of a weight row, and their scales multiply sums, not weights.
#pragma once

#include "ring.cuh"

namespace dsv4 {

constexpr int kMostColumns = 8;  // activation rows of a product
template <class Policy> constexpr bool kFourBits = kScaleWords<Policy> > 0;

// What the elements of the first operand are too small by.
template <class Policy, bool kBlocks> __host__ __device__ constexpr float product_factor() {
    if constexpr (std::is_same_v<Policy, Bf16>) return 1;
    else if constexpr (kFourBits<Policy> && !kBlocks) return Half<Policy>::kFactor / Half<Policy>::kScaleUp;
    else return Half<Policy>::kFactor;
}

// ---------------------------------------------------------------- activations

// A warp's own columns of activation rows in shared memory, `vectors` of eight columns a row: fp16 times a
// power of two for each row (halves.cuh), or bf16 where the weights are. [row][stage][place].
template <class Policy, bool kBlocks> struct OwnColumns {
    static constexpr bool kHalf = !std::is_same_v<Policy, Bf16>;
    static constexpr int kVectors = Policy::kChunk / 8;    // of a chunk
    static constexpr int kStage = kStageChunks * kVectors;  // of a stage
    uint4* at;
    int rows, vectors, exponent = 0;  // thread r: row r's

    // Of vector v of row r: threads that read together share no bank.
    __device__ static int place(int r, int v) {
        const int chunk = v / kVectors % kStageChunks, inner = v % kVectors, member = chunk / 2, step = chunk % 2;
        const int ordered = kBlocks ? step * 16 + inner % 2 * 8 + inner / 2 * 4 + member
                                    : ((step * kVectors + inner) * 4 + member) ^ r % 2 * 4;
        return v / kStage * kStage + ordered;
    }
    // Starts to copy bf16 rows `stride` apart with `columns` elements, as one group: every step-th stage from
    // `first` on, zeros behind the last column. In the order of memory, as copies whose sectors are torn apart
    // are slow, and through the L1, where other warps may find them. One warp.
    __device__ void copy(const bf16* x, int64_t stride, int columns, int first, int step) const {
        const int present = columns / 8;
        for (int r = 0; r < rows; r++)
#pragma unroll 4
            for (int v = threadIdx.x % 32; v < vectors; v += 32) {
                const int from = (first + v / kStage * step) * kStage + v % kStage;
                const bool there = from < present;
                asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(
                                 shared_address(at + r * vectors + v)),
                             "l"(x + (there ? r * stride + from * 8 : 0)), "r"(there ? 16 : 0)
                             : "memory");
            }
        commit_copies();
    }

    // Converts and orders what copy() has brought, once it is there. One warp; at most kMost rows.
    template <int kMost> __device__ void settle() {
        if (kMost > 1 && rows > 4) settle_beside<kMostColumns>();
        else settle_beside<1>();
    }
    // kSide rows at a time.
    template <int kSide> __device__ void settle_beside() {
        __syncwarp();
        for (int first = 0; first < rows; first += kSide) {
            int e[kSide] = {};
            if constexpr (kHalf) {
                uint32_t most[kSide] = {};
                each_batch<kSide>(first, [] {}, [&](int r, int, const uint4& x) {
                    most[r] = max(most[r], largest_of(x));
                });
#pragma unroll
                for (int r = 0; r < kSide; r++) {
                    e[r] = RowScale::exponent_of(__reduce_max_sync(~0u, most[r]));
                    if ((int)threadIdx.x % 32 == first + r) exponent = e[r];
                }
            }
            // 32 vectors of a row are whole stages, so that what is overwritten has been read.
            each_batch<kSide>(first, [] { __syncwarp(); }, [&](int r, int v, const uint4& x) {
                at[(first + r) * vectors + place(first + r, v)] = stored(x, e[r]);
            });
        }
        __syncwarp();
    }
    // For kSide rows from `first` on: use(row - first, v, vector v) of what this thread has, after read() a batch.
    template <int kSide, class Read, class Use> __device__ void each_batch(int first, Read read, Use use) const {
        constexpr int kLines = kSide < 4 ? 4 / kSide : 1;  // of 32 vectors of a row
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int base = lane; base < vectors + lane; base += 32 * kLines) {
            uint4 x[kSide][kLines];
#pragma unroll
            for (int i = 0; i < kSide * kLines; i++) {
                const int r = i / kLines, v = base + i % kLines * 32;
                const bool there = first + r < rows && v < vectors;
                x[r][i % kLines] = there ? at[(first + r) * vectors + v] : make_uint4(0, 0, 0, 0);
            }
            read();
#pragma unroll
            for (int i = 0; i < kSide * kLines; i++) {
                const int r = i / kLines, v = base + i % kLines * 32;
                if (first + r < rows && v < vectors) use(r, v, x[r][i % kLines]);
            }
        }
    }
    __device__ static uint4 stored(const uint4& x, int e) {
        if constexpr (kHalf) return to_halves<kFourBits<Policy>>(x, e);
        else return x;
    }
    // All threads of the warp.
    __device__ float restored(float sum, int row) const {
        if constexpr (kHalf) return RowScale::undo(sum, __shfl_sync(~0u, exponent, row));
        else return sum;
    }
};

// This thread's second operands of a stage's products. Only some threads have a part in them; the others
// hold zeros.
template <class Policy, bool kBlocks> struct Columns {
    static constexpr int kVectors = kBlocks ? 2 : Policy::kChunk / 8;  // of a step
    static constexpr int kPair = kBlocks ? 256 : 128;                  // bytes from two vectors to the next
    uint32_t at[2];  // shared addresses in stage 0
    int mine;
    uint4 vector[2][kVectors] = {};

    // Of `count` activation rows from `row` on.
    __device__ Columns(const OwnColumns<Policy, kBlocks>& x, int row, int count) {
        const Lane lane;
        mine = kBlocks ? count > 0 && lane.group / 2 == lane.member : lane.group < count;
        const int r = row + (!kBlocks && mine ? lane.group : 0);
        const uint32_t base = shared_address(x.at + r * x.vectors);
#pragma unroll
        for (int i = 0; i < 2; i++)
            at[i] = base + 16 * (kBlocks ? lane.group % 2 * 4 + lane.member + i * 8
                                         : (4 * i + lane.member) ^ r % 2 * 4);
        keep_in_register(mine);
    }
    // Those of the warp's i-th stage.
    __device__ void load(int i) {
        const uint32_t skip = i * kStageChunks * Policy::kChunk * 2;
#pragma unroll
        for (int u = 0; u < 2 * kVectors; u++) {
            uint4& v = vector[u / kVectors][u % kVectors];
            asm volatile(
                "{\n.reg .pred mine;\nsetp.ne.s32 mine, %5, 0;\n"
                "@mine ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                : "r"(at[u % 2] + skip + u / 2 * kPair), "r"(mine));
        }
    }
};

// ---------------------------------------------------------------- products

// This thread's sums of a tile. Rows: element i is weight row `group` + i / 2 * 8, activation row 2 * member
// + i % 2. Blocks: elements 0 and 2, over this member's chunks. Without product_factor and the global scale.
template <class Policy, bool kBlocks> struct TileSums {
    using X = Columns<Policy, kBlocks>;
    static constexpr int kStep = kBlocks ? 2 : 1;  // from an element that is used to the next
    float sum[4] = {};
    Lane lane;

    // `upper`, `lower`: the stage's scales of both halves of the tile, where it has them.
    __device__ void add(const Piece<Policy>& piece, const X& x, float upper, float lower) {
        constexpr int kVectors = Policy::kChunk / 8;
        float c[2][2][4] = {};  // [step][half of a chunk, where that has a scale]
#pragma unroll
        for (int i = 0; i < 2 * kVectors; i++) {
            const int s = i / kVectors, v = i % kVectors;
            uint32_t a[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) decode(piece, s, h, v, a[h]);
            multiply(c[s][kBlocks ? v / 2 : 0], a, x.vector[s][v % X::kVectors]);
        }
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if constexpr (kBlocks) {
                    // c[s][p] is right in the columns of halves p only; the others are not used.
                    const float2 scales = piece.scale(s, i / 2);
                    sum[i / 2 * 2] += c[s][i % 2][i] * (i % 2 ? scales.y : scales.x);
                } else if (s == 1) {
                    sum[i] += (c[0][0][i] + c[1][0][i]) * (i < 2 ? upper : lower);
                }
            }
    }
    __device__ void add(const TileSums& other) {
#pragma unroll
        for (int i = 0; i < 4; i += kStep) sum[i] += other.sum[i];
    }

    // Undoes the powers of two of activation rows from `row` on, and multiplies by `weight`. One warp.
    __device__ void restore(const OwnColumns<Policy, kBlocks>& x, int row, float weight) {
#pragma unroll
        for (int i = 0; i < 4; i += kStep) sum[i] = x.restored(sum[i], row + column(i)) * weight;
    }
    // Writes the sums to `to` [rows][16]. One warp.
    __device__ void keep(float* to, int rows) {
#pragma unroll
        for (int i = 0; i < 4; i += kStep) {
            if constexpr (kBlocks) {
                sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
                sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
            }
            const int row = 2 * lane.member + i % 2;  // of blocks: members' sums are the same
            if (row < rows) to[row * 16 + lane.group + i / 2 * 8] = sum[i];
        }
    }

  private:
    __device__ int column(int i) const { return kBlocks ? 0 : 2 * lane.member + i % 2; }

    // Eight columns of row h of the piece: vector v of the chunk of a step, as its second operand has them.
    __device__ static void decode(const Piece<Policy>& piece, int step, int h, int v, uint32_t (&a)[4]) {
        const uint4& codes = piece.codes[step][h];
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        if constexpr (kFourBits<Policy>) {
            Half<Policy>::operand(words[v], a);
            if constexpr (!kBlocks) {
                const uint32_t both = piece.scale_halves(step, h);
                const uint32_t scale = select_bytes(both, both, v / 2 ? 0x3232 : 0x1010);
#pragma unroll
                for (int i = 0; i < 4; i++) a[i] = multiply_fp16(a[i], scale);
            }
        } else if constexpr (Policy::kBlockScale) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t pairs[2];
                Half<Policy>::operand(words[2 * v + i], pairs);
                a[2 * i] = pairs[0], a[2 * i + 1] = pairs[1];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = words[i];
        }
    }
    __device__ static void multiply(float (&c)[4], const uint32_t (&a)[2][4], const uint4& b) {
        if constexpr (OwnColumns<Policy, kBlocks>::kHalf) {
            mma_half(c, a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
            mma_half(c, a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
        } else {
            mma(c, a[0][0], a[1][0], a[0][1], a[1][1], b.x, b.y);
            mma(c, a[0][2], a[1][2], a[0][3], a[1][3], b.z, b.w);
        }
    }
};

}  // namespace dsv4
