// Tensor-core products of a warpgroup, by the width of the result: one wrapper of wgmma.mma_async for all kernels.
//
// wgmma(c, a0, a1, a2, a3, b, add) and wgmma(c, a, b, add): c [64, N] = a [64, 16] b [16, N] in bfloat16 with
// float32 sums, added to c where `add` is true; N is twice the length of c. wgmma_halves: the same in fp16.
// Warp w of the group has rows 16 w to 16 w + 15 of c, laid out as in mma(); a is in registers, laid out alike, or in
// shared memory like b. Of a matrix in shared memory (matrix_descriptor) the contracted dimension is the
// contiguous one; the template arguments say of which, b first, the other is. Between wgmma_fence() and wgmma_wait()
// neither c nor a may be touched.
#pragma once

#include "hopper.cuh"

namespace dsv4 {

// A matrix in shared memory with 128-byte swizzle: 8-row blocks of 1024 bytes. `stride` is the
// distance of such blocks, `leading` that of the next 64 columns where columns are not contracted.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t leading,
                                                      uint32_t stride) {
    return static_cast<uint64_t>((shared & 0x3ffff) >> 4) |
           static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
           1ull << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sums as operands, and their numbers in the instruction.
#define DSV4_OUT4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define DSV4_OUT8(c, i) DSV4_OUT4(c, i), DSV4_OUT4(c, i + 4)
#define DSV4_OUT12(c, i) DSV4_OUT8(c, i), DSV4_OUT4(c, i + 8)
#define DSV4_OUT16(c, i) DSV4_OUT8(c, i), DSV4_OUT8(c, i + 8)
#define DSV4_OUT32(c, i) DSV4_OUT16(c, i), DSV4_OUT16(c, i + 16)
#define DSV4_OUT48(c, i) DSV4_OUT32(c, i), DSV4_OUT16(c, i + 32)
#define DSV4_OUT64(c, i) DSV4_OUT32(c, i), DSV4_OUT32(c, i + 32)
#define DSV4_OUT128(c, i) DSV4_OUT64(c, i), DSV4_OUT64(c, i + 64)
#define DSV4_SUMS4 "%0, %1, %2, %3"
#define DSV4_SUMS8 DSV4_SUMS4 ", %4, %5, %6, %7"
#define DSV4_SUMS12 DSV4_SUMS8 ", %8, %9, %10, %11"
#define DSV4_SUMS16 DSV4_SUMS12 ", %12, %13, %14, %15"
#define DSV4_SUMS32 \
    DSV4_SUMS16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSV4_SUMS48 \
    DSV4_SUMS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DSV4_SUMS64 \
    DSV4_SUMS48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSV4_SUMS128                                                                               \
    DSV4_SUMS64                                                                                    \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
    "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "   \
    "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Products of width N, with N / 2 = n sums a thread; i0 to i6 are n to n + 6, the numbers of the operands behind them.
#define DSV4_PRODUCTS(NAME, TYPE, N, n, i0, i1, i2, i3, i4, i5, i6)                                \
    template <bool kTransposedB = false>                                                           \
    __device__ __forceinline__ void NAME(float (&c)[n], uint32_t a0, uint32_t a1, uint32_t a2,     \
                                         uint32_t a3, uint64_t b, bool add = true) {               \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                             \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                     " {" DSV4_SUMS##n "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4        \
                     ", p, 1, 1, %" #i6 ";\n}\n"                                                   \
                     : DSV4_OUT##n(c, 0)                                                           \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(add)),     \
                       "n"(kTransposedB));                                                         \
    }                                                                                              \
    template <bool kTransposedB = false, bool kTransposedA = false>                                \
    __device__ __forceinline__ void NAME(float (&c)[n], uint64_t a, uint64_t b, bool add = true) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                             \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
                     " {" DSV4_SUMS##n "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}\n"  \
                     : DSV4_OUT##n(c, 0)                                                           \
                     : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposedA),              \
                       "n"(kTransposedB));                                                         \
    }
#define DSV4_WIDTHS(NAME, TYPE)                                              \
    DSV4_PRODUCTS(NAME, TYPE, 8, 4, 4, 5, 6, 7, 8, 9, 10)                    \
    DSV4_PRODUCTS(NAME, TYPE, 16, 8, 8, 9, 10, 11, 12, 13, 14)               \
    DSV4_PRODUCTS(NAME, TYPE, 24, 12, 12, 13, 14, 15, 16, 17, 18)            \
    DSV4_PRODUCTS(NAME, TYPE, 32, 16, 16, 17, 18, 19, 20, 21, 22)            \
    DSV4_PRODUCTS(NAME, TYPE, 64, 32, 32, 33, 34, 35, 36, 37, 38)            \
    DSV4_PRODUCTS(NAME, TYPE, 96, 48, 48, 49, 50, 51, 52, 53, 54)            \
    DSV4_PRODUCTS(NAME, TYPE, 128, 64, 64, 65, 66, 67, 68, 69, 70)           \
    DSV4_PRODUCTS(NAME, TYPE, 256, 128, 128, 129, 130, 131, 132, 133, 134)
DSV4_WIDTHS(wgmma, "bf16")
DSV4_WIDTHS(wgmma_halves, "f16")

#undef DSV4_WIDTHS
#undef DSV4_PRODUCTS

}  // namespace dsv4
