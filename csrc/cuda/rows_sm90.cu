// Ops that move rows: embed, cache_write, gather_swa; and moe_sum.
//
// An index past the end of its table fails an assertion on the device: the next synchronisation
// reports it, as torch's own indexing does.

#include <assert.h>

#include "dispatch.cuh"
#include "kv_entry.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 256;

// to[0 ... count) = from[0 ... count), element by element, by all threads of the block.
template <class From, class To>
__device__ void copy_row(const From* from, To* to, int64_t count) {
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
        to[i] = from_float<To>(to_float(from[i]));
}

// Of rows that start at 16-byte boundaries, 16 bytes at a time.
template <class T> __device__ void copy_row(const T* from, T* to, int64_t count) {
    constexpr int V = Vector<T>::kSize;
    if (((uintptr_t)from | (uintptr_t)to) % 16 == 0 && count % V == 0) {
        for (int64_t i = threadIdx.x * V; i < count; i += blockDim.x * V)
            store_vector(to + i, load_vector(from + i));
    } else {
        for (int64_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
    }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int64_t* tokens, const From* table, int64_t v, int64_t d, int64_t hc,
                 To* out) {
    let_next_start();
    wait_for_previous();
    int64_t token = tokens[blockIdx.x];
    assert(token >= 0 && token < v && "embed: a token id is outside the vocabulary");
    copy_row(table + token * d, out + (blockIdx.x * hc + blockIdx.y) * d, d);
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    cache_write_kernel(const From* rows, const int64_t* slots, To* cache, int64_t count, int64_t d,
                       int64_t stride) {
    let_next_start();
    wait_for_previous();
    int64_t slot = slots[blockIdx.x];
    if (slot < 0) return;
    assert(slot < count && "cache_write: a slot is past the end of the cache");
    copy_row(rows + blockIdx.x * d, cache + slot * stride, d);
}

template <class Ring, class New>
__global__ void __launch_bounds__(kThreads)
    gather_swa_kernel(const Ring* ring, int64_t r, const New* kv, int64_t d, Ring* window) {
    let_next_start();
    wait_for_previous();
    int64_t row = blockIdx.x;
    if (row < r) copy_row(ring + row * d, window + row * d, d);
    else copy_row(kv + (row - r) * d, window + row * d, d);
}

// Packed entries: 64 threads a row.
constexpr int kPackThreads = 64, kPackRows = kThreads / kPackThreads;

template <class From>
__global__ void __launch_bounds__(kThreads)
    cache_write_packed_kernel(const From* rows, const int64_t* slots, int64_t m, uint8_t* cache,
                              int64_t count, EntryLayout layout, int64_t stride) {
    let_next_start();
    wait_for_previous();
    int64_t row = blockIdx.x * (int64_t)kPackRows + threadIdx.x / kPackThreads;
    if (row >= m) return;
    int64_t slot = slots[row];
    if (slot < 0) return;
    assert(slot < count && "cache_write: a slot is past the end of the cache");
    pack_entry(rows + row * layout.dim, cache + slot * stride, layout, threadIdx.x % kPackThreads);
}

template <class New>
__global__ void __launch_bounds__(kThreads)
    gather_swa_packed_kernel(const uint8_t* ring, int64_t r, const New* kv, int64_t n,
                             EntryLayout layout, uint8_t* window) {
    let_next_start();
    wait_for_previous();
    int64_t row = blockIdx.x * (int64_t)kPackRows + threadIdx.x / kPackThreads;
    const int bytes = layout.bytes(), unit = threadIdx.x % kPackThreads;
    uint8_t* to = window + row * bytes;
    if (row < r) {
        const uint8_t* from = ring + row * bytes;
        for (int i = 8 * unit; i < bytes; i += 8 * kPackThreads)
            *(uint2*)(to + i) = *(const uint2*)(from + i);
    } else if (row < r + n) {
        pack_entry(kv + (row - r) * layout.dim, to, layout, unit);
    }
}

template <class To>
__global__ void __launch_bounds__(kThreads)
    moe_sum_kernel(const float* a, const float* b, int64_t count, To* out) {
    let_next_start();
    wait_for_previous();
    int64_t first = (blockIdx.x * (int64_t)kThreads + threadIdx.x) * 4;
    if (first + 4 <= count) {
        Vector<float> x = load_vector(a + first), y = load_vector(b + first);
        Vector<To, 4> sums;
        for (int i = 0; i < 4; i++) sums.at[i] = from_float<To>(x.at[i] + y.at[i]);
        store_vector(out + first, sums);
    } else {
        for (int64_t i = first; i < count; i++) out[i] = from_float<To>(a[i] + b[i]);
    }
}

}  // namespace
}  // namespace dsv4

using namespace dsv4;

// tokens [n], table [v, d] -> out [n, hc, d]. The table's dtype may be float16.
DSV4_EXPORT int dsv4_embed(const int64_t* tokens, int64_t n, const void* table, int table_dtype,
                           int64_t v, int64_t d, int64_t hc, void* out, int out_dtype,
                           void* stream) {
    return with_any_dtype(table_dtype, [&](auto from) {
        return with_dtype(out_dtype, [&](auto to) {
            using From = type_of<decltype(from)>;
            using To = type_of<decltype(to)>;
            return launch(embed_kernel<From, To>, dim3(n, hc), kThreads, 0, stream, tokens,
                          (const From*)table, v, d, hc, (To*)out);
        });
    });
}

// cache[slots[i]] = rows[i] where slots[i] >= 0; rows [m, d], cache [count, d] with a row stride.
DSV4_EXPORT int dsv4_cache_write(const void* rows, int rows_dtype, const int64_t* slots, int64_t m,
                                 void* cache, int cache_dtype, int64_t count, int64_t d,
                                 int64_t stride, void* stream) {
    return with_dtype(rows_dtype, [&](auto from) {
        return with_dtype(cache_dtype, [&](auto to) {
            using From = type_of<decltype(from)>;
            using To = type_of<decltype(to)>;
            return launch(cache_write_kernel<From, To>, dim3(m), kThreads, 0, stream,
                          (const From*)rows, slots, (To*)cache, count, d, stride);
        });
    });
}

// window [r + n, d] = ring [r, d], then kv [n, d] in the ring's dtype.
DSV4_EXPORT int dsv4_gather_swa(const void* ring, int ring_dtype, int64_t r, const void* kv,
                                int kv_dtype, int64_t n, int64_t d, void* window, void* stream) {
    return with_dtype(ring_dtype, [&](auto ring_tag) {
        return with_dtype(kv_dtype, [&](auto kv_tag) {
            using Ring = type_of<decltype(ring_tag)>;
            using New = type_of<decltype(kv_tag)>;
            return launch(gather_swa_kernel<Ring, New>, dim3(r + n), kThreads, 0, stream,
                          (const Ring*)ring, r, (const New*)kv, d, (Ring*)window);
        });
    });
}

// cache[slots[i]] = rows[i] where slots[i] >= 0; rows [m, dim] as packed entries with `plain`
// dimensions in codes, `stride` bytes apart and at multiples of 8.
DSV4_EXPORT int dsv4_cache_write_packed(const void* rows, int rows_dtype, const int64_t* slots,
                                        int64_t m, uint8_t* cache, int64_t count, int64_t dim,
                                        int64_t plain, int64_t stride, void* stream) {
    if (dim > kMostPacked) return kUnsupported;
    return with_dtype(rows_dtype, [&](auto from) {
        using From = type_of<decltype(from)>;
        EntryLayout layout = {(int)dim, (int)plain};
        return launch(cache_write_packed_kernel<From>, dim3(ceil_div(m, kPackRows)), kThreads, 0,
                      stream, (const From*)rows, slots, m, cache, count, layout, stride);
    });
}

// window [r + n] = the entries of ring [r], then kv [n, dim] packed alike.
DSV4_EXPORT int dsv4_gather_swa_packed(const uint8_t* ring, int64_t r, const void* kv, int kv_dtype,
                                       int64_t n, int64_t dim, int64_t plain, uint8_t* window,
                                       void* stream) {
    if (dim > kMostPacked) return kUnsupported;
    return with_dtype(kv_dtype, [&](auto kv_tag) {
        using New = type_of<decltype(kv_tag)>;
        EntryLayout layout = {(int)dim, (int)plain};
        return launch(gather_swa_packed_kernel<New>, dim3(ceil_div(r + n, kPackRows)), kThreads, 0,
                      stream, ring, r, (const New*)kv, n, layout, window);
    });
}

// out = a + b, `count` elements: float32 in, `out_dtype` out.
DSV4_EXPORT int dsv4_moe_sum(const float* a, const float* b, int64_t count, void* out,
                             int out_dtype, void* stream) {
    return with_dtype(out_dtype, [&](auto to) {
        using To = type_of<decltype(to)>;
        return launch(moe_sum_kernel<To>, dim3(ceil_div(count, 4 * kThreads)), kThreads, 0, stream,
                      a, b, count, (To*)out);
    });
}
