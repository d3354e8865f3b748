// Where the mass of attention weights goes, recomputed from queries, keys and the op's own lse.

#include "elements.cuh"
#include "launch.cuh"

namespace dsv4 {
namespace {

// Small blocks, which find room beside those of a layer's products, and many, which are soon gone again.
constexpr int kWarps = 4, kThreads = 32 * kWarps, kResident = 4;
constexpr int kBlocks = 40;  // of a token: a share of its keys each
constexpr int kHeads = 16;   // of a tile, the rows of a matrix instruction; a warp has one at a time
constexpr int kKeys = 8;     // of a group, its columns
constexpr int kGroups = 2, kSteps = 4;  // that a warp has under way: groups, and 32 elements of rows
constexpr int kMostHeads = 128, kMostSamples = 8;
constexpr int kFields = 8;  // of a result

struct Pool {
    const bf16* keys;      // [rows, dim]
    const int32_t* index;  // [n, width], -1 for none
    int64_t width;
};

// Of one head.
struct alignas(16) Masses {
    float window = 0, entries = 0, entropy = 0, largest = -INFINITY;
};

// What a block finds.
struct Share {
    Masses masses[kMostHeads];
    float sinks[kWarps];
};

struct Job {
    const bf16* q;      // [n, heads, dim]
    const float* lse;   // [n, heads]
    const float* sink;  // [heads]
    Pool window, entries;
    int64_t n;
    int heads, dim;
    float scale;
    int64_t sample[kMostSamples];  // tokens that are looked at
    Share* shares;                 // [samples, kBlocks]
    double* out;                   // [samples, kFields]
};

__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }  // NaN stays

__device__ inline void add(Masses& a, const Masses& b) {
    a.window += b.window, a.entries += b.entries, a.entropy += b.entropy;
    a.largest = larger(a.largest, b.largest);
}

__device__ inline void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What a lane of a warp knows: heads `head` and head + 8, keys 2 * t and 2 * t + 1 of a group. In
// which order a product's terms come is free, so a lane takes eight neighbours of a row at once.
struct Tile {
    const Job& job;
    const int64_t token;
    const int lane = threadIdx.x % 32, t = lane % 4, head;
    const int of_window;  // groups
    Masses of[2];

    __device__ Tile(const Job& job, int64_t token, int first)
        : job(job), token(token), head(first + lane / 4),
          of_window((int)((job.window.width + kKeys - 1) / kKeys)) {}

    __device__ bool has(int row) const { return head + 8 * row < job.heads; }

    // Where the row of key lane / 4 of a group begins in its pool; null for none.
    __device__ const bf16* key(int group, int last) const {
        bool in_window = group < of_window;
        const Pool& pool = in_window ? job.window : job.entries;
        int64_t at = (int64_t)(in_window ? group : group - of_window) * kKeys + lane / 4;
        bool exists = group < last && at < pool.width;
        // What does not exist is read from somewhere else, so that no load waits for a branch.
        int row = *(exists ? pool.index + token * pool.width + at : (const int32_t*)job.lse);
        return exists && row >= 0 ? pool.keys + (int64_t)row * job.dim : nullptr;
    }

    // Adds the products of 32 * kSteps elements from `from` on, eight a lane and step; with kSteps = 1
    // those past the end of a row are 0.
    template <int kSteps>
    __device__ void multiply_at(float (&logits)[kGroups][4], const bf16* const (&queries)[2],
                                const bf16* const (&keys)[kGroups], int from) const {
        const bool inside = kSteps > 1 || from + 8 * t < job.dim;
        const int at = inside ? from + 8 * t : 0;
        uint4 a[kSteps][2], b[kSteps][kGroups];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
#pragma unroll
            for (int i = 0; i < 2; i++) a[s][i] = *(const uint4*)(queries[i] + at + 32 * s);
#pragma unroll
            for (int j = 0; j < kGroups; j++) b[s][j] = *(const uint4*)(keys[j] + at + 32 * s);
        }
        if (!inside) {
#pragma unroll
            for (int i = 0; i < 2; i++) a[0][i] = {};
#pragma unroll
            for (int j = 0; j < kGroups; j++) b[0][j] = {};
        }
#pragma unroll
        for (int s = 0; s < kSteps; s++)
#pragma unroll
            for (int j = 0; j < kGroups; j++) {
                uint4 low = a[s][0], high = a[s][1], key = b[s][j];
                multiply(logits[j], low.x, high.x, low.y, high.y, key.x, key.y);
                multiply(logits[j], low.z, high.z, low.w, high.w, key.z, key.w);
            }
    }

    // The groups [first, last), kGroups of them at most.
    __device__ void weigh(int first, int last) {
        const bf16 *keys[kGroups], *queries[2];
        float logits[kGroups][4] = {};
        uint32_t exist[kGroups];  // bit 4 * key
#pragma unroll
        for (int i = 0; i < 2; i++)
            queries[i] = job.q + (token * job.heads + (has(i) ? head + 8 * i : 0)) * job.dim;
#pragma unroll
        for (int j = 0; j < kGroups; j++) keys[j] = key(first + j, last);
#pragma unroll
        for (int j = 0; j < kGroups; j++) {
            exist[j] = __ballot_sync(~0u, keys[j] != nullptr);
            if (!keys[j]) keys[j] = queries[0];
        }
        float lse[2];
#pragma unroll
        for (int row = 0; row < 2; row++)
            lse[row] = has(row) ? job.lse[token * job.heads + head + 8 * row] : 0;
        int from = 0;
#pragma unroll 1
        for (; from + 32 * kSteps <= job.dim; from += 32 * kSteps)
            multiply_at<kSteps>(logits, queries, keys, from);
#pragma unroll 1
        for (; from < job.dim; from += 32) multiply_at<1>(logits, queries, keys, from);
#pragma unroll
        for (int j = 0; j < kGroups; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (!(exist[j] >> 4 * (2 * t + i % 2) & 1)) continue;
                Masses& mine = of[i / 2];
                float log_weight = logits[j][i] * job.scale - lse[i / 2];
                float weight = expf(log_weight);
                (first + j < of_window ? mine.window : mine.entries) += weight;
                mine.entropy -= weight > 0 ? weight * log_weight : weight;  // NaN stays NaN
                mine.largest = larger(mine.largest, weight);
            }
        }
    }

    // Both heads over all keys of the groups, in lanes with t = 0.
    __device__ void finish() {
        for (int row = 0; row < 2; row++)
            for (int offset = 1; offset < 4; offset *= 2) {
                Masses other;
                other.window = __shfl_xor_sync(~0u, of[row].window, offset);
                other.entries = __shfl_xor_sync(~0u, of[row].entries, offset);
                other.entropy = __shfl_xor_sync(~0u, of[row].entropy, offset);
                other.largest = __shfl_xor_sync(~0u, of[row].largest, offset);
                add(of[row], other);
            }
    }
};

// All blocks share all tokens' sinks among them: this warp's part.
__device__ inline float sinks_of(const Job& job) {
    const int64_t blocks = (int64_t)gridDim.x * kBlocks, block = blockIdx.x * kBlocks + blockIdx.y;
    float sum = 0;
    for (int64_t i = block * kThreads + threadIdx.x; i < job.n * job.heads; i += blocks * kThreads)
        sum += expf(job.sink[i % job.heads] - job.lse[i]);
    return warp_sum(sum);
}

__global__ void __launch_bounds__(kThreads, kResident)
    softmax_kernel(const __grid_constant__ Job job) {
    const int warp = threadIdx.x / 32;
    const int64_t token = job.sample[blockIdx.x];
    Share& mine = job.shares[blockIdx.x * kBlocks + blockIdx.y];
    let_next_start();
    wait_for_previous();
    const float sinks = sinks_of(job);
    if (threadIdx.x % 32 == 0) mine.sinks[warp] = sinks;
    const int groups = (int)((job.window.width + kKeys - 1) / kKeys +
                             (job.entries.width + kKeys - 1) / kKeys);
    const int each = (groups + kBlocks - 1) / kBlocks;
    const int first = min((int)blockIdx.y * each, groups), last = min(first + each, groups);
    for (int head = warp * kHeads; head < job.heads; head += kWarps * kHeads) {
        Tile tile(job, token, head);
        for (int group = first; group < last; group += kGroups) tile.weigh(group, last);
        tile.finish();
        for (int row = 0; row < 2; row++)
            if (tile.t == 0 && tile.has(row)) mine.masses[tile.head + 8 * row] = tile.of[row];
    }
}

// One block a token, a thread a head: all shares of the keys, then all heads.
__global__ void __launch_bounds__(kMostHeads) conclude_kernel(const __grid_constant__ Job job) {
    constexpr int kSums = 4, kAll = 7;  // the first ones are summed, of the others the largest is taken
    __shared__ double partial[kMostHeads / 32][kFields];
    const int head = threadIdx.x, lane = head % 32;
    const Share* shares = job.shares + blockIdx.x * kBlocks;
    const int64_t row = job.sample[blockIdx.x] * job.heads + head;
    let_next_start();
    wait_for_previous();
    double values[kAll] = {0, 0, 0, 0, -INFINITY, -INFINITY, -INFINITY};
    for (int i = head; i < kBlocks * kWarps; i += kMostHeads)
        values[0] += shares[i / kWarps].sinks[i % kWarps];
    if (head < job.heads) {
        const float sink = expf(job.sink[head] - job.lse[row]);
        Masses all;
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
            Masses found;
            *(float4*)&found = *(const float4*)&shares[b].masses[head];
            add(all, found);
        }
        float over = all.window + all.entries + sink - 1;
        values[1] = all.window, values[2] = all.entries, values[3] = all.entropy;
        values[4] = all.largest, values[5] = over, values[6] = -over;
    }
    const auto join = [](int f, double a, double b) {
        return f < kSums ? a + b : b > a || b != b ? b : a;  // NaN stays
    };
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
        for (int f = 0; f < kAll; f++)
            values[f] = join(f, values[f], __shfl_xor_sync(~0u, values[f], offset));
    if (lane == 0)
#pragma unroll
        for (int f = 0; f < kAll; f++) partial[head / 32][f] = values[f];
    __syncthreads();
    if (head >= kFields) return;
    double value = head < kAll ? partial[0][head] : 0;
    for (int w = 1; w < kMostHeads / 32 && head < kAll; w++) value = join(head, value, partial[w][head]);
    job.out[blockIdx.x * kFields + head] = value;
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// out [samples, 8], sums over heads: the sink's weight, over tokens that the samples share among them;
// of the sampled token the mass in the window and in the entries, the entropy; then over its heads
// the largest weight, how far a row's sum lies above 1 at most, and below; 0. q [n, heads, dim] and
// pools of keys bfloat16, heads up to 128, dim a multiple of 8; sample in host memory, up to 8 tokens;
// scratch 40 * 2064 bytes a sample.
DSV4_EXPORT int dsv4_probe_softmax(const void* q, const float* lse, const float* sink,
                                   const int64_t* sample, int64_t samples, const void* window,
                                   const int32_t* window_index, int64_t window_width,
                                   const void* entries, const int32_t* entry_index,
                                   int64_t entry_width, int64_t n, int64_t heads, int64_t dim,
                                   float scale, void* scratch, double* out, void* stream) {
    if (dim % 8 || heads > kMostHeads || samples < 1 || samples > kMostSamples) return kUnsupported;
    Job job = {(const bf16*)q, lse, sink, {(const bf16*)window, window_index, window_width},
               {(const bf16*)entries, entry_index, entry_width}, n, (int)heads, (int)dim, scale};
    for (int64_t i = 0; i < samples; i++) job.sample[i] = sample[i];
    static_assert(sizeof(Share) == 2064);
    job.shares = (Share*)scratch, job.out = out;
    int status = launch(softmax_kernel, dim3((unsigned)samples, kBlocks), kThreads, 0, stream, job);
    if (status) return status;
    return launch(conclude_kernel, dim3((unsigned)samples), kMostHeads, 0, stream, job);
}
