// Statistics of a chunk of a tensor by one block: what is read, each thread's elements, the block's sums.
#pragma once

#include <type_traits>

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

enum Kind { kMoments = 0, kSums = 1, kValues = 2, kEmpty = 3 };

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kGroup = 8;   // elements that a thread takes at once
constexpr int kFlight = 4;  // groups it has under way
constexpr int kBins = 256;  // exponents of float32

// Counts of all values, moments of the finite ones.
struct Part {
    uint32_t seen = 0, nan = 0, inf = 0, minus_inf = 0, zero = 0, peaks = 0;
    float peak = 0;  // largest magnitude
    uint32_t unused = 0;
    double sum = 0, squares = 0;
};

// ---------------------------------------------------------------- a thread's elements

// Eight neighbours as they lie in memory, 16 bits or 32 each.
template <class T> struct Group {
    static constexpr int kSize = Vector<T>::kSize < kGroup ? Vector<T>::kSize : kGroup;
    Vector<T, kSize> parts[kGroup / kSize];
    __device__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < kGroup / kSize; i++) parts[i] = load_vector<T, kSize>(from + i * kSize);
    }
    __device__ T& at(int i) { return parts[i / kSize].at[i % kSize]; }
    __device__ float value(int i) const { return to_float(parts[i / kSize].at[i % kSize]); }
};

__device__ inline float larger_or_nan(float a, float b) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}

// The smallest and the largest magnitude of some groups; NaN if one of them is.
template <class T, int N> __device__ inline float2 range_of(const Group<T> (&groups)[N]) {
    float2 range = {INFINITY, 0};
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < N * kGroup; i++) {
            float magnitude = fabsf(groups[i / kGroup].value(i % kGroup));
            range = {fminf(range.x, magnitude), larger_or_nan(range.y, magnitude)};
        }
    } else {
        using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
        Pair low, high;
#pragma unroll
        for (int i = 0; i < N * kGroup / 2; i++) {
            Pair pair = __habs2(((const Pair*)groups[i / 4].parts)[i % 4]);
            low = i ? __hmin2(low, pair) : pair;
            high = i ? __hmax2_nan(high, pair) : pair;
        }
        range = {fminf(to_float(low.x), to_float(low.y)),
                 larger_or_nan(to_float(high.x), to_float(high.y))};
    }
    return range;
}

__device__ inline void add_finite(double& sum, double& squares, float x) {
    double value = x;
    sum += value;
    squares = fma(value, value, squares);
}

// Sums of even and odd elements on their own, for two chains of additions.
struct Thread {
    Part p;
    double sum = 0, squares = 0;  // of odd elements

    __device__ void add(int i, float x) {
        if (i % 2) add_finite(sum, squares, x);
        else add_finite(p.sum, p.squares, x);
    }

    // Any value, one of a few: slowly.
    __device__ void add_any(int i, float x) {
        float magnitude = fabsf(x);
        p.seen++;
        p.nan += x != x;
        p.inf += magnitude == INFINITY;
        p.minus_inf += x == -INFINITY;
        if (!(magnitude < INFINITY)) return;
        p.zero += x == 0;
        p.peaks = magnitude > p.peak ? 0 : p.peaks;
        p.peak = fmaxf(p.peak, magnitude);
        p.peaks += magnitude == p.peak;
        add(i, x);
    }

    // Finite values of which `largest` and `smallest` are the magnitudes. What most have none of,
    // zeros and a new or equal peak, is looked for only where there are some.
    template <class T, int N>
    __device__ void add_all(const Group<T> (&groups)[N], float smallest, float largest) {
        p.seen += N * kGroup;
#pragma unroll
        for (int i = 0; i < N * kGroup; i++) add(i, groups[i / kGroup].value(i % kGroup));
        if (smallest == 0)
#pragma unroll
            for (int i = 0; i < N * kGroup; i++) p.zero += groups[i / kGroup].value(i % kGroup) == 0;
        if (largest >= p.peak) {
            p.peaks = largest > p.peak ? 0 : p.peaks;
            p.peak = largest;
#pragma unroll
            for (int i = 0; i < N * kGroup; i++)
                p.peaks += fabsf(groups[i / kGroup].value(i % kGroup)) == largest;
        }
    }

    __device__ Part total() {
        p.sum += sum, p.squares += squares;
        return p;
    }
};

// ---------------------------------------------------------------- a block's chunk

// Whole rows of an item, eight neighbours of a row to a thread. Which thread takes what, and in which
// order, depends neither on alignment nor on dtype, so that equal values give equal bits.
template <class T> struct Chunk {
    const dsv4_probe_item& item;
    const int64_t first;     // row
    const uint32_t groups;   // of a row
    uint32_t total;          // groups of the chunk

    __device__ Chunk(const dsv4_probe_item& item, int64_t chunk)
        : item(item), first(chunk * item.rows_per_chunk),
          groups((uint32_t)((item.cols + kGroup - 1) / kGroup)) {
        int64_t rows = min((int64_t)item.rows_per_chunk, item.rows - first);
        total = rows > 0 ? (uint32_t)rows * groups : 0;
        // A last row that is shorter ends the chunk earlier.
        if (rows > 0 && first + rows == item.rows)
            total -= groups - (uint32_t)((item.last + kGroup - 1) / kGroup);
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

    // Whether all groups are whole, lie one after another, and at 16 bytes.
    __device__ bool flat() const {
        bool one = item.rows_per_chunk == 1 && !item.index;
        bool last_row = first == item.rows - 1;
        return one && (uintptr_t)item.data % 16 == 0 && item.stride % kGroup == 0 &&
               (last_row ? item.last : item.cols) % kGroup == 0;
    }

    // kFlight groups at a time where they are flat and finite: all loads are under way before the first
    // is looked at. Others one by one, in the same order.
    template <bool kExponents> __device__ void read(Thread& mine, uint32_t* bins) const {
        const bool is_flat = flat();
        const T* data = (const T*)item.data + first * item.stride;
        uint32_t g = threadIdx.x;
#pragma unroll 1
        while (g < total) {
            const uint32_t last = g + (kFlight - 1) * kThreads;
            if (is_flat && last < total) {
                Group<T> groups[kFlight];
#pragma unroll
                for (int f = 0; f < kFlight; f++)
                    groups[f].load(data + (int64_t)(g + f * kThreads) * kGroup);
                const float2 range = range_of(groups);
                if (range.y < INFINITY) {
                    add<kExponents>(mine, groups, range, bins);
                    g = last + kThreads;
                    continue;
                }
            }
#pragma unroll 1
            for (; g <= last && g < total; g += kThreads) read_group<kExponents>(mine, g, bins);
        }
    }

    template <bool kExponents>
    __device__ void read_group(Thread& mine, uint32_t g, uint32_t* bins) const {
        int count;
        const T* from = find(g, count);
        Group<T> groups[1];
        if (count == kGroup && (uintptr_t)from % 16 == 0) {
            groups[0].load(from);
            const float2 range = range_of(groups);
            if (range.y < INFINITY) return add<kExponents>(mine, groups, range, bins);
        } else {
#pragma unroll
            for (int i = 0; i < kGroup; i++) groups[0].at(i) = i < count ? from[i] : T();
        }
#pragma unroll
        for (int i = 0; i < kGroup; i++) {
            if (i >= count) break;
            mine.add_any(i, groups[0].value(i));
            if (kExponents) count_exponent(groups[0].value(i), bins);
        }
    }

    // Finite groups.
    template <bool kExponents, int N>
    static __device__ void add(Thread& mine, const Group<T> (&groups)[N], float2 range,
                               uint32_t* bins) {
        mine.add_all(groups, range.x, range.y);
        if (kExponents)
#pragma unroll
            for (int i = 0; i < N * kGroup; i++)
                count_exponent(groups[i / kGroup].value(i % kGroup), bins);
    }

    static __device__ void count_exponent(float x, uint32_t* bins) {
        atomicAdd(bins + (__float_as_uint(x) >> 23 & 255), 1u);
    }
};

// ---------------------------------------------------------------- parts together

__device__ inline double sum_of_lanes(double x, int lanes = 32) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// The parts of a warp's first `lanes` lanes, all others empty, in every one of them.
__device__ inline Part merge_warp(Part p, int lanes = 32) {
    p.seen = __reduce_add_sync(~0u, p.seen);
    p.zero = __reduce_add_sync(~0u, p.zero);
    if (__any_sync(~0u, p.nan | p.inf)) {
        p.nan = __reduce_add_sync(~0u, p.nan);
        p.inf = __reduce_add_sync(~0u, p.inf);
        p.minus_inf = __reduce_add_sync(~0u, p.minus_inf);
    }
    // Magnitudes compare as their bits.
    float peak = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(p.peak)));
    p.peaks = __reduce_add_sync(~0u, p.peak == peak ? p.peaks : 0);
    p.peak = peak;
    p.sum = sum_of_lanes(p.sum, lanes);
    p.squares = sum_of_lanes(p.squares, lanes);
    return p;
}

// All threads' parts, in the first lanes of warp 0, in an order that never changes.
__device__ inline Part merge_block(Part mine, Part* shared) {
    mine = merge_warp(mine);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x < 32)
        mine = merge_warp(threadIdx.x < kWarps ? shared[threadIdx.x] : Part(), kWarps);
    __syncthreads();
    return mine;
}

}  // namespace dsv4
