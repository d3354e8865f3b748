// Collapsing the four residual streams of bfloat16 tokens: one kernel, by clusters, and its launch.
#pragma once

#include "hyper_roles.cuh"

namespace dsv4 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) collapse_kernel(const __grid_constant__ Streams in) {
    extern __shared__ __align__(1024) char memory[];
    C c(in, *reinterpret_cast<typename C::Shared*>(memory));
    let_next_start();
    c.init_barriers();
    if (C::mover() == 0) prefetch_map(&in.x_map);
    __syncthreads();
    cluster_arrive_relaxed();
    const int count = c.tiles();
    if (c.warp < kWorkers) {
        more_registers<C::kWorkRegisters>();
        c.load_weights();  // while the kernel before may still run
        wait_for_previous();
        cluster_wait();
        c.work(count);
        return;
    }
    fewer_registers<C::kOtherRegisters>();
    wait_for_previous();
    if (c.warp < C::kSender) {
#pragma unroll 1
        for (int i = 0; i < C::kStages; i++) c.start_read(i, count);
        cluster_wait();
        c.move(count);
    } else {
        cluster_wait();
        if (c.warp == C::kSender) c.send(count);
        else c.gate_all(count);
    }
}

constexpr int kFew = 24;  // tokens that are faster in tiles of 8

// Collapses x [n, 4, d], after mixing in y [n, d] where C expands. Launches as many clusters as fit at
// once; kUnsupported where none does.
template <class C> int collapse(const void* x, const void* y, Streams in, void* stream) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kCluster, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
    config.blockDim = C::kThreads;
    config.dynamicSmemBytes = sizeof(typename C::Shared);
    config.stream = (cudaStream_t)stream;
    static const int clusters = [&] {
        int most = 0;
        cudaFuncSetAttribute(collapse_kernel<C>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        allow_shared(collapse_kernel<C>, config.dynamicSmemBytes);
        config.gridDim = kCluster;
        if (cudaOccupancyMaxActiveClusters(&most, collapse_kernel<C>, &config)) most = 0;
        cudaGetLastError();
        return most;
    }();
    if (clusters == 0) return kUnsupported;
    in.tile = in.n <= kFew ? 8 : C::kTile;
    in.rows = in.n < in.tile ? in.n : in.tile;
    int status = encode_map(&in.x_map, x, {C::kWidth, kStreams, in.n}, {64, kStreams, in.rows}, true);
    if (status == cudaSuccess && y)
        status = encode_map(&in.sublayer.y_map, y, {C::kWidth, in.n, 1}, {C::kSlice, in.rows, 1}, false);
    if (status != cudaSuccess) return status;
    int64_t tiles = ceil_div(in.n, in.tile);
    if (in.norm.y && tiles > clusters) return kUnsupported;
    config.gridDim = (unsigned)(kCluster * (tiles < clusters ? tiles : clusters));
    return (int)cudaLaunchKernelEx(&config, collapse_kernel<C>, in);
}

}  // namespace dsv4
