// Where the mass of attention weights goes, recomputed from queries, keys and the op's own lse.

#include "dispatch.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // a warp has a head
constexpr int kKeys = 32;                          // of a block
constexpr int kFlight = 4;                         // keys that a warp has under way
constexpr int kMostDim = 512, kVectors = kMostDim / (32 * 8);

struct Pool {
    const void* keys;      // [rows, dim]
    const int32_t* index;  // [n, width], -1 for none
    int64_t width;
};

struct Job {
    const void* q;          // [n, heads, dim]
    const float* lse;       // [n, heads]
    const float* sink;      // [heads]
    const int64_t* sample;  // [gridDim.z] tokens that are looked at
    Pool window, entries;
    int64_t n, heads, dim;
    float scale;
    float4* parts;      // [samples, heads, chunks]: mass, entropy, largest weight
    uint32_t* arrived;  // blocks done; 0 between launches
    double* out;        // [8]
};

__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN stays

// Eight consecutive elements as they lie in memory: 16 bytes, or 32 of float32.
template <class T> __device__ inline void load_eight(const T* from, float (&x)[8]) {
    constexpr int V = Vector<T>::kSize < 8 ? Vector<T>::kSize : 8;
#pragma unroll
    for (int i = 0; i < 8; i += V) {
        Vector<T, V> v = load_vector<T, V>(from + i);
#pragma unroll
        for (int j = 0; j < V; j++) x[i + j] = to_float(v.at[j]);
    }
}

// One warp's head over the keys [first, last) of a pool.
template <class Q, class K>
__device__ inline float4 weigh(const Job& job, const Pool& pool, int64_t token, int64_t head,
                               int64_t first, int64_t last) {
    int lane = threadIdx.x % 32;
    const Q* q = (const Q*)job.q + (token * job.heads + head) * job.dim;
    float query[kVectors][8];
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
        int at = v * 256 + lane * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) query[v][i] = 0;
        if (at < job.dim) load_eight(q + at, query[v]);
    }
    float lse = job.lse[token * job.heads + head];
    float4 part = {0, 0, -INFINITY, 0};
    for (int64_t key = first; key < last; key += kFlight) {
        float dot[kFlight];
        bool there[kFlight];
#pragma unroll
        for (int f = 0; f < kFlight; f++) {
            int32_t row = key + f < last ? pool.index[token * pool.width + key + f] : -1;
            there[f] = row >= 0;
            dot[f] = 0;
#pragma unroll
            for (int v = 0; v < kVectors; v++) {
                int at = v * 256 + lane * 8;
                if (!there[f] || at >= job.dim) continue;
                float x[8];
                load_eight((const K*)pool.keys + row * job.dim + at, x);
#pragma unroll
                for (int i = 0; i < 8; i++) dot[f] += query[v][i] * x[i];
            }
        }
#pragma unroll
        for (int f = 0; f < kFlight; f++) {
            float weight = there[f] ? expf(warp_sum(dot[f]) * job.scale - lse) : 0;
            part.x += weight;
            part.y -= weight > 0 ? weight * logf(weight) : weight;  // NaN stays NaN
            part.z = larger(part.z, weight);
        }
    }
    return part;
}

// The sum over a block, in thread 0.
__device__ inline double block_total(double x, double* shared) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kWarps; w++) total += shared[w];
    __syncthreads();
    return total;
}

__device__ inline float block_largest(float x, float* shared) {
    for (int offset = 16; offset > 0; offset /= 2)
        x = larger(x, __shfl_xor_sync(~0u, x, offset));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < kWarps; w++) x = larger(x, shared[w]);
    __syncthreads();
    return x;
}

// All parts together: the last block, each thread some (token, head).
__device__ inline void conclude(const Job& job, int64_t samples, int64_t chunks, int64_t of_window) {
    __shared__ double sums[kWarps];
    __shared__ float largest[kWarps];
    double window = 0, entries = 0, entropy = 0, sinks = 0;
    float weight = -INFINITY, over = -INFINITY, under = -INFINITY;
    for (int64_t i = threadIdx.x; i < samples * job.heads; i += kThreads) {
        double in_window = 0, in_entries = 0;
        for (int64_t c = 0; c < chunks; c++) {
            float4 part = __ldcg(job.parts + i * chunks + c);
            (c < of_window ? in_window : in_entries) += part.x;
            entropy += part.y;
            weight = larger(weight, part.z);
        }
        int64_t token = job.sample[i / job.heads], head = i % job.heads;
        float sink = expf(job.sink[head] - job.lse[token * job.heads + head]);
        float sum = (float)(in_window + in_entries) + sink;
        over = larger(over, sum - 1), under = larger(under, 1 - sum);
        window += in_window, entries += in_entries;
    }
    for (int64_t i = threadIdx.x; i < job.n * job.heads; i += kThreads)
        sinks += expf(job.sink[i % job.heads] - job.lse[i]);
    window = block_total(window, sums), entries = block_total(entries, sums);
    entropy = block_total(entropy, sums), sinks = block_total(sinks, sums);
    weight = block_largest(weight, largest);
    over = block_largest(over, largest), under = block_largest(under, largest);
    if (threadIdx.x > 0) return;
    double rows = (double)(samples * job.heads);
    job.out[0] = sinks / (double)(job.n * job.heads);
    job.out[1] = window / rows;
    job.out[2] = entries / rows;
    job.out[3] = entropy / rows;
    job.out[4] = weight;
    job.out[5] = under < 0 ? 0 : under;
    job.out[6] = over > under || over != over ? 1 + (double)over : 1 - (double)under;
    job.out[7] = 0;
}

template <class Q, class K>
__global__ void __launch_bounds__(kThreads) softmax_kernel(const __grid_constant__ Job job) {
    __shared__ uint32_t before;
    let_next_start();
    wait_for_previous();
    int64_t of_window = (job.window.width + kKeys - 1) / kKeys, chunk = blockIdx.x;
    int64_t head = blockIdx.y * (int64_t)kWarps + threadIdx.x / 32;
    const Pool& pool = chunk < of_window ? job.window : job.entries;
    int64_t first = (chunk < of_window ? chunk : chunk - of_window) * kKeys;
    int64_t last = min(first + kKeys, pool.width);
    if (head < job.heads) {
        float4 part = weigh<Q, K>(job, pool, job.sample[blockIdx.z], head, first, last);
        if (threadIdx.x % 32 == 0)
            job.parts[(blockIdx.z * job.heads + head) * gridDim.x + chunk] = part;
    }
    __threadfence();
    __syncthreads();
    uint32_t blocks = gridDim.x * gridDim.y * gridDim.z;
    if (threadIdx.x == 0) {
        before = atomicAdd(job.arrived, 1u);
        if (before + 1 == blocks) *job.arrived = 0;
        __threadfence();
    }
    __syncthreads();
    if (before + 1 == blocks) conclude(job, gridDim.z, gridDim.x, of_window);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// out [8] = mean weight of the sink over all tokens and heads; over the sampled ones mean mass in the
// window and in the entries, mean entropy, largest weight, largest shortfall of a row's sum below 1,
// the sum furthest from 1. q [n, heads, dim] of `dtype`, pools of keys of `pool_dtype`, dim a multiple
// of 8 up to 512; parts holds 4 floats a sampled token, head and 32 keys of each pool.
DSV4_EXPORT int dsv4_probe_softmax(const void* q, int dtype, const float* lse, const float* sink,
                                   const int64_t* sample, int64_t samples, const void* window,
                                   const int32_t* window_index, int64_t window_width,
                                   const void* entries, const int32_t* entry_index,
                                   int64_t entry_width, int pool_dtype, int64_t n, int64_t heads,
                                   int64_t dim, float scale, void* parts, uint32_t* arrived,
                                   double* out, void* stream) {
    if (dim % 8 || dim > kMostDim || samples < 1) return kUnsupported;
    Job job = {q,     lse, sink,  sample, {window, window_index, window_width},
               {entries, entry_index, entry_width}, n, heads, dim, scale, (float4*)parts, arrived,
               out};
    dim3 grid((unsigned)(ceil_div(window_width, kKeys) + ceil_div(entry_width, kKeys)),
              (unsigned)ceil_div(heads, kWarps), (unsigned)samples);
    return with_dtype(dtype, [&](auto tag) {
        return with_dtype(pool_dtype, [&](auto pool_tag) {
            using Q = type_of<decltype(tag)>;
            using K = type_of<decltype(pool_tag)>;
            return launch(softmax_kernel<Q, K>, grid, kThreads, 0, stream, job);
        });
    });
}
