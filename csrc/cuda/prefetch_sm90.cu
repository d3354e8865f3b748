// Brings memory that later kernels will read into the L2 cache; writes nothing.

#include "launch.cuh"

namespace dsv4 {
namespace {

constexpr int kMost = 24;        // ranges a launch
constexpr int kPiece = 8 * 1024;  // bytes of one request, so that the ranges arrive from front to back

struct Ranges {
    const char* from[kMost];
    int64_t bytes[kMost];
    int count;
};

// Nobody's results are read here, so it does not wait for the kernel before. A thread leaves as soon as
// its requests are made; their data is still on its way.
__global__ void __launch_bounds__(32) prefetch_kernel(const Ranges ranges) {
    const int64_t step = (int64_t)gridDim.x * blockDim.x * kPiece;
    int64_t at = (threadIdx.x * (int64_t)gridDim.x + blockIdx.x) * kPiece;  // in all ranges together
    for (int r = 0; r < ranges.count; r++) {
        for (; at < ranges.bytes[r]; at += step) {
            const int64_t left = ranges.bytes[r] - at;
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(ranges.from[r] + at),
                         "r"((uint32_t)(left < kPiece ? left : kPiece)));
        }
        at -= (ranges.bytes[r] + kPiece - 1) / kPiece * kPiece;
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// The `count` ranges from[i] ... + bytes[i] of global memory, both host arrays; addresses and sizes are
// multiples of 16. `blocks` of 32 threads make the requests.
DSV4_EXPORT int dsv4_prefetch(const void* const* from, const int64_t* bytes, int64_t count,
                              int64_t blocks, void* stream) {
    if (count > kMost || blocks < 1) return kUnsupported;
    Ranges ranges = {};
    ranges.count = (int)count;
    for (int i = 0; i < count; i++) {
        if ((uintptr_t)from[i] % 16 || bytes[i] % 16) return kUnsupported;
        ranges.from[i] = (const char*)from[i];
        ranges.bytes[i] = bytes[i];
    }
    prefetch_kernel<<<(unsigned)blocks, 32, 0, (cudaStream_t)stream>>>(ranges);
    return (int)cudaGetLastError();
}
