// The index tensors of a decode step whose positions are on the device: one launch a step.

#include "dispatch.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;

// What the layers of one compression ratio read. ratio 0: there are none.
struct Compressed {
    int64_t ratio, capacity;            // pool rows of a sequence
    int64_t *visible, *places, *slots;  // [batch] each
    int64_t* table;                     // [batch, 4]; only the first column changes
    int64_t entries;
    int* rows;  // [batch, entries] or null

    __device__ void fill(int64_t b, int64_t p) const {
        if (ratio == 0) return;
        const int64_t index = p / ratio, seen = (p + 1) / ratio, base = b * capacity;
        if (threadIdx.x == 0) {
            visible[b] = seen;
            places[b] = index * ratio;
            slots[b] = seen > index ? base + index : -1;
            table[4 * b] = p;
        }
        if (rows == nullptr) return;
        for (int64_t i = threadIdx.x; i < entries; i += kThreads)
            rows[b * entries + i] = i < seen ? (int)(base + i) : -1;
    }
};

// One block a sequence.
__global__ void __launch_bounds__(kThreads)
    step_kernel(int64_t* positions, int64_t window, int64_t* ring_slots, int* ring_rows,
                Compressed a, Compressed c) {
    let_next_start();
    wait_for_previous();
    const int64_t b = blockIdx.x, p = positions[b] + 1;
    __syncthreads();  // all have read it
    if (threadIdx.x == 0) {
        positions[b] = p;
        ring_slots[b] = b * window + p % window;
    }
    for (int64_t i = threadIdx.x; i < window; i += kThreads) {
        int64_t key = p - window + 1 + i;
        ring_rows[b * window + i] = key >= 0 ? (int)(b * window + key % window) : -1;
    }
    a.fill(b, p);
    c.fill(b, p);
}

__global__ void __launch_bounds__(kThreads)
    pool_rows_kernel(const int* index, int64_t k, int64_t capacity, int* rows) {
    let_next_start();
    wait_for_previous();
    const int64_t first = blockIdx.x * k;
    for (int64_t i = threadIdx.x; i < k; i += kThreads) {
        int entry = index[first + i];
        rows[first + i] = entry >= 0 ? (int)(blockIdx.x * capacity) + entry : -1;
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// positions [batch] += 1, then what follows from them: ring_slots [batch], ring_rows [batch, window]
// and, for up to two compression ratios, what Compressed says.
DSV4_EXPORT int dsv4_step(int64_t* positions, int64_t batch, int64_t window, int64_t* ring_slots,
                          int* ring_rows, int64_t ratio_a, int64_t capacity_a, int64_t* visible_a,
                          int64_t* places_a, int64_t* slots_a, int64_t* table_a, int64_t entries_a,
                          int* rows_a, int64_t ratio_c, int64_t capacity_c, int64_t* visible_c,
                          int64_t* places_c, int64_t* slots_c, int64_t* table_c, int64_t entries_c,
                          int* rows_c, void* stream) {
    Compressed a = {ratio_a, capacity_a, visible_a, places_a, slots_a, table_a, entries_a, rows_a};
    Compressed c = {ratio_c, capacity_c, visible_c, places_c, slots_c, table_c, entries_c, rows_c};
    return launch(step_kernel, dim3(batch), kThreads, 0, stream, positions, window, ring_slots,
                  ring_rows, a, c);
}

// index [batch, k] of entries of the sequence -> rows [batch, k] of the pool; -1 stays.
DSV4_EXPORT int dsv4_pool_rows(const int* index, int64_t batch, int64_t k, int64_t capacity,
                               int* rows, void* stream) {
    return launch(pool_rows_kernel, dim3(batch), kThreads, 0, stream, index, k, capacity, rows);
}
