// rms_norm of an activation row by each warp that multiplies it: the bits of norm_sm90.cu.
#pragma once

#include "types.cuh"

namespace dsv4 {

// What is multiplied is the row as it lies in memory.
struct NoNorm {};

// What is multiplied is bf16(x * rsqrt(mean(x^2) + eps) * weight).
template <class W> struct RowNorm {
    static constexpr int kVector = 8;  // columns
    using Gain = Vector<W, kVector>;
    const W* weight;
    float eps;

    __device__ Gain gain(int vector) const { return load_vector<W, kVector>(weight + vector * kVector); }

    // One warp, d whole vectors.
    __device__ float factor(const bf16* x, int d) const {
        const float sum = d <= 512 ? sum_of_squares<64>(x, d) : sum_of_squares<256>(x, d);
        return 1 / sqrtf(sum / (float)d + eps);
    }
    __device__ static uint4 scaled(const uint4& x, const Gain& gain, float factor) {
        uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float low = __uint_as_float(words[j] << 16) * factor;
            const float high = __uint_as_float(words[j] & 0xFFFF0000u) * factor;
            const __nv_bfloat162 both = {from_float<bf16>(low * to_float(gain.at[2 * j])),
                                         from_float<bf16>(high * to_float(gain.at[2 * j + 1]))};
            words[j] = *reinterpret_cast<const uint32_t*>(&both);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }

  private:
    // In the order of a block of kThreads: this warp adds what each of its warps would, one after another.
    template <int kThreads> __device__ static float sum_of_squares(const bf16* x, int d) {
        constexpr int kWarps = kThreads / 32;
        const int lane = threadIdx.x % 32, vectors = d / kVector;
        uint4 held[kWarps];
        float sum[kWarps] = {};
#pragma unroll 1
        for (int base = lane; base < vectors; base += kThreads) {
#pragma unroll
            for (int w = 0; w < kWarps; w++)
                held[w] = base + w * 32 < vectors ? *(const uint4*)(x + (base + w * 32) * kVector)
                                                  : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int w = 0; w < kWarps; w++) add_squares(held[w], sum[w]);
        }
        float total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; w++)
            if (w * 32 < vectors) total += warp_sum(sum[w]);
        return total;
    }
    __device__ static void add_squares(const uint4& v, float& sum) {
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float low = __uint_as_float(words[j] << 16);
            const float high = __uint_as_float(words[j] & 0xFFFF0000u);
            sum += low * low;
            sum += high * high;
        }
    }
};

}  // namespace dsv4
