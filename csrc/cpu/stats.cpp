// Statistics of one tensor in one pass, for the probes.

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "vec.h"

namespace dsv4 {
namespace {

// Half a vector of floats and the doubles of it: as wide as a register, unlike the doubles of all.
typedef float f32h __attribute__((vector_size(2 * W)));
typedef double f64h __attribute__((vector_size(4 * W)));
struct Halves {
    f32h low, high;
};

constexpr uint32_t kInfinity = 0x7f800000;  // magnitudes from here on are not finite
constexpr int64_t kBlock = 1024;            // elements looked at before anything is decided

// Counts of all values; moments of the finite ones. Magnitudes are compared as bits.
struct Stats {
    int64_t nan = 0, inf = 0, minus_inf = 0, zero = 0;
    int64_t peaks = 0;  // finite values of the largest magnitude
    uint32_t peak = 0;
    double sum = 0, squares = 0;

    void add_peak(uint32_t magnitude, int64_t count) {
        if (magnitude > peak) peak = magnitude, peaks = 0;
        if (magnitude == peak) peaks += count;
    }

    void add_value(float x) {
        uint32_t magnitude = bits_as<uint32_t>(x) & 0x7fffffff;
        if (magnitude >= kInfinity) {
            nan += magnitude > kInfinity;
            inf += magnitude == kInfinity;
            minus_inf += magnitude == kInfinity && x < 0;
            return;
        }
        zero += magnitude == 0;
        add_peak(magnitude, 1);
        sum += x;
        squares += double(x) * x;
    }

    void add(const Stats& other) {
        nan += other.nan;
        inf += other.inf;
        minus_inf += other.minus_inf;
        zero += other.zero;
        if (other.peaks > 0) add_peak(other.peak, other.peaks);
        sum += other.sum;
        squares += other.squares;
    }
};

// One block of whole vectors, as if all were finite; false, and nothing added, if one is not.
template <class T> bool add_block(const T* x, int64_t count, Stats& stats) {
    u32v peak = {}, peaks = {}, zero = {};
    f64h sum = {}, squares = {};
    for (int64_t i = 0; i < count; i += W) {
        f32v value = load(x + i);
        u32v magnitude = bits_as<u32v>(value) & 0x7fffffff;
        i32v higher = (i32v)magnitude > (i32v)peak;  // neither has the sign bit
        peaks = higher ? u32v{} : peaks;
        peak = higher ? magnitude : peak;
        peaks -= (u32v)(magnitude == peak);  // true is -1
        zero -= (u32v)(magnitude == 0);
        Halves halves = bits_as<Halves>(value);
        f64h low = __builtin_convertvector(halves.low, f64h);
        f64h high = __builtin_convertvector(halves.high, f64h);
        sum += low + high;
        squares += low * low + high * high;
    }
    Stats block;
    for (int lane = 0; lane < W; lane++) {
        if (peak[lane] >= kInfinity) return false;
        block.add_peak(peak[lane], peaks[lane]);
        block.zero += zero[lane];
    }
    for (int lane = 0; lane < W / 2; lane++) {
        block.sum += sum[lane];
        block.squares += squares[lane];
    }
    stats.add(block);
    return true;
}

template <class T> void add_values(const T* x, int64_t count, Stats& stats) {
    int64_t whole = count / W * W;
    if (whole == 0 || !add_block(x, whole, stats)) whole = 0;
    for (int64_t i = whole; i < count; i++) stats.add_value(to_float(x[i]));
}

// Always in the same slices, so that the sums do not depend on the number of threads.
template <class T> Stats stats_of(const T* x, int64_t count, int threads) {
    constexpr int64_t kSlices = 64;
    Stats parts[kSlices];
    int64_t blocks = (count + kBlock - 1) / kBlock;
    parallel(threads, kSlices, count, [&](int64_t first, int64_t last, int) {
        for (int64_t slice = first; slice < last; slice++)
            for (int64_t b = blocks * slice / kSlices; b < blocks * (slice + 1) / kSlices; b++)
                add_values(x + b * kBlock, min64(kBlock, count - b * kBlock), parts[slice]);
    });
    Stats all;
    for (const Stats& part : parts) all.add(part);
    return all;
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// out [8] = counts of NaN, infinities, those below zero, zeros, and finite values of the largest
// magnitude; that magnitude; sum and sum of squares of the finite values. x [count] of `dtype`.
DSV4_EXPORT int dsv4_stats(const void* x, int dtype, int64_t count, double* out, int threads) {
    Stats s = dtype == DSV4_F32 ? stats_of((const float*)x, count, threads)
                                : stats_of((const bf16*)x, count, threads);
    const double row[] = {double(s.nan),   double(s.inf), double(s.minus_inf), double(s.zero),
                          double(s.peaks), double(bits_as<float>(s.peak)), s.sum, s.squares};
    std::copy(row, row + 8, out);
    return DSV4_OK;
}
