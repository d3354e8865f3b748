// Tensor maps: the copy engine brings a box of a tensor into shared memory by one instruction.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "hopper.cuh"

namespace dsv4 {

// A box of a contiguous bfloat16 tensor [size[2], size[1], size[0]]; what lies outside reads as zeros.
// With `swizzle`, the box is 64 columns wide, and 16-byte chunk c of line l lies at chunk c ^ l % 8 of it.
inline int encode_map(CUtensorMap* map, const void* tensor, const int64_t (&size)[3],
                      const int (&box)[3], bool swizzle) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static void* const encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result);
        return found;
    }();
    if (!encode) return cudaErrorNotSupported;
    cuuint64_t sizes[3] = {(cuuint64_t)size[0], (cuuint64_t)size[1], (cuuint64_t)size[2]};
    cuuint64_t pitches[2] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
    cuuint32_t boxes[3] = {(cuuint32_t)box[0], (cuuint32_t)box[1], (cuuint32_t)box[2]}, every[3] = {1, 1, 1};
    CUresult result = ((Encode)encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(tensor), sizes, pitches, boxes, every,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Brings the map itself closer; it is a parameter of the kernel, declared __grid_constant__.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box from column x, row y, matrix z on; its bytes are counted by the barrier, zeros too.
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, int x, int y, int z,
                                         uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
        "%4}], [%5];" ::"r"(shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
        : "memory");
}

}  // namespace dsv4
