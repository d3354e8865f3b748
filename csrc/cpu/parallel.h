// Threads and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <omp.h>

#include "../common/abi.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace dsv4 {

// Keeps denormals while a kernel runs: small block scales are decoded through them, and the
// caller's thread may have been told to flush them.
class KeepDenormals {
#if defined(__SSE2__)
    unsigned saved = _mm_getcsr();

  public:
    KeepDenormals() { _mm_setcsr(saved & ~0x8040u); }
    ~KeepDenormals() { _mm_setcsr(saved); }
#else
  public:
    KeepDenormals() {}
#endif
};

// Run body(first, last) over [0, count) in contiguous pieces. `work` is a rough number of
// elements touched in all: small jobs stay on the calling thread, since waking another one
// costs a few microseconds. The team is either one thread or all of them, because a team that
// changes size makes the runtime end and start threads.
template <class Body> void parallel(int threads, int64_t count, int64_t work, const Body& body) {
    constexpr int64_t worth_it = 1 << 17;
    if (threads <= 1 || count <= 1 || work < worth_it) {
        KeepDenormals keep;
        body(int64_t(0), count);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        KeepDenormals keep;
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t first = count * me / all, last = count * (me + 1) / all;
        if (first < last) body(first, last);
    }
}

// Memory that a thread keeps from call to call. Every use inside one call has its own slot.
enum Slot {
    kActivations,
    kPrepared,
    kProducts,
    kWeightBlock,
    kGate,
    kUp,
    kHidden,
    kRows,
    kMixes,
    kQueries,
    kLogits,
    kOrder,
    kSlots,
};

// At least `bytes`, aligned to a cache line, contents undefined; valid until the same thread asks
// for the same slot again. Throws bad_alloc, so not to be called for the first time with a new
// size inside a parallel region: take `threads` shares before it.
inline void* scratch(Slot slot, int64_t bytes) {
    struct Block {
        void* data = nullptr;
        int64_t size = 0;
        ~Block() { std::free(data); }
    };
    static thread_local Block blocks[kSlots];
    Block& block = blocks[slot];
    if (block.size < bytes) {
        std::free(block.data);
        block.size = 0;
        int64_t size = (bytes + 4095) / 4096 * 4096;
        block.data = std::aligned_alloc(4096, size);
        if (block.data == nullptr) throw std::bad_alloc();
        block.size = size;
    }
    return block.data;
}

template <class T = float> T* scratch_of(Slot slot, int64_t count) {
    return static_cast<T*>(scratch(slot, count * int64_t(sizeof(T))));
}

// Runs a kernel and turns a failed allocation into its status.
template <class Kernel> int guarded(const Kernel& kernel) {
    try {
        return kernel();
    } catch (const std::bad_alloc&) {
        return DSV4_NO_MEMORY;
    }
}

}  // namespace dsv4
