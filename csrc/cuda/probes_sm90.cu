// Statistics of many tensors in one launch, into a ring of steps; and time stamps between sites.

#include "launch.cuh"
#include "probe_moments.cuh"

namespace dsv4 {
namespace {

constexpr int kFields = 9;      // of a result
constexpr int kMostItems = 96;  // of a launch

struct Job {
    double* ring;           // [steps, slots, kFields]
    uint32_t* exponents;    // [steps, slots, kBins], or null
    int64_t* copies;        // [steps, width] integers as they are, or null
    const int64_t* step;    // steps begun, of which the last is written; null: always row 0
    Part* scratch;          // of every chunk
    uint32_t* bin_scratch;  // [chunks, kBins], or null
    uint32_t* arrived;      // [kMostItems] chunks done of each item; 0 between launches
    int64_t slots;
    int64_t width;
    uint32_t steps;
    int32_t count;
    int32_t first_chunks[kMostItems];  // of the items, side by side so that a search stays in the cache
    dsv4_probe_item items[kMostItems];
};

// Where the results of an item go: in the row of the step. Its number is under way while the item is
// read, and waited for where an address is wanted.
struct Place {
    const Job& job;
    const dsv4_probe_item& item;
    int64_t begun = 1;

    __device__ Place(const Job& job, const dsv4_probe_item& item) : job(job), item(item) {
        // threadIdx.y is 0: what the compiler knew to be the same in all threads, it would wait for here.
        if (job.step)
            asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(begun) : "l"(job.step + threadIdx.y));
    }
    __device__ int64_t row() const { return (uint32_t)(max(begun, (int64_t)1) - 1) % job.steps; }
    __device__ int64_t slot() const { return row() * job.slots + item.slot; }
    __device__ double* fields() const { return job.ring + slot() * kFields; }
    __device__ uint32_t* bins() const { return job.exponents + slot() * kBins; }
    __device__ int64_t* copies() const { return job.copies + row() * job.width + item.last; }
};

// ---------------------------------------------------------------- an item's result

// By one thread.
__device__ inline void write_moments(const Part& p, double* out) {
    out[0] = p.seen - p.nan - p.inf, out[1] = p.nan, out[2] = p.inf, out[3] = p.minus_inf;
    out[4] = p.zero, out[5] = p.peaks, out[6] = p.peak, out[7] = p.squares, out[8] = p.sum;
}

// Count this block in; true in all threads of the one that comes last, which sees what all others'
// first threads wrote.
__device__ inline bool arrive(uint32_t* counter, uint32_t expected) {
    __shared__ uint32_t before;
    if (threadIdx.x == 0) {
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                     : "=r"(before)
                     : "l"(counter)
                     : "memory");
        if (before + 1 == expected) *counter = 0;
    }
    __syncthreads();
    return before + 1 == expected;
}

__device__ inline Part load_part(const Part* from) {
    union {
        Part part;
        double2 words[sizeof(Part) / sizeof(double2)];
    } both{};
    static_assert(sizeof(Part) % sizeof(double2) == 0);
#pragma unroll
    for (int i = 0; i < (int)(sizeof(Part) / sizeof(double2)); i++)
        both.words[i] = __ldcg((const double2*)from + i);
    return both.part;
}

__device__ inline void add_part(Part& a, const Part& b) {
    a.seen += b.seen, a.nan += b.nan, a.inf += b.inf, a.minus_inf += b.minus_inf, a.zero += b.zero;
    a.peaks = b.peak > a.peak ? b.peaks : b.peak == a.peak ? a.peaks + b.peaks : a.peaks;
    a.peak = fmaxf(a.peak, b.peak);
    a.sum += b.sum, a.squares += b.squares;
}

// Writes the chunk's part; the block that comes last adds all parts of the item, in their order.
template <bool kExponents>
__device__ inline void finish_item(const Job& job, int number, int chunks, const Part& mine,
                                   uint32_t* bins, Part* shared, const Place& place) {
    if (chunks == 1) {
        if (threadIdx.x == 0) write_moments(mine, place.fields());
        if (kExponents)
            for (int b = threadIdx.x; b < kBins; b += kThreads) place.bins()[b] = bins[b];
        return;
    }
    int first = job.first_chunks[number], chunk = blockIdx.x - first;
    Part* parts = job.scratch + first;
    uint32_t* all_bins = job.bin_scratch + (int64_t)first * kBins;
    if (threadIdx.x == 0) parts[chunk] = mine;
    if (kExponents) {
        for (int b = threadIdx.x; b < kBins; b += kThreads)
            all_bins[(int64_t)chunk * kBins + b] = bins[b];
        __threadfence();
        __syncthreads();
    }
    if (!arrive(job.arrived + number, chunks)) return;
    Part total;
    constexpr int kMany = 3;  // loads under way
#pragma unroll 1
    for (int c = threadIdx.x; c < chunks; c += kMany * kThreads) {
        Part found[kMany];
#pragma unroll
        for (int i = 0; i < kMany; i++)
            if (c + i * kThreads < chunks) found[i] = load_part(parts + c + i * kThreads);
#pragma unroll
        for (int i = 0; i < kMany; i++) add_part(total, found[i]);
    }
    total = merge_block(total, shared);
    if (threadIdx.x == 0) write_moments(total, place.fields());
    if (kExponents)
        for (int b = threadIdx.x; b < kBins; b += kThreads) {
            uint32_t sum = 0;
            for (int c = 0; c < chunks; c++) sum += __ldcg(all_bins + (int64_t)c * kBins + b);
            place.bins()[b] = sum;
        }
}

// ---------------------------------------------------------------- sums, integers

__device__ inline float load_any(const void* data, int dtype, int64_t at) {
    if (dtype == DSV4_F32) return ((const float*)data)[at];
    if (dtype == DSV4_BF16) return to_float(((const bf16*)data)[at]);
    return to_float(((const __half*)data)[at]);
}

struct Spread {
    double low = INFINITY, high = -INFINITY, total = 0, nan = 0;
};

__device__ inline Spread merge_warp(Spread s) {
    for (int offset = 16; offset > 0; offset /= 2) {
        s.low = fmin(s.low, __shfl_xor_sync(~0u, s.low, offset));
        s.high = fmax(s.high, __shfl_xor_sync(~0u, s.high, offset));
    }
    s.total = sum_of_lanes(s.total);
    s.nan = sum_of_lanes(s.nan);
    return s;
}

// Sums along an axis: how many, how many of them NaN, and of the others the lowest, the highest, the
// total. One block takes all of them.
__device__ inline void write_sums(const dsv4_probe_item& item, Spread* shared, const Place& place) {
    Spread mine;
    const uint32_t cols = (uint32_t)item.cols, count = (uint32_t)item.rows * cols;
    for (uint32_t s = threadIdx.x; s < count; s += kThreads) {
        uint32_t row = s / cols;
        int64_t at = row * item.stride + (int64_t)(s - row * cols) * item.sum_stride;
        double sum = 0;
        for (int64_t t = 0; t < item.last; t++)
            sum += load_any(item.data, item.dtype, at + t * item.term_stride);
        if (isnan(sum)) {
            mine.nan += 1;
        } else {
            mine.low = fmin(mine.low, sum), mine.high = fmax(mine.high, sum), mine.total += sum;
        }
    }
    mine = merge_warp(mine);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    mine = merge_warp(threadIdx.x < kWarps ? shared[threadIdx.x] : Spread());
    if (threadIdx.x > 0) return;
    double* out = place.fields();
    for (int f = 0; f < kFields; f++) out[f] = 0;
    out[0] = count, out[1] = mine.nan, out[6] = mine.low, out[7] = mine.high, out[8] = mine.total;
}

__device__ inline void copy_values(const dsv4_probe_item& item, int64_t* out) {
    for (int64_t i = threadIdx.x; i < item.rows; i += kThreads)
        out[i] = item.dtype == 8 ? ((const int64_t*)item.data)[i] : ((const int32_t*)item.data)[i];
}

template <class T> __device__ inline bool is_empty(T x) { return to_float(x) == -INFINITY; }
__device__ inline bool is_empty(int32_t x) { return x < 0; }
__device__ inline bool is_empty(int64_t x) { return x < 0; }

// How many elements of each row are -infinity, or below 0 of integers; a warp takes a row.
template <class T> __device__ inline void count_empty(const dsv4_probe_item& item, int64_t* out) {
    int64_t first = (blockIdx.x - item.first_chunk) * (int64_t)item.rows_per_chunk;
    int64_t last = min(first + item.rows_per_chunk, item.rows);
    for (int64_t row = first + threadIdx.x / 32; row < last; row += kWarps) {
        const T* from = (const T*)item.data + row * item.stride;
        uint32_t count = 0;
        for (int64_t c = threadIdx.x % 32; c < item.cols; c += 32) count += is_empty(from[c]);
        count = __reduce_add_sync(~0u, count);
        if (threadIdx.x % 32 == 0) out[row] = count;
    }
}

__device__ inline void count_empty_of(const dsv4_probe_item& item, int64_t* out) {
    switch (item.dtype) {
        case DSV4_F32: return count_empty<float>(item, out);
        case DSV4_BF16: return count_empty<bf16>(item, out);
        case DSV4_F16: return count_empty<__half>(item, out);
        case 4: return count_empty<int32_t>(item, out);
        case 8: return count_empty<int64_t>(item, out);
    }
}

// ---------------------------------------------------------------- kernels

// The item that a chunk belongs to: the last one that begins no later.
__device__ inline int find_item(const Job& job, int chunk) {
    int low = 0, high = job.count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (job.first_chunks[middle] <= chunk ? low : high) = middle;
    }
    return low;
}

template <class T, bool kExponents>
__device__ inline Part part_of(const dsv4_probe_item& item, uint32_t* bins) {
    Thread mine;
    Chunk<T>(item, blockIdx.x - item.first_chunk).template read<kExponents>(mine, bins);
    return mine.total();
}

template <bool kExponents>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    stats_kernel(const __grid_constant__ Job job) {
    __shared__ Part shared_parts[kWarps];
    __shared__ Spread shared_spreads[kWarps];
    __shared__ uint32_t bins[kExponents ? kBins : 1];
    int number = find_item(job, blockIdx.x);
    const dsv4_probe_item& item = job.items[number];
    int next = number + 1 < job.count ? job.first_chunks[number + 1] : gridDim.x;
    let_next_start();
    wait_for_previous();
    const Place place(job, item);
    if (item.kind == kValues) {
        copy_values(item, place.copies());
    } else if (item.kind == kEmpty) {
        count_empty_of(item, place.copies());
    } else if (item.kind == kSums) {
        write_sums(item, shared_spreads, place);
    } else {
        if (kExponents) {
            for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
            __syncthreads();
        }
        Part mine = item.dtype == DSV4_F32    ? part_of<float, kExponents>(item, bins)
                    : item.dtype == DSV4_BF16 ? part_of<bf16, kExponents>(item, bins)
                                              : part_of<__half, kExponents>(item, bins);
        mine = merge_block(mine, shared_parts);
        finish_item<kExponents>(job, number, next - item.first_chunk, mine, bins, shared_parts, place);
    }
}

__device__ inline int64_t nanoseconds() {
    int64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

__global__ void begin_kernel(int64_t* step) { ++*step; }

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
// *step - 1 of the ring. scratch holds 48 bytes a chunk, bin_scratch (with `exponents`) 256 uint32;
// arrived 96 uint32, all 0 before and after.
DSV4_EXPORT int dsv4_probe_stats(const dsv4_probe_item* items, int64_t count, int64_t chunks,
                                 double* ring, uint32_t* exponents, int64_t* copies,
                                 const int64_t* step, int64_t steps, int64_t slots, int64_t width,
                                 void* scratch, uint32_t* bin_scratch, uint32_t* arrived,
                                 void* stream) {
    if (count < 1 || count > kMostItems || chunks < count || steps < 1) return kUnsupported;
    Job job;
    job.ring = ring, job.exponents = exponents, job.copies = copies, job.step = step;
    job.scratch = (Part*)scratch, job.bin_scratch = bin_scratch, job.arrived = arrived;
    job.slots = slots, job.width = width, job.steps = (uint32_t)steps, job.count = (int32_t)count;
    for (int64_t i = 0; i < count; i++) {
        job.items[i] = items[i];
        job.first_chunks[i] = items[i].first_chunk;
    }
    auto kernel = exponents ? stats_kernel<true> : stats_kernel<false>;
    return launch(kernel, dim3((unsigned)chunks), kThreads, 0, stream, job);
}

// The next step begins: ++*step.
DSV4_EXPORT int dsv4_probe_begin(int64_t* step, void* stream) {
    begin_kernel<<<1, 1, 0, (cudaStream_t)stream>>>(step);
    return (int)cudaGetLastError();
}

// The GPU's clock in nanoseconds into slot `slot` of ring [steps, slots], once all before it in the
// stream is done: in the row of step *step, counted from 1. `begin` starts the next step first.
DSV4_EXPORT int dsv4_probe_stamp(int64_t* ring, int64_t* step, int64_t steps, int64_t slots,
                                 int slot, int begin, void* stream) {
    if (steps < 1 || slot < 0 || slot >= slots) return kUnsupported;
    stamp_kernel<<<1, 1, 0, (cudaStream_t)stream>>>(ring, step, steps, slots, slot, begin);
    return (int)cudaGetLastError();
}
