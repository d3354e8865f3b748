// Statistics of many tensors in one launch, into a ring of steps; and time stamps between sites.

#include "launch.cuh"
#include "types.cuh"

// One tensor to look at, or some rows of one; engine/cuda/stats.py makes them.
typedef struct dsv4_probe_item {
    const void* data;
    const int64_t* index;  // the rows to look at, below 0 for none; null: all of them
    int64_t rows;
    int64_t cols;    // elements of a row; of kind kSums, the sums of a row
    int64_t last;    // elements of the last row; of kind kSums, the terms of a sum; of kinds kValues and
                     // kEmpty, where in a step's row of the copies its results go
    int64_t stride;  // elements from row to row
    int32_t dtype;   // enum dsv4_dtype, or the bytes of an integer: 4 or 8
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

enum Kind { kMoments = 0, kSums = 1, kValues = 2, kEmpty = 3 };

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kGroup = 8;                   // elements that a thread takes at once
constexpr int kFlight = 4;                  // groups it has under way
constexpr int kFields = 9;                  // of a result
constexpr int kBins = 256;                  // exponents of float32
constexpr int kMostItems = 96;              // of a launch
constexpr uint32_t kInfinity = 0x7f800000;  // magnitudes from here on are not finite

// Counts of all values, moments of the finite ones. Magnitudes are compared as bits.
struct Part {
    uint32_t seen = 0, nan = 0, inf = 0, minus_inf = 0, zero = 0, peaks = 0, peak = 0, unused = 0;
    double sum = 0, squares = 0;
};

struct Job {
    double* ring;           // [steps, slots, kFields]
    uint32_t* exponents;    // [steps, slots, kBins], or null
    int64_t* copies;        // [steps, width] integers as they are, or null
    int64_t* step;          // the step that is written; null: always the first
    Part* scratch;          // of every chunk
    uint32_t* bin_scratch;  // [chunks, kBins], or null
    uint32_t* arrived;      // [kMostItems + 1] chunks done of each item, and in all; 0 between launches
    int64_t steps;
    int64_t slots;
    int64_t width;
    int32_t count;
    int32_t advance;  // whether the step is over with this launch
    dsv4_probe_item items[kMostItems];
};

// ---------------------------------------------------------------- a thread's elements

__device__ inline void add_value(Part& p, float x) {
    uint32_t magnitude = __float_as_uint(x) & 0x7fffffff;
    if (magnitude >= kInfinity) {
        p.nan += magnitude > kInfinity;
        p.inf += magnitude == kInfinity;
        p.minus_inf += magnitude == kInfinity && x < 0;
        return;
    }
    p.zero += magnitude == 0;
    p.peaks = magnitude > p.peak ? 0 : p.peaks;
    p.peak = max(p.peak, magnitude);
    p.peaks += magnitude == p.peak;
    p.sum += x;
    p.squares = fma((double)x, (double)x, p.squares);
}

// Eight finite values. What most groups have none of, zeros and a new or equal peak, is looked for first.
__device__ inline void add_finite(Part& p, const float (&x)[kGroup], uint32_t largest) {
    uint32_t smallest = kInfinity;
    double sum[2] = {0, 0}, squares[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kGroup; i++) {
        double value = x[i];
        smallest = min(smallest, __float_as_uint(x[i]) & 0x7fffffff);
        sum[i % 2] += value;
        squares[i % 2] = fma(value, value, squares[i % 2]);
    }
    p.sum += sum[0] + sum[1];
    p.squares += squares[0] + squares[1];
    if (smallest == 0) {
#pragma unroll
        for (int i = 0; i < kGroup; i++) p.zero += x[i] == 0;
    }
    if (largest >= p.peak) {
        p.peaks = largest > p.peak ? 0 : p.peaks;
        p.peak = largest;
#pragma unroll
        for (int i = 0; i < kGroup; i++)
            p.peaks += (__float_as_uint(x[i]) & 0x7fffffff) == largest;
    }
}

template <bool kExponents>
__device__ inline void add_group(Part& p, const float (&x)[kGroup], int count, uint32_t* bins) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kGroup; i++) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
    p.seen += count;
    if (count == kGroup && largest < kInfinity) {
        add_finite(p, x, largest);
    } else {
#pragma unroll
        for (int i = 0; i < kGroup; i++)
            if (i < count) add_value(p, x[i]);
    }
    if (kExponents)
#pragma unroll
        for (int i = 0; i < kGroup; i++)
            if (i < count) atomicAdd(bins + (__float_as_uint(x[i]) >> 23 & 255), 1u);
}

// ---------------------------------------------------------------- a block's chunk

// Whole rows of an item, eight neighbours of a row to a thread. Which thread takes what does not
// depend on alignment or dtype, so that equal values give equal bits.
template <class T> struct Chunk {
    const dsv4_probe_item& item;
    int64_t first;          // row
    uint32_t groups, total;  // of a row, of the chunk

    __device__ Chunk(const dsv4_probe_item& item, int64_t chunk)
        : item(item), first(chunk * item.rows_per_chunk) {
        int64_t rows = min((int64_t)item.rows_per_chunk, item.rows - first);
        groups = (uint32_t)((item.cols + kGroup - 1) / kGroup);
        total = rows > 0 ? (uint32_t)rows * groups : 0;
    }

    // Where group `g` begins, and how many elements it has; 0 for none.
    __device__ const T* find(uint32_t g, int& count) const {
        uint32_t row = item.rows_per_chunk == 1 ? 0 : g / groups;
        int64_t col = (int64_t)(g - row * groups) * kGroup, r = first + row;
        int64_t length = (r == item.rows - 1 ? item.last : item.cols) - col;
        int64_t place = item.index ? item.index[r] : r;
        count = place < 0 || length <= 0 ? 0 : (int)min(length, (int64_t)kGroup);
        return (const T*)item.data + place * item.stride + col;
    }

    // Whether every group is whole and lies at 16 bytes.
    __device__ bool regular() const {
        bool last_row = first + item.rows_per_chunk >= item.rows;
        return (uintptr_t)item.data % 16 == 0 && item.stride % kGroup == 0 &&
               item.cols % kGroup == 0 && (!last_row || item.last % kGroup == 0);
    }

    template <bool kExponents> __device__ void read(Part& p, uint32_t* bins) const {
        if (regular())
            read_vectors<kExponents>(p, bins);
        else
            read_elements<kExponents>(p, bins);
    }

    // All loads of a round are under way before the first is looked at.
    template <bool kExponents> __device__ void read_vectors(Part& p, uint32_t* bins) const {
        constexpr int V = Vector<T>::kSize < kGroup ? Vector<T>::kSize : kGroup, kLoads = kGroup / V;
        for (uint32_t g = threadIdx.x; g < total; g += kThreads * kFlight) {
            Vector<T, V> raw[kFlight][kLoads];
            int counts[kFlight];
#pragma unroll
            for (int f = 0; f < kFlight; f++) {
                counts[f] = 0;
                const T* from = (const T*)item.data;
                if (g + f * kThreads < total) from = find(g + f * kThreads, counts[f]);
                if (counts[f] == 0) from = (const T*)item.data;  // some place that can be read
#pragma unroll
                for (int i = 0; i < kLoads; i++) raw[f][i] = load_vector<T, V>(from + i * V);
            }
#pragma unroll
            for (int f = 0; f < kFlight; f++) {
                if (counts[f] == 0) continue;
                float x[kGroup];
#pragma unroll
                for (int i = 0; i < kGroup; i++) x[i] = to_float(raw[f][i / V].at[i % V]);
                add_group<kExponents>(p, x, kGroup, bins);
            }
        }
    }

    template <bool kExponents> __device__ void read_elements(Part& p, uint32_t* bins) const {
        for (uint32_t g = threadIdx.x; g < total; g += kThreads) {
            int count;
            const T* from = find(g, count);
            float x[kGroup];
#pragma unroll
            for (int i = 0; i < kGroup; i++) x[i] = i < count ? to_float(from[i]) : 0;
            if (count > 0) add_group<kExponents>(p, x, count, bins);
        }
    }
};

// ---------------------------------------------------------------- parts together

__device__ inline double sum_of_lanes(double x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// The parts of a warp's lanes, in every lane.
__device__ inline Part merge_warp(Part p) {
    p.seen = __reduce_add_sync(~0u, p.seen);
    p.zero = __reduce_add_sync(~0u, p.zero);
    if (__any_sync(~0u, p.nan | p.inf)) {
        p.nan = __reduce_add_sync(~0u, p.nan);
        p.inf = __reduce_add_sync(~0u, p.inf);
        p.minus_inf = __reduce_add_sync(~0u, p.minus_inf);
    }
    uint32_t peak = __reduce_max_sync(~0u, p.peak);
    p.peaks = __reduce_add_sync(~0u, p.peak == peak ? p.peaks : 0);
    p.peak = peak;
    p.sum = sum_of_lanes(p.sum, 32);
    p.squares = sum_of_lanes(p.squares, 32);
    return p;
}

// All threads' parts, in every lane of warp 0, in an order that never changes.
__device__ inline Part merge_block(Part mine, Part* shared) {
    mine = merge_warp(mine);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x < 32) mine = merge_warp(threadIdx.x < kWarps ? shared[threadIdx.x] : Part());
    __syncthreads();
    return mine;
}

// By the lanes of a warp that all have the part.
__device__ inline void write_moments(const Part& p, double* out) {
    uint32_t finite = p.seen - p.nan - p.inf;
    double count = finite > 0 ? finite : 1;
    switch (threadIdx.x) {
        case 0: out[0] = finite; break;
        case 1: out[1] = p.nan; break;
        case 2: out[2] = p.inf; break;
        case 3: out[3] = p.minus_inf; break;
        case 4: out[4] = p.zero; break;
        case 5: out[5] = p.peaks; break;
        case 6: out[6] = __uint_as_float(p.peak); break;
        case 7: out[7] = sqrt(p.squares / count); break;
        case 8: out[8] = p.sum / count; break;
    }
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
    a.peak = max(a.peak, b.peak);
    a.sum += b.sum, a.squares += b.squares;
}

// Writes the chunk's part; the block that comes last adds all parts of the item, in their order.
template <bool kExponents>
__device__ inline void finish_item(const Job& job, int number, int chunks, const Part& mine,
                                   uint32_t* bins, Part* shared, double* out, uint32_t* bins_out) {
    bool has_bin = kExponents && threadIdx.x < kBins;
    if (chunks == 1) {
        if (threadIdx.x < 32) write_moments(mine, out);
        if (has_bin) bins_out[threadIdx.x] = bins[threadIdx.x];
        return;
    }
    int first = job.items[number].first_chunk, chunk = blockIdx.x - first;
    Part* parts = job.scratch + first;
    uint32_t* all_bins = job.bin_scratch + (int64_t)first * kBins + threadIdx.x;
    if (threadIdx.x == 0) parts[chunk] = mine;
    if (kExponents) {
        if (has_bin) all_bins[(int64_t)chunk * kBins] = bins[threadIdx.x];
        __threadfence();
        __syncthreads();
    }
    if (!arrive(job.arrived + number, chunks)) return;
    Part total;
    for (int c = threadIdx.x; c < chunks; c += kThreads) add_part(total, load_part(parts + c));
    total = merge_block(total, shared);
    if (threadIdx.x < 32) write_moments(total, out);
    if (has_bin) {
        uint32_t sum = 0;
        for (int c = 0; c < chunks; c++) sum += __ldcg(all_bins + (int64_t)c * kBins);
        bins_out[threadIdx.x] = sum;
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
    s.total = sum_of_lanes(s.total, 32);
    s.nan = sum_of_lanes(s.nan, 32);
    return s;
}

// Sums along an axis: how many, how many of them NaN, and of the others the lowest, the highest, the
// mean. One block takes all of them.
__device__ inline void write_sums(const dsv4_probe_item& item, Spread* shared, double* out) {
    Spread mine;
    for (int64_t s = threadIdx.x; s < item.rows * item.cols; s += kThreads) {
        int64_t at = s / item.cols * item.stride + s % item.cols * item.sum_stride;
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
    double sums = (double)(item.rows * item.cols);
    double good = sums - mine.nan > 0 ? sums - mine.nan : 1;
    for (int f = 0; f < kFields; f++) out[f] = 0;
    out[0] = sums, out[1] = mine.nan, out[6] = mine.low, out[7] = mine.high;
    out[8] = mine.total / good;
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

__device__ inline int find_item(const Job& job, int chunk) {
    int low = 0, high = job.count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (job.items[middle].first_chunk <= chunk ? low : high) = middle;
    }
    return low;
}

template <class T, bool kExponents>
__device__ inline Part part_of(const dsv4_probe_item& item, uint32_t* bins) {
    Part part;
    Chunk<T>(item, blockIdx.x - item.first_chunk).template read<kExponents>(part, bins);
    return part;
}

template <bool kExponents>
__global__ void __launch_bounds__(kThreads) stats_kernel(const __grid_constant__ Job job) {
    __shared__ Part shared_parts[kWarps];
    __shared__ Spread shared_spreads[kWarps];
    __shared__ uint32_t bins[kExponents ? kBins : 1];
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
    } else if (item.kind == kEmpty) {
        count_empty_of(item, job.copies + row * job.width + item.last);
    } else if (item.kind == kSums) {
        write_sums(item, shared_spreads, out);
    } else {
        if (kExponents) {
            if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
            __syncthreads();
        }
        Part mine = item.dtype == DSV4_F32    ? part_of<float, kExponents>(item, bins)
                    : item.dtype == DSV4_BF16 ? part_of<bf16, kExponents>(item, bins)
                                              : part_of<__half, kExponents>(item, bins);
        mine = merge_block(mine, shared_parts);
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
// *step of the ring. scratch holds 48 bytes a chunk, bin_scratch (with `exponents`) 256 uint32;
// arrived 97 uint32, all 0 before and after.
DSV4_EXPORT int dsv4_probe_stats(const dsv4_probe_item* items, int64_t count, int64_t chunks,
                                 double* ring, uint32_t* exponents, int64_t* copies, int64_t* step,
                                 int64_t steps, int64_t slots, int64_t width, void* scratch,
                                 uint32_t* bin_scratch, uint32_t* arrived, int advance,
                                 void* stream) {
    if (count < 1 || count > kMostItems || chunks < count || steps < 1) return kUnsupported;
    if (advance && !step) return kUnsupported;
    Job job;
    job.ring = ring, job.exponents = exponents, job.copies = copies, job.step = step;
    job.scratch = (Part*)scratch, job.bin_scratch = bin_scratch, job.arrived = arrived;
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
