// Weights streamed from memory through a ring in shared memory, one ring a warp.
//
// A stage is 128 bytes of each of 16 weight rows, two steps of the matrix unit. Each warp copies the
// stages of its own tiles, or its own columns of them, and waits for nobody. Weights and scales do not
// depend on the kernel before, so the rings fill while that one still runs. The 128 bytes of a row stay
// together in shared memory: a copy whose 32-byte sectors are torn apart takes twice as long.
#pragma once

#include "stream.cuh"

namespace dsv4 {

constexpr int kStageChunks = 8;  // of a weight row: 128 bytes

// Words of scales that a weight row has in a stage, where each row has its own.
template <class Policy> constexpr int kScaleWords = 0;
template <> inline constexpr int kScaleWords<Nvfp4> = 4;
template <> inline constexpr int kScaleWords<Mxfp4> = 2;

template <class Policy> struct Slot {
    uint4 codes[16][8];  // rows of chunks, see place()
    uint32_t scales[kScaleWords<Policy> ? 16 * kScaleWords<Policy> : 4];

    // Where a chunk of a row lies: no two of the eight threads that read together share a bank.
    __device__ static int place(int row, int chunk) { return chunk ^ row % 2 * 4; }
};

// What one warp reads: every step-th of the stages [first, last) of `tiles` row tiles, each `distance`
// rows after the last.
struct Strip {
    int64_t row;
    int distance, tiles, first, last, step;
    __device__ int stages() const { return (last - first + step - 1) / step; }
};

template <class Policy, int kDepth> struct Ring {
    Slot<Policy>* slots;
    const char* codes;   // this thread's chunk of the next stage, in the first of its four rows
    const char* scales;  // and its word of scales
    int64_t code_pitch, scale_pitch;
    int left;  // rows from the next stage's tile to the end of the matrix
    int tiles, distance, first, last, step, stage, chunks, slot = 0;

    static constexpr int kWords = kScaleWords<Policy>;

    __device__ Ring(const dsv4_weight& w, Slot<Policy>* slots, const Strip& strip)
        : slots(slots), code_pitch(w.k / Policy::kChunk * 16),
          scale_pitch(w.k / Policy::kChunk * kWords / 2), left((int)(w.n - strip.row)),
          tiles(strip.first < strip.last ? strip.tiles : 0), distance(strip.distance),
          first(strip.first), last(strip.last), step(strip.step), stage(strip.first),
          chunks(w.k / Policy::kChunk) {
        const int lane = threadIdx.x % 32;
        codes = (const char*)w.data + (strip.row + lane / 8) * code_pitch + stage * 128 +
                lane % 8 * 16;
        if constexpr (kWords > 0)
            scales = (const char*)w.scale + (strip.row + lane / kWords) * scale_pitch +
                     (stage * kWords + lane % kWords) * 4;
#pragma unroll 1
        for (int i = 0; i < kDepth; i++) fill();
    }

    // Starts the copies of the next stage, if there is one, into the next slot.
    __device__ void fill() {
        if (tiles > 0) {
            const int lane = threadIdx.x % 32, row = lane / 8, chunk = lane % 8;
            const bool inside = stage * kStageChunks + chunk < chunks;
            uint4* to = &slots[slot].codes[row][Slot<Policy>::place(row, chunk)];
#pragma unroll
            for (int j = 0; j < 4; j++)
                copy_async(to + j * 32, codes + j * 4 * code_pitch, inside && row + 4 * j < left);
            if constexpr (kWords > 0) {
                const bool here = stage * kWords + lane % kWords < (int)scale_pitch / 4;
#pragma unroll
                for (int j = 0; j < kWords / 2; j++)
                    copy_word(&slots[slot].scales[j * 32 + lane], scales + j * 8 * scale_pitch,
                              here && lane / kWords + 8 * j < left);
            }
            advance(step);
            stage += step;
            if (stage >= last) next_tile();
        }
        commit_copies();
        slot = slot + 1 == kDepth ? 0 : slot + 1;
    }

    __device__ void advance(int stages) {
        codes += stages * 128;
        if constexpr (kWords > 0) scales += stages * kWords * 4;
    }

    __device__ void next_tile() {
        advance(first - stage);
        stage = first;
        tiles--;
        left -= distance;
        codes += distance * code_pitch;
        if constexpr (kWords > 0) scales += distance * scale_pitch;
    }

    // The oldest stage, once it is there; then fill() may reuse its slot after a __syncwarp().
    __device__ const Slot<Policy>& oldest() const {
        wait_for_copies<kDepth - 1>();
        __syncwarp();
        return slots[slot];
    }

    __device__ static void copy_word(void* to, const void* from, bool valid) {
        uint32_t target = (uint32_t)__cvta_generic_to_shared(to);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(from),
                     "r"(valid ? 4 : 0)
                     : "memory");
    }
};

// A thread's part of a stage, out of shared memory: [step][row / 8].
template <class Policy> struct Piece {
    using Scale = typename Policy::Scale;
    uint4 codes[2][2];
    Scale scales[2][2];

    __device__ Piece(const Slot<Policy>& slot, const Lane& lane) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane.group + i % 2 * 8, chunk = i / 2 * 4 + lane.member;
            codes[i / 2][i % 2] = slot.codes[row][Slot<Policy>::place(row, chunk)];
            if constexpr (kScaleWords<Policy> > 0)
                scales[i / 2][i % 2] = ((const Scale*)slot.scales)[row * kStageChunks + chunk];
        }
    }
};

// The scale of each stage in turn, where a block of 128 x 128 has one: then each thread holds that of
// one stage to come.
template <class Policy> struct StageScales {
    const dsv4_weight& w;
    const Strip& strip;
    float now, later;
    int number = 0;  // of the next stage
    __device__ StageScales(const dsv4_weight& w, const Strip& strip) : w(w), strip(strip) {
        now = load(threadIdx.x % 32);
        later = load(32 + threadIdx.x % 32);
    }
    __device__ float load(int number) const {
        if constexpr (!Policy::kBlockScale) return 1;
        else {
            const int stages = strip.stages(), tile = stages > 0 ? number / stages : strip.tiles;
            if (tile >= strip.tiles) return 0;
            return Policy::load_scale(Policy::scale_row(w, strip.row + tile * strip.distance),
                                      (strip.first + number % stages * strip.step) * kStageChunks);
        }
    }
    __device__ float next() {
        if constexpr (!Policy::kBlockScale) return 1;
        const float scale = __shfl_sync(~0u, now, number % 32);
        if (++number % 32 == 0) {
            now = later;
            later = load(number + 32 + threadIdx.x % 32);
        }
        return scale;
    }
};

}  // namespace dsv4
