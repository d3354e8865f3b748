// Several products of one activation row in one launch: op linear for weights that are given the same input.
//
// A block multiplies 16 weight rows, its eight warps share the columns. All blocks of a decode layer's
// small matrices fit on the GPU at once, so that none waits for those of another matrix.

#include "dispatch.cuh"
#include "gemv.cuh"

namespace dsv4 {
namespace {

constexpr int kMost = 8;  // matrices a launch
constexpr int kWarps = 8, kThreads = kWarps * 32, kRows = 16;

struct Products {
    const bf16* x;  // [k]
    int64_t k;
    int count;
    dsv4_weight w[kMost];
    void* y[kMost];       // [w.n]
    int y_dtype[kMost];   // enum dsv4_dtype
    int64_t end[kMost];   // of each matrix' blocks
};

// A block's share: the steps [first, last) of this warp's columns, of `steps`.
template <class Policy> struct Share {
    int steps, first, last;
    __device__ explicit Share(int64_t k) : steps(steps_of<Policy>(k)) {
        const int each = (steps + kWarps - 1) / kWarps, warp = threadIdx.x / 32;
        first = min(warp * each, steps);
        last = min(first + each, steps);
    }
};

// Sums of the rows from row0 on over this warp's columns; without the format's factor and the global scale.
template <class Policy>
__device__ void multiply(const Products& p, const dsv4_weight& w, int64_t row0, char* memory,
                         float (&sums)[kRows]) {
    const Share<Policy> share(p.k);
    if constexpr (kHasHalf<Policy>) {
        Gemv<Policy, 1> rows(w, row0, share.first, share.last);
        wait_for_previous();
        HalfRows x(memory, 1, rows.staged_vectors(share.steps));
        stage_rows<Half<Policy>::kPermuted>(x, 1, (int)p.k, [&](int) { return p.x; });
        float out[1][2];
        rows.run(x, share.first, 0, out);
        if (rows.lane.member == 0)
#pragma unroll
            for (int h = 0; h < 2; h++) sums[rows.lane.group + 8 * h] = x.restore(out[0][h], 0);
    } else {
        Stream<Policy, 1> stream(w, row0, share.first, share.last);
        wait_for_previous();
        auto* staged = (uint4*)memory;
        for (int v = threadIdx.x; v < p.k / 8; v += kThreads) staged[v] = ((const uint4*)p.x)[v];
        __syncthreads();
        const Lane& lane = stream.lane;
        const bf16* x[1] = {lane.group == 0 ? (const bf16*)memory : nullptr};
        float sum[2] = {};
        stream.for_each_step(share.first, [&](int slot, int at) {
            typename Stream<Policy, 1>::X now;
            stream.fetch_x(now, x, at);
            float part[1][4] = {};  // the matrix unit cuts low bits off what it adds to
            stream.step(slot, now, part);
#pragma unroll
            for (int h = 0; h < 2; h++) sum[h] += part[0][2 * h];
        });
        if (lane.member == 0)
#pragma unroll
            for (int h = 0; h < 2; h++) sums[lane.group + 8 * h] = sum[h];
    }
}

__global__ void __launch_bounds__(kThreads, 2) linears_kernel(const Products p) {
    extern __shared__ __align__(16) char memory[];
    __shared__ float sums[kWarps][kRows];
    let_next_start();
    int i = 0;
    while (blockIdx.x >= p.end[i]) i++;
    const dsv4_weight w = p.w[i];
    const int64_t row0 = (blockIdx.x - (i > 0 ? p.end[i - 1] : 0)) * kRows;
    float(&mine)[kRows] = sums[threadIdx.x / 32];
    if (w.format == DSV4_DENSE_BF16) multiply<Bf16>(p, w, row0, memory, mine);
    else if (w.format == DSV4_FP8_E8M0) multiply<Fp8<uint8_t>>(p, w, row0, memory, mine);
    else multiply<Fp8<float>>(p, w, row0, memory, mine);
    __syncthreads();
    const int64_t row = row0 + threadIdx.x;
    if (threadIdx.x >= kRows || row >= w.n) return;
    float total = 0;
    for (int s = 0; s < kWarps; s++) total += sums[s][threadIdx.x];
    if (p.y_dtype[i] == DSV4_F32) ((float*)p.y[i])[row] = total;
    else ((bf16*)p.y[i])[row] = from_float<bf16>(total);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// y[i] [w[i]->n] in y_dtype[i] = x [k] bfloat16 times w[i]: bf16 or FP8, k a multiple of 16, all at
// multiples of 16 bytes. Blocks are started in the order of the matrices: the largest first.
DSV4_EXPORT int dsv4_linears(const void* x, int64_t k, int64_t count, const dsv4_weight* const* w,
                             void* const* y, const int* y_dtype, void* stream) {
    if (count < 1 || count > kMost || k % 16) return kUnsupported;
    Products p = {(const bf16*)x, k, (int)count};
    int64_t blocks = 0;
    for (int i = 0; i < count; i++) {
        const int32_t format = w[i]->format;
        if (w[i]->k != k || (format != DSV4_DENSE_BF16 && format != DSV4_FP8_E8M0 && format != DSV4_FP8_F32))
            return kUnsupported;
        p.w[i] = *w[i];
        p.y[i] = y[i];
        p.y_dtype[i] = y_dtype[i];
        p.end[i] = blocks += ceil_div(w[i]->n, kRows);
    }
    const int vectors = Gemv<Fp8<float>, 1>::staged_vectors(steps_of<Fp8<float>>(k));
    const size_t shared = HalfRows::bytes(1, vectors);
    const int status = allow_shared(linears_kernel, shared);
    if (status != cudaSuccess) return status;
    return launch(linears_kernel, dim3(blocks), kThreads, shared, stream, p);
}
