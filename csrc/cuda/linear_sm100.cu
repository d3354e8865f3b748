// Op linear for NVFP4 weights on Blackwell: both operands stay 4-bit, in the tensor cores of sm_100a.
//
// Compiled, never run: no sm_100a was at hand. What is checked is that nvcc 13 assembles it without
// spills; descriptors, scale layout and ordering follow the PTX ISA (tcgen05) on paper only.
//
// Activations are rounded to NVFP4 first (16 columns share an e4m3 scale, all share `input_scale`), so
// this is the quantised model's arithmetic, not the op's plain contract, and no route picks it by itself.
// A block makes a tile of 128 x 128 of y: one thread loads stages of 256 columns by TMA, one issues
// tcgen05.mma (kind mxf4nvf4, a scale every 16 columns) into tensor memory, all four warps write it out.

#include <cuda.h>
#include <cuda/ptx>
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include "dispatch.cuh"
#include "hopper.cuh"

namespace dsv4 {
namespace {

namespace ptx = cuda::ptx;

constexpr int kTile = 128;      // activation rows and weight rows of a tile
constexpr int kStep = 256;      // columns of a stage: 128 bytes of codes, one swizzle span
constexpr int kDepth = 64;      // columns of one product
constexpr int kProducts = kStep / kDepth;
constexpr int kScaleBytes = 512;  // 128 rows x 4 scales, in the order that tcgen05.cp takes
constexpr int kStages = 4, kThreads = 128;
constexpr int kScaleColumns = 4;  // of tensor memory, for the scales of one operand and product
constexpr int kMemoryColumns = 256;  // the sums take 128, the stages' scales 4 * 2 * 16

struct Stage {
    uint8_t x[kTile * kStep / 2], w[kTile * kStep / 2];
    uint8_t x_scale[kProducts * kScaleBytes], w_scale[kProducts * kScaleBytes];
};
struct Shared {
    Stage stages[kStages];
    uint64_t full[kStages], empty[kStages], done;
    uint32_t memory;  // address of the tensor memory
};

// Rows of 128 bytes with 128-byte swizzle, 8-row groups 1024 bytes apart (PTX: matrix descriptor).
__device__ uint64_t code_descriptor(const void* shared) {
    return (uint64_t)((shared_address(shared) & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 |
           1ull << 46 | 2ull << 61;
}
// 32 rows of 16 bytes, unswizzled: 8-row groups 128 bytes apart.
__device__ uint64_t scale_descriptor(const void* shared) {
    return (uint64_t)((shared_address(shared) & 0x3FFFF) >> 4) | 8ull << 16 | 8ull << 32 |
           1ull << 46;
}
// PTX, instruction descriptor of kind mxf4nvf4: e2m1 both, e4m3 scales, N = 128, M = 128, K = 64.
constexpr uint32_t kInstruction = 1u << 7 | 1u << 10 | (kTile / 8) << 17 | (kTile / 16) << 24;

__device__ void load_stages(Shared& s, const CUtensorMap& x, const CUtensorMap& w,
                            const uint8_t* x_scale, const uint8_t* w_scale, int steps,
                            int products) {
    int row = blockIdx.y, column = blockIdx.x;
    // The scales of a product lie together, all of a row tile one after the other.
    x_scale += (int64_t)row * products * kScaleBytes;
    w_scale += (int64_t)column * products * kScaleBytes;
    for (int step = 0; step < steps; step++) {
        int at = step % kStages, count = min(kProducts, products - step * kProducts);
        Stage& stage = s.stages[at];
        barrier_wait(&s.empty[at], (step / kStages + 1) % 2);
        uint64_t* full = &s.full[at];
        uint32_t scales = count * kScaleBytes, before = step * kProducts * kScaleBytes;
        barrier_expect(full, sizeof(stage.x) + sizeof(stage.w) + 2 * scales);
        int32_t from_x[2] = {step * kStep / 2, row * kTile};
        int32_t from_w[2] = {step * kStep / 2, column * kTile};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, stage.x, &x, from_x, full);
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, stage.w, &w, from_w, full);
        bulk_load(stage.x_scale, x_scale + before, scales, full);
        bulk_load(stage.w_scale, w_scale + before, scales, full);
    }
}

__device__ void issue_products(Shared& s, int steps, int products) {
    auto group = ptx::cta_group_1;
    for (int step = 0; step < steps; step++) {
        int at = step % kStages, count = min(kProducts, products - step * kProducts);
        Stage& stage = s.stages[at];
        // A stage's scales have tensor memory of their own: products under way still read the others'.
        uint32_t scales = s.memory + kTile + at * 2 * kProducts * kScaleColumns;
        barrier_wait(&s.full[at], step / kStages % 2);
        ptx::tcgen05_fence_after_thread_sync();
        for (int i = 0; i < count; i++) {
            uint32_t of_x = scales + i * kScaleColumns, of_w = of_x + kProducts * kScaleColumns;
            uint64_t x_scale = scale_descriptor(stage.x_scale + i * kScaleBytes);
            uint64_t w_scale = scale_descriptor(stage.w_scale + i * kScaleBytes);
            ptx::tcgen05_cp_32x128b_warpx4(group, of_x, x_scale);
            ptx::tcgen05_cp_32x128b_warpx4(group, of_w, w_scale);
            uint64_t along = i * (kDepth / 2) >> 4;  // inside the swizzle span
            ptx::tcgen05_mma_block_scale_vec_4x(
                ptx::kind_mxf4nvf4, group, s.memory, code_descriptor(stage.x) + along,
                code_descriptor(stage.w) + along, kInstruction, of_x, of_w, step + i > 0);
        }
        ptx::tcgen05_commit(group, &s.empty[at]);  // arrives once the products have read the stage
    }
    ptx::tcgen05_commit(group, &s.done);
}

// Lane l of warp w holds row 32 w + l of the tile.
template <class Y>
__device__ void write_tile(const Shared& s, Y* y, int64_t m, int64_t n, float factor) {
    int warp = threadIdx.x / 32;
    int64_t row = blockIdx.y * (int64_t)kTile + threadIdx.x, first = blockIdx.x * (int64_t)kTile;
    for (int c = 0; c < kTile; c += 32) {
        uint32_t sums[32];
        ptx::tcgen05_ld_32x32b(sums, s.memory + (warp * 32u << 16) + c);
        ptx::tcgen05_wait_ld();
#pragma unroll
        for (int i = 0; i < 32; i++)
            if (row < m && first + c + i < n)
                y[row * n + first + c + i] = from_float<Y>(__uint_as_float(sums[i]) * factor);
    }
}

template <class Y>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                   const uint8_t* x_scale, const uint8_t* w_scale, Y* y, int64_t m, int64_t n,
                   int64_t k, float factor) {
    extern __shared__ __align__(1024) char raw[];
    Shared& s = *reinterpret_cast<Shared*>(raw);
    int warp = threadIdx.x / 32, products = (int)(k / kDepth);
    int steps = (products + kProducts - 1) / kProducts;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(&s.full[i], 1);
            barrier_init(&s.empty[i], 1);
        }
        barrier_init(&s.done, 1);
        fence_barrier_init();
    }
    if (warp == 0) {
        ptx::tcgen05_alloc(ptx::cta_group_1, &s.memory, kMemoryColumns);
        ptx::tcgen05_relinquish_alloc_permit(ptx::cta_group_1);
    }
    ptx::tcgen05_fence_before_thread_sync();
    __syncthreads();
    ptx::tcgen05_fence_after_thread_sync();
    if (threadIdx.x == 0) load_stages(s, x, w, x_scale, w_scale, steps, products);
    if (threadIdx.x == 32) issue_products(s, steps, products);
    __syncwarp();
    barrier_wait(&s.done, 0);
    ptx::tcgen05_fence_after_thread_sync();
    write_tile(s, y, m, n, factor);
    ptx::tcgen05_fence_before_thread_sync();
    __syncthreads();
    if (warp == 0) ptx::tcgen05_dealloc(ptx::cta_group_1, s.memory, kMemoryColumns);
}

// ---------------------------------------------------------------- activations

// A thread rounds 16 columns. A block of columns with NaN or infinity gets a NaN scale.
__global__ void __launch_bounds__(256)
    quantise_kernel(const bf16* x, int64_t m, int64_t k, float input_scale, uint8_t* codes,
                    uint8_t* scales) {
    int64_t blocks = k / 16, i = blockIdx.x * 256ll + threadIdx.x;
    int64_t row = i / blocks, block = i % blocks;
    if (row >= m) return;
    float value[16], largest = 0;
    bool finite = true;
    for (int j = 0; j < 16; j++) {
        value[j] = to_float(x[row * k + block * 16 + j]);
        largest = fmaxf(largest, fabsf(value[j]));
        finite = finite && isfinite(value[j]);
    }
    __nv_fp8_e4m3 scale(finite ? largest / (6 * input_scale) : __int_as_float(0x7FC00000));
    float whole = float(scale) * input_scale, up = whole > 0 ? 1 / whole : 0;
    for (int j = 0; j < 8; j++) {
        float2 pair = {value[2 * j] * up, value[2 * j + 1] * up};
        codes[row * (k / 2) + block * 8 + j] =
            __nv_cvt_float2_to_fp4x2(pair, __NV_E2M1, cudaRoundNearest);
    }
    // The order that formats.py calls swizzled: 128 rows x 4 scales in 512 bytes.
    int64_t tile = row / kTile * (blocks / 4) + block / 4;
    scales[tile * kScaleBytes + row % 32 * 16 + row % kTile / 32 * 4 + block % 4] = scale.__x;
}

// ---------------------------------------------------------------- host

// Codes [rows, k / 2] in boxes of 128 rows x 128 bytes, swizzled; zeros outside.
int tensor_map(CUtensorMap* map, const void* codes, int64_t rows, int64_t k) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static void* encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result);
        return found;
    }();
    if (!encode) return cudaErrorNotSupported;
    cuuint64_t size[2] = {(cuuint64_t)k / 2, (cuuint64_t)rows}, pitch[1] = {(cuuint64_t)k / 2};
    cuuint32_t box[2] = {kStep / 2, kTile}, every[2] = {1, 1};
    CUresult result = ((Encode)encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(codes), size, pitch, box, every,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Y>
int product(const void* x_codes, const uint8_t* x_scales, const dsv4_weight& w, float factor,
            int64_t m, Y* y, void* stream) {
    CUtensorMap x_map, w_map;
    int status = tensor_map(&x_map, x_codes, m, w.k);
    if (status == cudaSuccess) status = tensor_map(&w_map, w.data, w.n, w.k);
    if (status == cudaSuccess) status = allow_shared(product_kernel<Y>, sizeof(Shared));
    if (status != cudaSuccess) return status;
    dim3 grid(ceil_div(w.n, kTile), ceil_div(m, kTile));
    product_kernel<Y><<<grid, kThreads, sizeof(Shared), (cudaStream_t)stream>>>(
        x_map, w_map, x_scales, (const uint8_t*)w.scale, y, m, w.n, w.k, factor);
    return (int)cudaGetLastError();
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y [m, n] in y_dtype = x [m, k] W^T with x bfloat16 rounded to NVFP4 in the workspaces x_codes [m, k / 2]
// and x_scales [ceil(m / 128) * 128 * k / 16]. The scales of w lie swizzled (formats.py, swizzle_scales).
// k is a multiple of 64; x_codes and w's tensors are 16-byte aligned.
DSV4_EXPORT int dsv4_linear_nvfp4(const void* x, int64_t m, const dsv4_weight* w, float input_scale,
                                  void* x_codes, void* x_scales, void* y, int y_dtype, void* stream) {
    if (w->format != DSV4_NVFP4 || w->k % kDepth) return kUnsupported;
    if (m == 0 || w->n == 0) return cudaSuccess;
    quantise_kernel<<<ceil_div(m * (w->k / 16), 256), 256, 0, (cudaStream_t)stream>>>(
        (const bf16*)x, m, w->k, input_scale, (uint8_t*)x_codes, (uint8_t*)x_scales);
    int status = (int)cudaGetLastError();
    if (status != cudaSuccess) return status;
    float factor = input_scale * w->global_scale;
    return with_dtype(y_dtype, [&](auto tag) {
        using Y = type_of<decltype(tag)>;
        return product<Y>(x_codes, (const uint8_t*)x_scales, *w, factor, m, (Y*)y, stream);
    });
}
