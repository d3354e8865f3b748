// Kernels that measure: a pass that only reads, and the shortest one that lets its successor start early.

#include "launch.cuh"
#include "types.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256, kLoads = 8;  // 16-byte loads that a thread has under way

__global__ void __launch_bounds__(kThreads) read_kernel(const uint4* data, int64_t vectors,
                                                        unsigned* sink) {
    int64_t first = blockIdx.x * (int64_t)(kThreads * kLoads) + threadIdx.x;
    uint4 held[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        int64_t at = first + i * kThreads;
        held[i] = at < vectors ? load_stream(data + at) : make_uint4(0, 0, 0, 0);
    }
    unsigned mixed = 0;
#pragma unroll
    for (int i = 0; i < kLoads; i++) mixed |= held[i].x & held[i].y & held[i].z & held[i].w;
    if (mixed == 0x7fc0dead) *sink = mixed;  // never, but the compiler cannot know
}

__global__ void leader_kernel() {
    let_next_start();
    wait_for_previous();
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// Read data [bytes], a multiple of 16, once. sink: one word, left as it is.
DSV4_EXPORT int dsv4_read_pass(const void* data, int64_t bytes, unsigned* sink, void* stream) {
    int64_t vectors = bytes / 16;
    if (bytes % 16 || (uintptr_t)data % 16) return kUnsupported;
    if (vectors == 0) return cudaSuccess;
    unsigned blocks = ceil_div(vectors, kThreads * kLoads);
    // A plain launch: it must not begin before what is timed has ended.
    read_kernel<<<blocks, kThreads, 0, (cudaStream_t)stream>>>((const uint4*)data, vectors, sink);
    return (int)cudaGetLastError();
}

// What stands before every op of a forward pass: a kernel that allows the next one to be launched.
DSV4_EXPORT int dsv4_leader(void* stream) {
    return launch(leader_kernel, 1, 32, 0, stream);
}
