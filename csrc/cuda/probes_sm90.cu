// Statistics of many tensors in one launch, into a ring of steps; and time stamps between sites.

#include "launch.cuh"
#include "types.cuh"

// One tensor to look at, or some rows of one; engine/cuda_stats.py makes them.
typedef struct dsv4_probe_item {
    const void* data;
    const int64_t* index;  // the rows to look at, below 0 for none; null: all of them
    int64_t rows;
    int64_t cols;    // elements of a row; of kind kSums, the sums of a row
    int64_t last;    // elements of the last row; of kind kSums, the terms of a sum; of kind kValues,
                     // where in a step's row of the copies its elements go
    int64_t stride;  // elements from row to row
    int32_t dtype;   // enum dsv4_dtype; of kind kValues, the bytes of an integer: 4 or 8
    int32_t kind;    // enum Kind
    int32_t slot;    // where in a step's row of the ring the result goes
    int32_t rows_per_chunk;
    int32_t first_chunk;  // a chunk is what one block reads
    int32_t sum_stride;   // of kind kSums: elements from sum to sum and from term to term
    int32_t term_stride;
    int32_t unused;
} dsv4_probe_item;

namespace dsv4 {
namespace {

enum Kind { kMoments = 0, kSums = 1, kValues = 2 };

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGroup = 8;                   // elements that a thread takes at once
constexpr int kFlight = 4;                  // groups it has under way
constexpr int kFields = 9;                  // of a result
constexpr int kBins = 256;                  // exponents of float32
constexpr int kMostItems = 96;              // of a launch
constexpr uint32_t kInfinity = 0x7f800000;  // magnitudes from here on are not finite

struct Job {
    double* ring;           // [steps, slots, kFields]
    uint32_t* exponents;    // [steps, slots, kBins], or null
    int64_t* copies;        // [steps, width] integers as they are, or null
    int64_t* step;          // the step that is written; null: always the first
    double* scratch;        // a Part of every chunk
    uint32_t* bin_scratch;  // [chunks, kBins], or null
    uint32_t* arrived;      // [kMostItems + 1] chunks done of each item, and in all; 0 between launches
    int64_t steps;
    int64_t slots;
    int64_t width;
    int32_t count;
    int32_t advance;  // whether the step is over with this launch
    dsv4_probe_item items[kMostItems];
};

// Counts of all values, moments of the finite ones. Magnitudes are compared as bits.
struct Part {
    int64_t seen = 0, nan = 0, inf = 0, minus_inf = 0, zero = 0, peaks = 0, peak = 0;
    double sum = 0, squares = 0;
};
constexpr int kPartSize = sizeof(Part) / sizeof(double);

// The same while a block reads its chunk, which has fewer than 2^32 elements.
struct Count {
    uint32_t seen = 0, nan = 0, inf = 0, minus_inf = 0, zero = 0, peaks = 0, peak = 0;
    double sum = 0, squares = 0;

    __device__ void add_odd(float x, uint32_t magnitude) {
        if (magnitude >= kInfinity) {
            nan += magnitude > kInfinity;
            inf += magnitude == kInfinity;
            minus_inf += magnitude == kInfinity && x < 0;
        } else {
            zero += magnitude == 0;
            peaks = magnitude > peak ? 0 : peaks;
            peak = magnitude > peak ? magnitude : peak;
            peaks += magnitude == peak;
            sum += x;
            squares += (double)x * x;
        }
    }

    __device__ void add_finite(const float (&x)[kGroup], const uint32_t (&magnitude)[kGroup]) {
        double s[kGroup], q[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; i++) {
            zero += magnitude[i] == 0;
            peaks = magnitude[i] > peak ? 0 : peaks;
            peak = magnitude[i] > peak ? magnitude[i] : peak;
            peaks += magnitude[i] == peak;
            s[i] = x[i];
            q[i] = s[i] * s[i];
        }
#pragma unroll
        for (int half = kGroup / 2; half > 0; half /= 2)
#pragma unroll
            for (int i = 0; i < half; i++) s[i] += s[i + half], q[i] += q[i + half];
        sum += s[0];
        squares += q[0];
    }
};

template <class C> __device__ inline void merge(C& a, const C& b) {
    a.seen += b.seen;
    a.nan += b.nan;
    a.inf += b.inf;
    a.minus_inf += b.minus_inf;
    a.zero += b.zero;
    a.peaks = b.peak > a.peak ? b.peaks : b.peak == a.peak ? a.peaks + b.peaks : a.peaks;
    a.peak = b.peak > a.peak ? b.peak : a.peak;
    a.sum += b.sum;
    a.squares += b.squares;
}

template <class C> __device__ inline C shuffled(const C& a, int offset) {
    C b;
    b.seen = __shfl_xor_sync(~0u, a.seen, offset);
    b.nan = __shfl_xor_sync(~0u, a.nan, offset);
    b.inf = __shfl_xor_sync(~0u, a.inf, offset);
    b.minus_inf = __shfl_xor_sync(~0u, a.minus_inf, offset);
    b.zero = __shfl_xor_sync(~0u, a.zero, offset);
    b.peaks = __shfl_xor_sync(~0u, a.peaks, offset);
    b.peak = __shfl_xor_sync(~0u, a.peak, offset);
    b.sum = __shfl_xor_sync(~0u, a.sum, offset);
    b.squares = __shfl_xor_sync(~0u, a.squares, offset);
    return b;
}

// All threads' parts together, in thread 0, in an order that never changes.
template <class C> __device__ inline C merge_block(C mine, C* shared) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) merge(mine, shuffled(mine, offset));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kWarps; warp++) merge(mine, shared[warp]);
    __syncthreads();
    return mine;
}

// ---------------------------------------------------------------- one chunk

// Elements [0, count) at `from`, at most kGroup of them; those beyond are 0.
template <class T> __device__ inline void load_group(const T* from, int count, float (&x)[kGroup]) {
    constexpr int V = Vector<T>::kSize < kGroup ? Vector<T>::kSize : kGroup;
    if (count >= kGroup && (uintptr_t)from % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kGroup; i += V) {
            Vector<T, V> v = load_vector<T, V>(from + i);
#pragma unroll
            for (int j = 0; j < V; j++) x[i + j] = to_float(v.at[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kGroup; i++) x[i] = i < count ? to_float(from[i]) : 0;
    }
}

template <bool kExponents>
__device__ inline void add_group(const float (&x)[kGroup], int count, Count& c, uint32_t* bins) {
    uint32_t magnitude[kGroup], largest = 0;
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
        magnitude[i] = __float_as_uint(x[i]) & 0x7fffffff;
        largest = max(largest, magnitude[i]);
    }
    c.seen += count;
    if (count == kGroup && largest < kInfinity) {
        c.add_finite(x, magnitude);
    } else {
#pragma unroll
        for (int i = 0; i < kGroup; i++)
            if (i < count) c.add_odd(x[i], magnitude[i]);
    }
    if (kExponents)
#pragma unroll
        for (int i = 0; i < kGroup; i++)
            if (i < count) atomicAdd(bins + (magnitude[i] >> 23), 1u);
}

// The block's chunk of an item: whole rows, eight neighbours of a row to a thread. Which thread takes
// what does not depend on alignment or dtype, so that equal values give equal bits.
template <class T, bool kExponents>
__device__ inline void read_chunk(const dsv4_probe_item& item, int64_t chunk, Count& c,
                                  uint32_t* bins) {
    int64_t first = chunk * item.rows_per_chunk;
    int rows = (int)min((int64_t)item.rows_per_chunk, item.rows - first);
    uint32_t groups = (uint32_t)((item.cols + kGroup - 1) / kGroup);
    uint32_t total = rows > 0 ? rows * groups : 0;
    for (uint32_t g = threadIdx.x; g < total; g += kThreads * kFlight) {
        float x[kFlight][kGroup];
        int counts[kFlight];
#pragma unroll
        for (int f = 0; f < kFlight; f++) {
            uint32_t at = g + f * kThreads, row = at / groups;
            int64_t col = (int64_t)(at - row * groups) * kGroup, r = first + row;
            counts[f] = 0;
            if (at >= total) continue;
            int64_t length = (r == item.rows - 1 ? item.last : item.cols) - col;
            int64_t place = item.index ? item.index[r] : r;
            if (place < 0 || length <= 0) continue;
            counts[f] = (int)min(length, (int64_t)kGroup);
            load_group((const T*)item.data + place * item.stride + col, counts[f], x[f]);
        }
#pragma unroll
        for (int f = 0; f < kFlight; f++)
            if (counts[f] > 0) add_group<kExponents>(x[f], counts[f], c, bins);
    }
}

__device__ inline float load_any(const void* data, int dtype, int64_t at) {
    if (dtype == DSV4_F32) return ((const float*)data)[at];
    if (dtype == DSV4_BF16) return to_float(((const bf16*)data)[at]);
    return to_float(((const __half*)data)[at]);
}

// ---------------------------------------------------------------- results

__device__ inline void write_moments(const Part& p, double* out) {
    int64_t finite = p.seen - p.nan - p.inf;
    double count = finite > 0 ? (double)finite : 1;
    out[0] = (double)finite;
    out[1] = (double)p.nan;
    out[2] = (double)p.inf;
    out[3] = (double)p.minus_inf;
    out[4] = (double)p.zero;
    out[5] = (double)p.peaks;
    out[6] = (double)__uint_as_float((uint32_t)p.peak);
    out[7] = sqrt(p.squares / count);
    out[8] = p.sum / count;
}

__device__ inline Part widened(const Count& c) {
    Part p;
    p.seen = c.seen, p.nan = c.nan, p.inf = c.inf, p.minus_inf = c.minus_inf, p.zero = c.zero;
    p.peaks = c.peaks, p.peak = c.peak, p.sum = c.sum, p.squares = c.squares;
    return p;
}

// Sums along an axis: how many, how many of them NaN, and of the others the lowest, the highest, the
// mean. One block takes all of them.
__device__ inline void write_sums(const dsv4_probe_item& item, double* shared, double* out) {
    double low = INFINITY, high = -INFINITY, total = 0, nan = 0;
    for (int64_t s = threadIdx.x; s < item.rows * item.cols; s += kThreads) {
        int64_t at = s / item.cols * item.stride + s % item.cols * item.sum_stride;
        double sum = 0;
        for (int64_t t = 0; t < item.last; t++)
            sum += load_any(item.data, item.dtype, at + t * item.term_stride);
        if (isnan(sum)) {
            nan += 1;
        } else {
            low = fmin(low, sum), high = fmax(high, sum), total += sum;
        }
    }
    double values[4] = {low, high, total, nan};
    for (int v = 0; v < 4; v++) shared[v * kThreads + threadIdx.x] = values[v];
    __syncthreads();
    if (threadIdx.x >= 32) return;
    for (int t = threadIdx.x + 32; t < kThreads; t += 32) {
        low = fmin(low, shared[t]), high = fmax(high, shared[kThreads + t]);
        total += shared[2 * kThreads + t], nan += shared[3 * kThreads + t];
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        low = fmin(low, __shfl_xor_sync(~0u, low, offset));
        high = fmax(high, __shfl_xor_sync(~0u, high, offset));
        total += __shfl_xor_sync(~0u, total, offset);
        nan += __shfl_xor_sync(~0u, nan, offset);
    }
    if (threadIdx.x > 0) return;
    double sums = (double)(item.rows * item.cols);
    double good = sums - nan > 0 ? sums - nan : 1;
    for (int f = 0; f < kFields; f++) out[f] = 0;
    out[0] = sums, out[1] = nan, out[6] = low, out[7] = high, out[8] = total / good;
}

__device__ inline void copy_values(const dsv4_probe_item& item, int64_t* out) {
    for (int64_t i = threadIdx.x; i < item.rows; i += kThreads)
        out[i] = item.dtype == 8 ? ((const int64_t*)item.data)[i] : ((const int32_t*)item.data)[i];
}

// Count this block in; true in all threads of the one that comes last, which sees what all wrote.
__device__ inline bool arrive(uint32_t* counter, uint32_t expected) {
    __shared__ uint32_t before;
    if (threadIdx.x == 0) {
        __threadfence();
        before = atomicAdd(counter, 1u);
        if (before + 1 == expected) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    bool last = before + 1 == expected;
    __syncthreads();
    return last;
}

// Writes the chunk's part; the block that comes last adds all parts of the item, in their order.
template <bool kExponents>
__device__ inline void finish_item(const Job& job, int number, int chunks, const Count& mine,
                                   uint32_t* bins, Part* shared, double* out, uint32_t* bins_out) {
    if (chunks == 1) {
        if (threadIdx.x == 0) write_moments(widened(mine), out);
        if (kExponents) bins_out[threadIdx.x] = bins[threadIdx.x];
        return;
    }
    Part* parts = (Part*)(job.scratch) + job.items[number].first_chunk;
    uint32_t* all_bins = job.bin_scratch + (int64_t)job.items[number].first_chunk * kBins;
    int chunk = blockIdx.x - job.items[number].first_chunk;
    if (threadIdx.x == 0) parts[chunk] = widened(mine);
    if (kExponents) {
        all_bins[(int64_t)chunk * kBins + threadIdx.x] = bins[threadIdx.x];
        __threadfence();
        __syncthreads();
    }
    if (!arrive(job.arrived + number, chunks)) return;
    Part total;
    for (int c = threadIdx.x; c < chunks; c += kThreads) {
        Part part;
        const double* from = (const double*)(parts + c);
        double* to = (double*)&part;
#pragma unroll
        for (int i = 0; i < kPartSize; i++) to[i] = __ldcg(from + i);
        merge(total, part);
    }
    total = merge_block(total, shared);
    if (threadIdx.x == 0) write_moments(total, out);
    if (kExponents) {
        uint32_t sum = 0;
        for (int c = 0; c < chunks; c++) sum += __ldcg(all_bins + (int64_t)c * kBins + threadIdx.x);
        bins_out[threadIdx.x] = sum;
    }
}

__device__ inline int find_item(const Job& job, int chunk) {
    int low = 0, high = job.count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (job.items[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return low;
}

template <bool kExponents>
__global__ void __launch_bounds__(kThreads) stats_kernel(const __grid_constant__ Job job) {
    __shared__ Part shared_parts[kWarps];
    __shared__ Count shared_counts[kWarps];
    __shared__ double shared_sums[4 * kThreads];
    __shared__ uint32_t bins[kExponents ? kBins : 1];
    static_assert(kBins == kThreads);
    int number = find_item(job, blockIdx.x);
    const dsv4_probe_item& item = job.items[number];
    int next = number + 1 < job.count ? job.items[number + 1].first_chunk : gridDim.x;
    let_next_start();
    wait_for_previous();
    int64_t row = job.step ? *(volatile int64_t*)job.step % job.steps : 0;
    int64_t slot = row * job.slots + item.slot;
    double* out = job.ring + slot * kFields;
    if (item.kind == kValues) {
        copy_values(item, job.copies + row * job.width + item.last);
    } else if (item.kind == kSums) {
        write_sums(item, shared_sums, out);
    } else {
        if (kExponents) {
            bins[threadIdx.x] = 0;
            __syncthreads();
        }
        Count mine;
        int64_t chunk = blockIdx.x - item.first_chunk;
        if (item.dtype == DSV4_F32)
            read_chunk<float, kExponents>(item, chunk, mine, bins);
        else if (item.dtype == DSV4_BF16)
            read_chunk<bf16, kExponents>(item, chunk, mine, bins);
        else
            read_chunk<__half, kExponents>(item, chunk, mine, bins);
        mine = merge_block(mine, shared_counts);
        finish_item<kExponents>(job, number, next - item.first_chunk, mine, bins, shared_parts, out,
                                job.exponents + slot * kBins);
    }
    if (!job.advance) return;
    __syncthreads();
    if (arrive(job.arrived + kMostItems, gridDim.x) && threadIdx.x == 0) ++*job.step;
}

__device__ inline int64_t nanoseconds() {
    int64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

__global__ void stamp_kernel(int64_t* ring, int64_t* step, int64_t steps, int64_t slots, int slot,
                             int begin) {
    int64_t done = *(volatile int64_t*)step;
    if (begin) *step = ++done;
    ring[(done - 1) % steps * slots + slot] = nanoseconds();
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// Statistics of `count` items (host memory, at most 96, chunks ascending, `chunks` in all) into row
// *step of the ring. scratch holds 9 doubles a chunk, bin_scratch (with `exponents`) 256 uint32;
// arrived 97 uint32, all 0 before and after.
DSV4_EXPORT int dsv4_probe_stats(const dsv4_probe_item* items, int64_t count, int64_t chunks,
                                 double* ring, uint32_t* exponents, int64_t* copies, int64_t* step,
                                 int64_t steps, int64_t slots, int64_t width, double* scratch,
                                 uint32_t* bin_scratch, uint32_t* arrived, int advance,
                                 void* stream) {
    if (count < 1 || count > kMostItems || chunks < count || steps < 1) return kUnsupported;
    if (advance && !step) return kUnsupported;
    Job job;
    job.ring = ring, job.exponents = exponents, job.copies = copies, job.step = step;
    job.scratch = scratch, job.bin_scratch = bin_scratch, job.arrived = arrived;
    job.steps = steps, job.slots = slots, job.width = width;
    job.count = (int32_t)count, job.advance = advance;
    for (int64_t i = 0; i < count; i++) job.items[i] = items[i];
    auto kernel = exponents ? stats_kernel<true> : stats_kernel<false>;
    return launch(kernel, dim3((unsigned)chunks), kThreads, 0, stream, job);
}

// The GPU's clock in nanoseconds into slot `slot` of ring [steps, slots], once all before it in the
// stream is done: in the row of step *step, counted from 1. `begin` starts the next step first.
DSV4_EXPORT int dsv4_probe_stamp(int64_t* ring, int64_t* step, int64_t steps, int64_t slots,
                                 int slot, int begin, void* stream) {
    if (steps < 1 || slot < 0 || slot >= slots) return kUnsupported;
    stamp_kernel<<<1, 1, 0, (cudaStream_t)stream>>>(ring, step, steps, slots, slot, begin);
    return (int)cudaGetLastError();
}
