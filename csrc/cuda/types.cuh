// Element access by dtype code, warp and block sums, vector loads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace dsv4 {

using bf16 = __nv_bfloat16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// N elements as they lie in memory, aligned to their size: 16 bytes unless N says otherwise.
template <class T, int N = 16 / sizeof(T)> struct alignas(N * sizeof(T)) Vector {
    static constexpr int kSize = N;
    T at[N];
};

template <class T, int N = 16 / sizeof(T)> __device__ inline Vector<T, N> load_vector(const T* from) {
    return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <class T, int N> __device__ inline void store_vector(T* to, const Vector<T, N>& value) {
    *reinterpret_cast<Vector<T, N>*>(to) = value;
}

// Byte i of the result is byte number (selector >> 4 i & 7) of the eight in low and high.
__host__ __device__ inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
    return __byte_perm(low, high, selector);
#else
    uint64_t both = (uint64_t)high << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++)
        result |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
#endif
}

// Weights: read once, never written while the kernel runs, not worth a place in L1.
__device__ inline uint4 load_stream(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ inline float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// The sum over a block of Threads threads, in every thread; `shared` holds Threads / 32 floats and
// may be used again only after a barrier.
template <int Threads> __device__ inline float block_sum(float x, float* shared) {
    x = warp_sum(x);
    if (Threads == 32) return x;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < Threads / 32; i++) total += shared[i];
    return total;
}

// 16 bytes to shared memory, past the registers; zeros instead if not valid.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
    uint32_t target = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// All threads of the cluster's blocks; what they wrote to shared memory is then visible.
__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

// The float at this address of another block's shared memory; `rank` is the block's in the cluster.
__device__ inline float load_from_block(const float* at, int rank) {
    float value;
    asm volatile("{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\n"
                 "ld.shared::cluster.f32 %0, [remote];\n}"
                 : "=f"(value)
                 : "r"((uint32_t)__cvta_generic_to_shared(at)), "r"(rank)
                 : "memory");
    return value;
}

}  // namespace dsv4
