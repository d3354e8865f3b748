// Where the mass of attention weights goes, recomputed from queries, keys and the op's own lse.

#include "dispatch.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // a warp has a head
constexpr int kKeys = 16;                          // of a block
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
    float4* rows;       // [samples, heads]: mass in window and entries, entropy, largest weight
    uint32_t* arrived;  // [1 + samples * head groups] blocks done; 0 between launches
    double* out;        // [8]
};

__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN stays

// Eight consecutive elements as they lie in memory: 16 bytes, or 32 of float32.
template <class T> struct Eight {
    static constexpr int V = Vector<T>::kSize < 8 ? Vector<T>::kSize : 8;
    Vector<T, V> parts[8 / V];
    __device__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < 8 / V; i++) parts[i] = load_vector<T, V>(from + i * V);
    }
    __device__ float value(int i) const { return to_float(parts[i / V].at[i % V]); }
};

// One warp's head over the keys [first, last) of a pool.
template <class Q, class K>
__device__ inline float4 weigh(const Job& job, const Pool& pool, int64_t token, int64_t head,
                               int64_t first, int64_t last) {
    constexpr int kFlight = 8 / sizeof(K);  // keys under way
    int lane = threadIdx.x % 32;
    const Q* q = (const Q*)job.q + (token * job.heads + head) * job.dim;
    float query[kVectors][8];
#pragma unroll
    for (int v = 0; v < kVectors; v++) {
        int at = v * 256 + lane * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) query[v][i] = 0;
        if (at >= job.dim) continue;
        Eight<Q> from;
        from.load(q + at);
#pragma unroll
        for (int i = 0; i < 8; i++) query[v][i] = from.value(i);
    }
    float lse = job.lse[token * job.heads + head];
    int mine = lane < last - first ? pool.index[token * pool.width + first + lane] : -1;
    float4 part = {0, 0, -INFINITY, 0};
#pragma unroll 1
    for (int key = 0; key < kKeys; key += kFlight) {
        Eight<K> x[kFlight][kVectors];
        int rows[kFlight];
#pragma unroll
        for (int f = 0; f < kFlight; f++) {
            rows[f] = __shfl_sync(~0u, mine, key + f);
            const K* from = (const K*)pool.keys + max(rows[f], 0) * job.dim;
#pragma unroll
            for (int v = 0; v < kVectors; v++) {
                int at = v * 256 + lane * 8;
                if (rows[f] >= 0 && at < job.dim) x[f][v].load(from + at);
            }
        }
#pragma unroll
        for (int f = 0; f < kFlight; f++) {
            float dot = 0;
#pragma unroll
            for (int v = 0; v < kVectors; v++)
                if (rows[f] >= 0 && v * 256 + lane * 8 < job.dim)
#pragma unroll
                    for (int i = 0; i < 8; i++) dot += query[v][i] * x[f][v].value(i);
            dot = warp_sum(dot);
            if (first + key + f >= last) continue;
            float weight = rows[f] >= 0 ? expf(dot * job.scale - lse) : 0;
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

// Count this block in; true in all threads of the one that comes last, which sees what all wrote.
__device__ inline bool arrive(uint32_t* counter, uint32_t expected) {
    __shared__ uint32_t before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        before = atomicAdd(counter, 1u);
        if (before + 1 == expected) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    bool last = before + 1 == expected;
    __syncthreads();
    return last;
}

// One warp's head over all chunks.
__device__ inline void conclude_head(const Job& job, int64_t row, int chunks, int of_window) {
    int lane = threadIdx.x % 32;
    float4 total = {0, 0, 0, -INFINITY};
    for (int c = lane; c < chunks; c += 32) {
        float4 part = __ldcg(job.parts + row * chunks + c);
        (c < of_window ? total.x : total.y) += part.x;
        total.z += part.y;
        total.w = larger(total.w, part.z);
    }
    total.x = warp_sum(total.x), total.y = warp_sum(total.y), total.z = warp_sum(total.z);
    for (int offset = 16; offset > 0; offset /= 2)
        total.w = larger(total.w, __shfl_xor_sync(~0u, total.w, offset));
    if (lane == 0) job.rows[row] = total;
}

// All sampled tokens and heads together.
__device__ inline void conclude(const Job& job, int64_t samples) {
    __shared__ double sums[kWarps];
    __shared__ float largest[kWarps];
    double window = 0, entries = 0, entropy = 0, sinks = 0;
    float weight = -INFINITY, over = -INFINITY, under = -INFINITY;
    for (int64_t i = threadIdx.x; i < samples * job.heads; i += kThreads) {
        float4 row = __ldcg(job.rows + i);
        int64_t token = job.sample[i / job.heads], head = i % job.heads;
        float sum = row.x + row.y + expf(job.sink[head] - job.lse[token * job.heads + head]);
        over = larger(over, sum - 1), under = larger(under, 1 - sum);
        window += row.x, entries += row.y, entropy += row.z;
        weight = larger(weight, row.w);
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
__global__ void __launch_bounds__(kThreads, 1) softmax_kernel(const __grid_constant__ Job job) {
    let_next_start();
    wait_for_previous();
    int of_window = (int)((job.window.width + kKeys - 1) / kKeys), chunk = blockIdx.x;
    int64_t head = blockIdx.y * (int64_t)kWarps + threadIdx.x / 32;
    int64_t row = blockIdx.z * job.heads + head;
    bool in_window = chunk < of_window;
    const Pool& pool = in_window ? job.window : job.entries;
    int64_t first = (in_window ? chunk : chunk - of_window) * (int64_t)kKeys;
    if (head < job.heads) {
        float4 part = weigh<Q, K>(job, pool, job.sample[blockIdx.z], head, first,
                                  min(first + kKeys, pool.width));
        if (threadIdx.x % 32 == 0) job.parts[row * gridDim.x + chunk] = part;
    }
    uint32_t group = blockIdx.z * gridDim.y + blockIdx.y;
    if (!arrive(job.arrived + 1 + group, gridDim.x)) return;
    if (head < job.heads) conclude_head(job, row, gridDim.x, of_window);
    if (arrive(job.arrived, gridDim.y * gridDim.z)) conclude(job, gridDim.z);
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// out [8] = mean weight of the sink over all tokens and heads; over the sampled ones mean mass in the
// window and in the entries, mean entropy, largest weight, largest shortfall of a row's sum below 1,
// the sum furthest from 1. q [n, heads, dim] of `dtype`, pools of keys of `pool_dtype`, dim a multiple
// of 8 up to 512; parts holds 4 floats for each 16 keys of each pool and one more, for every sampled
// token and head; arrived [1 + samples * heads / 8, rounded up] uint32 is 0 before and after.
DSV4_EXPORT int dsv4_probe_softmax(const void* q, int dtype, const float* lse, const float* sink,
                                   const int64_t* sample, int64_t samples, const void* window,
                                   const int32_t* window_index, int64_t window_width,
                                   const void* entries, const int32_t* entry_index,
                                   int64_t entry_width, int pool_dtype, int64_t n, int64_t heads,
                                   int64_t dim, float scale, void* parts, uint32_t* arrived,
                                   double* out, void* stream) {
    if (dim % 8 || dim > kMostDim || samples < 1) return kUnsupported;
    int64_t chunks = ceil_div(window_width, kKeys) + ceil_div(entry_width, kKeys);
    float4* rows = (float4*)parts + samples * heads * chunks;
    Job job = {q,     lse,   sink, sample, {window, window_index, window_width},
               {entries, entry_index, entry_width}, n, heads, dim, scale, (float4*)parts, rows,
               arrived, out};
    dim3 grid((unsigned)chunks, (unsigned)ceil_div(heads, kWarps), (unsigned)samples);
    return with_dtype(dtype, [&](auto tag) {
        return with_dtype(pool_dtype, [&](auto pool_tag) {
            using Q = type_of<decltype(tag)>;
            using K = type_of<decltype(pool_tag)>;
            return launch(softmax_kernel<Q, K>, grid, kThreads, 0, stream, job);
        });
    });
}
