// Threads and scratch memory.
//
// A pool of our own, not OpenMP: there the caller waits at the end of a loop for every thread,
// which on a machine with other work means waiting until the system gives each of them a turn,
// spinning meanwhile. Here the work is cut into pieces that any thread takes; a thread that is not
// running takes none, and the caller waits only for pieces that were begun.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include <unistd.h>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "../common/abi.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dsv4 {

// Keeps denormals while a kernel runs: some small floats are decoded through them, and the
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

inline void pause() {
#if defined(__SSE2__)
    _mm_pause();
#endif
}

class Pool {
  public:
    using Run = void (*)(const void* job, int64_t piece, int worker);

    // Calls run(job, piece, worker) for all pieces, worker < threads; the caller is worker 0.
    // A second caller at the same time does its pieces alone, and so does a child process after
    // fork(), where the other threads are gone.
    void run(int threads, int64_t pieces, Run function, const void* job) {
        std::unique_lock<std::mutex> owner(in_use, std::try_to_lock);
        if (!owner.owns_lock() || getpid() != process) {
            for (int64_t piece = 0; piece < pieces; piece++) function(job, piece, 0);
            return;
        }
        start(threads - 1);
        keep_workers_away();
        current_run.store(function, std::memory_order_relaxed);
        current_job.store(job, std::memory_order_relaxed);
        unfinished.store(pieces, std::memory_order_relaxed);
        state.store(uint64_t(threads) << 48 | uint64_t(pieces) << 24);
        if (sleepers.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleeping); }
            wake.notify_all();
        }
        serve(0);
        for (int i = 0; unfinished.load(std::memory_order_acquire) > 0; i++)
            if (i < kSpins) pause();
            else std::this_thread::yield();  // to the one that has begun, perhaps on our CPU
    }

  private:
    static constexpr int kSpins = 2000;  // some tens of microseconds: from one op to the next
    static constexpr uint64_t kField = (1 << 24) - 1;

    // 16 bits of threads, 24 of pieces, 24 of the next piece to take: enough to take one safely.
    // Whoever takes one may read current_*, since the caller cannot go on before it is done.
    std::atomic<uint64_t> state{0};
    std::atomic<int64_t> unfinished{0};
    std::atomic<Run> current_run{nullptr};
    std::atomic<const void*> current_job{nullptr};
    std::atomic<int> sleepers{0};
    std::mutex in_use, sleeping;
    std::condition_variable wake;
    const pid_t process = getpid();
    std::vector<std::thread> workers;  // beside the caller; guarded by in_use
    int kept_from = -1;                // the CPU that the workers may not use

    static bool has_piece(uint64_t s, int worker) {
        return (s & kField) < (s >> 24 & kField) && worker < int(s >> 48);
    }

    void start(int wanted) {
        while (int(workers.size()) < wanted) {
            int me = int(workers.size()) + 1;
            try {
                workers.emplace_back([this, me] { work(me); });
            } catch (const std::system_error&) {
                return;  // fewer threads do the same work
            }
            kept_from = -1;
        }
    }

    // A thread is often woken on the CPU of the one that wakes it, which here goes on working: the
    // two would take turns there. So workers may run anywhere but on the caller's CPU.
    void keep_workers_away() {
#if defined(__linux__)
        int here = sched_getcpu();
        cpu_set_t allowed;
        if (here == kept_from || here < 0) return;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
        CPU_CLR(here, &allowed);
        for (std::thread& worker : workers)
            pthread_setaffinity_np(worker.native_handle(), sizeof allowed, &allowed);
        kept_from = here;
#endif
    }

    void serve(int worker) {
        uint64_t s = state.load();
        while (has_piece(s, worker)) {
            if (!state.compare_exchange_weak(s, s + 1)) continue;
            Run function = current_run.load(std::memory_order_relaxed);
            function(current_job.load(std::memory_order_relaxed), int64_t(s & kField), worker);
            unfinished.fetch_sub(1, std::memory_order_release);
            s = state.load();
        }
    }

    void work(int me) {
        for (;;) {
            for (int i = 0; i < kSpins && !has_piece(state.load(), me); i++) pause();
            if (!has_piece(state.load(), me)) {
                std::unique_lock<std::mutex> lock(sleeping);
                sleepers++;
                wake.wait(lock, [&] { return has_piece(state.load(), me); });
                sleepers--;
            }
            serve(me);
        }
    }
};

// Never destroyed: its threads outlive everything else in the process.
inline Pool& pool() {
    static Pool* shared = new Pool;
    return *shared;
}

// Runs body(first, last, worker) over [0, count) in contiguous pieces, worker < threads. `work` is
// a rough number of elements touched in all: small jobs stay on the calling thread, since handing
// them out costs a few microseconds.
template <class Body> void parallel(int threads, int64_t count, int64_t work, const Body& body) {
    constexpr int64_t worth_it = 1 << 17;
    if (threads <= 1 || count <= 1 || work < worth_it) {
        KeepDenormals keep;
        body(int64_t(0), count, 0);
        return;
    }
    struct Job {
        const Body& body;
        int64_t count, pieces;
    } job = {body, count, count < 4 * threads ? count : 4 * threads};
    auto piece = [](const void* untyped, int64_t i, int worker) {
        const Job& job = *static_cast<const Job*>(untyped);
        KeepDenormals keep;
        job.body(job.count * i / job.pieces, job.count * (i + 1) / job.pieces, worker);
    };
    pool().run(threads, job.pieces, piece, &job);
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

// At least `bytes`, aligned to a page, contents undefined; valid until the same thread asks for the
// same slot again. Throws bad_alloc, so it is for the calling thread: take the shares of all
// threads before `parallel`.
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
