// Weights streamed from memory through a ring in shared memory, one ring a warp.
//
// A stage is 128 bytes of each of 16 weight rows, two steps of the matrix unit. Each warp copies the
// stages of its own tiles, or its own columns of them, and waits for nobody. Weights and scales do not
// depend on the kernel before, so the rings begin to fill while that one still runs. The 128 bytes of a
// row stay together in shared memory: a copy whose 32-byte sectors are torn apart takes twice as long.
#pragma once

#include "halves.cuh"

namespace dsv4 {

constexpr int kStageChunks = 8;  // of a weight row: 128 bytes

// Words of scales that a weight row has in a stage, where each row has its own.
template <class Policy> constexpr int kScaleWords = 0;
template <> inline constexpr int kScaleWords<Nvfp4> = 4;
template <> inline constexpr int kScaleWords<Mxfp4> = 2;

template <class Policy> struct Slot {
    static constexpr int kWords = kScaleWords<Policy>;
    uint4 codes[16][8];  // rows of chunks, see place()
    uint32_t scales[kWords ? 16 * kWords : 4];

    // Where a chunk of a row lies: no two of the eight threads that read together share a bank.
    __device__ static int place(int row, int chunk) { return chunk ^ row % 2; }
};

// What one warp reads: every step-th of the stages [first, last) of `tiles` row tiles, each `distance`
// rows after the last.
struct Strip {
    int64_t row;
    int distance, tiles, first, last, step;
    __device__ int stages() const {
        return first < last ? (last - first + step - 1) / step : 0;
    }
};

// Keeps a value in its register: else ptxas computes it again in every round of a loop.
template <class T> __device__ inline void keep_in_register(T& value) { asm volatile("" : "+r"(value)); }

// pointer + count * bytes by the multiplier, as the integer unit has more to do.
__device__ inline const char* advanced(const char* pointer, uint32_t count, uint32_t bytes) {
    const char* result;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(result) : "r"(count), "r"(bytes), "l"(pointer));
    return result;
}

// Asks for this block's share of `bytes` to be in the L2, even if an earlier kernel still writes them.
__device__ inline void prefetch_share(const void* from, int64_t bytes) {
    const int64_t all = (int64_t)gridDim.x * blockDim.x * 128;
    for (int64_t at = (blockIdx.x + (int64_t)gridDim.x * threadIdx.x) * 128; at < bytes; at += all)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char*)from + at));
}

// 4 or 8 bytes of scales.
template <int kBytes> __device__ inline void copy_scales(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}

template <class Policy, int kDepth> struct Ring {
    static constexpr int kWords = kScaleWords<Policy>;
    static constexpr uint32_t kBytes = kDepth * sizeof(Slot<Policy>);

    uint32_t to_codes, to_scales;    // shared addresses of this thread's first copies in slot 0
    uint32_t offset = 0;             // of the next slot
    const char *codes, *scales;      // this thread's chunk, and half row of scales, of the next stage
    uint32_t code_pitch, scale_pitch;
    int left;  // rows from the next stage's tile to the end of the matrix
    int tiles, distance, first, last, step, stage, chunks, lane = threadIdx.x % 32;

    __device__ Ring(const dsv4_weight& w, Slot<Policy>* slots, const Strip& strip)
        : code_pitch(w.k / Policy::kChunk * 16), scale_pitch(w.k / Policy::kChunk * kWords / 2),
          left((int)(w.n - strip.row)), tiles(strip.first < strip.last ? strip.tiles : 0),
          distance(strip.distance), first(strip.first), last(strip.last), step(strip.step),
          stage(strip.first), chunks(w.k / Policy::kChunk) {
        const int row = lane / 8, chunk = lane % 8;
        codes = (const char*)w.data + (strip.row + row) * code_pitch + stage * 128 + chunk * 16;
        to_codes = address(&slots->codes[row][Slot<Policy>::place(row, chunk)]);
        if constexpr (kWords > 0) {
            scales = (const char*)w.scale + (strip.row + lane / 2) * scale_pitch + (2 * stage + lane % 2) * kWords * 2;
            to_scales = address(slots->scales) + lane * kWords * 2;
            keep_in_register(to_scales);
        }
        keep_in_register(to_codes);
        keep_in_register(lane);
    }

    // Starts the copies of the next stage, if there is one, into the next slot.
    __device__ void fill() {
        if (tiles > 0) {
            if (left >= 16 && chunks % kStageChunks == 0) {
                copy_whole();
            } else {
                copy_part(stage * kStageChunks + lane % 8 < chunks ? left - lane / 8 : 0);
                copy_scales_part();
            }
            go(step);
        }
        commit_copies();
        offset = offset + sizeof(Slot<Policy>) == kBytes ? 0 : offset + sizeof(Slot<Policy>);
    }

    // Waits for the oldest stage, and returns where its slot begins after slot 0; then fill() may reuse
    // it after a __syncwarp().
    __device__ uint32_t oldest() const {
        wait_for_copies<kDepth - 1>();
        __syncwarp();
        return offset;
    }

  private:
    __device__ static uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

    __device__ void copy_whole() {
#pragma unroll
        for (int j = 0; j < 4; j++)
            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to_codes + offset + j * 512),
                         "l"(advanced(codes, code_pitch, 4 * j))
                         : "memory");
        if constexpr (kWords > 0) copy_scales<kWords * 2>(to_scales + offset, scales);
    }
    // `rows`: from this thread's first one to the end of the matrix.
    __device__ void copy_part(int rows) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to_codes + offset + j * 512),
                         "l"(advanced(codes, code_pitch, 4 * j)), "r"(4 * j < rows ? 16 : 0)
                         : "memory");
    }
    __device__ void copy_scales_part() {
#pragma unroll
        for (int i = 0; i < kWords / 2; i++) {
            const int word = stage * kWords + lane % 2 * (kWords / 2) + i;
            const bool valid = lane / 2 < left && word < (int)scale_pitch / 4;
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to_scales + offset + i * 4),
                         "l"(scales + i * 4), "r"(valid ? 4 : 0)
                         : "memory");
        }
    }

    __device__ void go(int stages) {
        codes = advanced(codes, stages, 128);
        if constexpr (kWords > 0) scales = advanced(scales, stages, kWords * 4);
        stage += stages;
        if (stage < last) return;
        const int64_t back = first - stage;
        codes += back * 128 + distance * (int64_t)code_pitch;
        if constexpr (kWords > 0) scales += back * kWords * 4 + distance * (int64_t)scale_pitch;
        stage = first;
        left -= distance;
        tiles--;
    }
};

// A thread's part of a stage, out of shared memory: [step][row / 8]. Its chunks are 2 member and
// 2 member + 1, so that their scales lie together.
template <class Policy> struct Piece {
    static constexpr int kWords = kScaleWords<Policy>;
    uint4 codes[2][2];
    uint32_t scales[2];  // [row / 8]: of both chunks

    __device__ Piece(const Slot<Policy>& slot, const Lane& lane) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane.group + i % 2 * 8, chunk = 2 * lane.member + i / 2;
            codes[i / 2][i % 2] = slot.codes[row][Slot<Policy>::place(row, chunk)];
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int at = (lane.group + 8 * h) * 4 + lane.member;
            if constexpr (kWords == 4) scales[h] = slot.scales[at];
            if constexpr (kWords == 2) scales[h] = ((const uint16_t*)slot.scales)[at];
        }
    }
    // The scales of both halves of the chunk of a step.
    __device__ float2 scale(int step, int h) const {
        return Half<Policy>::scales((typename Policy::Scale)(scales[h] >> step * 4 * kWords));
    }
    __device__ uint32_t scale_halves(int step, int h) const {
        return Half<Policy>::scale_halves((typename Policy::Scale)(scales[h] >> step * 4 * kWords));
    }
};

// The scale of each stage, where a block of 128 x 128 has one: each thread holds that of one of the
// warp's stages, and of the next tile's.
template <class Policy> struct StageScales {
    const dsv4_weight& w;
    const Strip& strip;
    float now, later;
    int tile = 0;

    __device__ StageScales(const dsv4_weight& w, const Strip& strip) : w(w), strip(strip) {
        now = load(0, threadIdx.x % 32);
        later = load(1, threadIdx.x % 32);
    }
    __device__ float load(int tile, int i) const {
        if constexpr (!Policy::kBlockScale) return 1;
        else {
            const int stage = strip.first + i * strip.step;
            if (tile >= strip.tiles || stage >= strip.last) return 0;
            return Policy::load_scale(Policy::scale_row(w, strip.row + tile * strip.distance),
                                      stage * kStageChunks);
        }
    }
    // Of the warp's i-th stage of the tile; i goes from 0 up.
    __device__ float of(int i) {
        if constexpr (!Policy::kBlockScale) return 1;
        if (i % 32 == 0 && i > 0) now = load(tile, i + threadIdx.x % 32);
        return __shfl_sync(~0u, now, i % 32);
    }
    __device__ void next_tile() {
        now = later;
        tile++;
        later = load(tile + 1, threadIdx.x % 32);
    }
};

}  // namespace dsv4
