// Launching: error text, programmatic dependent launch, and how many blocks to use.
#pragma once

#include <cuda_runtime.h>

#include "../common/abi.h"

// What an exported function returns for sizes that its kernels do not take.
constexpr int kUnsupported = -1;

// Every shared object is made from one .cu file, so this is defined once in each.
DSV4_EXPORT const char* dsv4_error_string(int status) {
    return cudaGetErrorString((cudaError_t)status);
}

namespace dsv4 {

// Start `kernel` so that it may begin while the one before it in the stream drains. The kernel must
// execute wait_for_previous() before it reads what an earlier kernel wrote. `size` blocks along z
// form a cluster.
template <class... Parameters, class... Arguments>
inline int launch_clusters(int size, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                           size_t shared, void* stream, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = (cudaStream_t)stream;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {1, 1, (unsigned)size};
    config.attrs = attributes;
    config.numAttrs = size > 1 ? 2 : 1;
    return (int)cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...);
}

// The same without clusters.
template <class... Parameters, class... Arguments>
inline int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                  void* stream, Arguments... arguments) {
    return launch_clusters(1, kernel, grid, block, shared, stream, arguments...);
}

// More than 48 KB of shared memory must be asked for, once a kernel and device.
template <class Kernel> inline int allow_shared(Kernel kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return cudaSuccess;
    return (int)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)bytes);
}

// Results of earlier kernels are visible after this.
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel may be launched from now on; it still waits for this one's end.
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dsv4
