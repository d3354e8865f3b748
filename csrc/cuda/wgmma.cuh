// Tensor-core products of a warpgroup whose first operand is in registers, by the width of the second.
//
// multiply_async(c, a0, a1, a2, a3, b): c [64, N] += a [64, 16] b [N, 16]^T in bfloat16 with float32
// sums; with a last argument `add` that is false, c = the product. Warp w of the group has rows 16 w ... of a and c, laid out as in mma(); b is the descriptor of a
// matrix in shared memory whose contracted columns are contiguous (matrix_descriptor). Between
// wgmma_fence() and wgmma_wait(), neither c nor a may be touched.
#pragma once

#include "hopper.cuh"

namespace dsv4 {

#define DSV4_F16(c, i) DSV4_F8(c, i), DSV4_F8(c, i + 8)

__device__ __forceinline__ void multiply_async(float (&c)[16], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;\n"
        : DSV4_F16(c, 0)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

__device__ __forceinline__ void multiply_async(float (&c)[32], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;\n"
        : DSV4_F16(c, 0), DSV4_F16(c, 16)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

__device__ __forceinline__ void multiply_async(float (&c)[48], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, 1, 1, 1, 0;\n"
        : DSV4_F16(c, 0), DSV4_F16(c, 16), DSV4_F16(c, 32)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

__device__ __forceinline__ void multiply_async(float (&c)[64], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;\n"
        : DSV4_F16(c, 0), DSV4_F16(c, 16), DSV4_F16(c, 32), DSV4_F16(c, 48)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

__device__ __forceinline__ void multiply_async(float (&c)[8], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, p, 1, 1, 0;\n"
        "}\n"
        : DSV4_F8(c, 0)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply_async(float (&c)[16], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, p, 1, 1, 0;\n"
        "}\n"
        : DSV4_F16(c, 0)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(add)));
}

__device__ __forceinline__ void multiply_async(float (&c)[32], uint32_t a0, uint32_t a1, uint32_t a2,
                                               uint32_t a3, uint64_t b, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
        "}\n"
        : DSV4_F16(c, 0), DSV4_F16(c, 16)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(add)));
}

// The same in fp16: multiply_halves_async(c, a0, a1, a2, a3, b).
#define DSV4_HALVES(N, SUMS, A, B, OUTPUTS)                                                          \
    __device__ __forceinline__ void multiply_halves_async(float (&c)[N / 2], uint32_t a0, uint32_t a1, \
                                                          uint32_t a2, uint32_t a3, uint64_t b) {    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" SUMS "}, {" A "}, " B \
                     ", 1, 1, 1, 0;\n"                                                               \
                     : OUTPUTS                                                                       \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                  \
    }
#define DSV4_SUMS4 "%0, %1, %2, %3"
#define DSV4_SUMS8 DSV4_SUMS4 ", %4, %5, %6, %7"
#define DSV4_SUMS12 DSV4_SUMS8 ", %8, %9, %10, %11"
#define DSV4_SUMS16 DSV4_SUMS12 ", %12, %13, %14, %15"
#define DSV4_SUMS32 DSV4_SUMS16 ", %16, %17, %18, %19, %20, %21, %22, %23, " \
                                "%24, %25, %26, %27, %28, %29, %30, %31"
#define DSV4_SUMS48 DSV4_SUMS32 ", %32, %33, %34, %35, %36, %37, %38, %39, " \
                                "%40, %41, %42, %43, %44, %45, %46, %47"
#define DSV4_SUMS64 DSV4_SUMS48 ", %48, %49, %50, %51, %52, %53, %54, %55, " \
                                "%56, %57, %58, %59, %60, %61, %62, %63"
#define DSV4_F4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define DSV4_TOGETHER(...) __VA_ARGS__
DSV4_HALVES(8, DSV4_SUMS4, "%4, %5, %6, %7", "%8", DSV4_F4(c, 0))
DSV4_HALVES(16, DSV4_SUMS8, "%8, %9, %10, %11", "%12", DSV4_TOGETHER(DSV4_F8(c, 0)))
DSV4_HALVES(24, DSV4_SUMS12, "%12, %13, %14, %15", "%16", DSV4_TOGETHER(DSV4_F8(c, 0), DSV4_F4(c, 8)))
DSV4_HALVES(32, DSV4_SUMS16, "%16, %17, %18, %19", "%20", DSV4_TOGETHER(DSV4_F16(c, 0)))
DSV4_HALVES(64, DSV4_SUMS32, "%32, %33, %34, %35", "%36", DSV4_TOGETHER(DSV4_F16(c, 0), DSV4_F16(c, 16)))
DSV4_HALVES(96, DSV4_SUMS48, "%48, %49, %50, %51", "%52", DSV4_TOGETHER(DSV4_F16(c, 0), DSV4_F16(c, 16), DSV4_F16(c, 32)))
DSV4_HALVES(128, DSV4_SUMS64, "%64, %65, %66, %67", "%68", DSV4_TOGETHER(DSV4_F16(c, 0), DSV4_F16(c, 16), DSV4_F16(c, 32), DSV4_F16(c, 48)))

#undef DSV4_F16

}  // namespace dsv4
