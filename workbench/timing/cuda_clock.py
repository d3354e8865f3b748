"""Times on a GPU: what a call adds to a CUDA graph that empties the L2 before it

A graph of n times [evict, warm, leader, call] is replayed beside one of n times the same without the
call; their difference over n is the call as it runs inside a captured forward pass: back to back
with what is before and after it, weights and cache from memory, no launch from Python in it, and
what a dependent graph node costs within. The leader is a kernel that does nothing but allow the next
one to be launched, as every kernel of ours does, so that programmatic launches overlap as they do
there.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4_bench.engine import cuda
from dsv4_bench.workbench.timing.clock import Call, Timed

_EVICTION = 3  # times the L2's size is read between two calls
_COPIES, _REPLAY = 8, 2e-3  # calls in one graph, fewer where a replay would take longer (seconds)
_LONGEST_HOLD = 0.1  # seconds the GPU is kept waiting at most, so that launches get ahead of it
_CYCLES = 2e9  # per second, of torch.cuda._sleep; a slower clock only holds longer


class CudaClock:
    """Graphs where a call can be captured; else events around a call that was launched ahead.

    The L2 is emptied by reading: after writing, its dirty lines would be written back at the cost of
    the call that is timed.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._scratch = torch.zeros(_EVICTION * size // 4, dtype=torch.float32, device="cuda")
        self._warmable = size // 4  # bytes of one tensor that is worth keeping in the cache
        self._sink = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._own = cuda.timing.available()
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        # A pool without a graph is gone for good, so one graph stays.
        self._keeper = self.capture(lambda: self._sink.add_(1), 1)
        self._launch: float | None = None  # of a graph
        self._empty = statistics.median(events(lambda: None) for _ in range(20))

    def evict(self) -> None:
        """Read something else until nothing of what was is left in the L2."""
        if self._own:
            cuda.timing.read_pass(self._scratch, self._sink)
        else:
            self._scratch.sum()

    def fill_caches(self, warm: Sequence[Tensor]) -> None:
        """Empty the L2, but for what is small enough of `warm`."""
        self.evict()
        for tensor in warm:
            if 0 < tensor.nbytes <= self._warmable:
                tensor.clone()  # reads it, whatever its dtype and strides

    def prepare(self, make: Callable[[], Call], warm: Sequence[Tensor] = ()) -> Timed:
        make()()  # builds and tables
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            make()()  # what libraries keep for a stream
        torch.cuda.synchronize()

        def before() -> None:
            self.fill_caches(warm)
            if self._own:  # as the op before would, it lets the first kernel start before its end
                cuda.timing.leader(self._sink)

        problem = waits(make())
        if problem:
            return _StreamTimed(make, before, self._empty, "waits", problem)
        try:
            return _GraphTimed(self, make(), before)
        except RuntimeError as error:  # not to be captured for a reason of its own
            self._recover()
            text = str(error).splitlines()[0]
            return _StreamTimed(make, before, self._empty, "stream", text)

    def _recover(self) -> None:
        """After a capture that failed: torch's allocator and random numbers believe that it goes on."""
        torch.cuda.synchronize()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        with contextlib.suppress(RuntimeError):
            self._pool = torch.cuda.graph_pool_handle()
            self._keeper = self.capture(lambda: self._sink.add_(1), 1)

    def replay_seconds(self, replay: Call) -> float:
        """Seconds of one replay of somebody's graph with an empty L2, less what launching it takes."""

        def evicted(launch: Call) -> float:
            self.evict()
            return events(launch)

        if self._launch is None:
            graphs = [self.capture(lambda: self._sink.add_(1), count) for count in (1, 9)]
            one, nine = (statistics.median(evicted(g.replay) for _ in range(20)) for g in graphs)
            self._launch = one - (nine - one) / 8  # without what its only node takes
        return max(evicted(replay) - self._launch, 1e-9)

    def capture(self, body: Call, times: int) -> torch.cuda.CUDAGraph:
        """`times` copies of `body` as one graph; without the garbage collection torch.cuda.graph does."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                for _ in range(times):
                    body()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


def waits(call: Call) -> str:
    """How `call` waits for the GPU on its way, as `.item()` does; "" if it does not.

    It runs, at least up to there.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return ""


def events(call: Call) -> float:
    """Seconds between an event before `call` and one after it."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


class _GraphTimed:
    how, problem = "graph", ""

    def __init__(self, clock: CudaClock, call: Call, before: Call) -> None:
        def whole() -> None:
            before()
            call()

        once = clock.capture(whole, 1)
        events(once.replay)
        self._kept = call, before  # whose tensors the graphs read
        self._copies = max(1, min(_COPIES, int(_REPLAY / events(once.replay))))
        self._with = clock.capture(whole, self._copies) if self._copies > 1 else once
        self._without = clock.capture(before, self._copies)

    def sample(self) -> float:
        more, less = events(self._with.replay), events(self._without.replay)
        return max((more - less) / self._copies, 1e-9)


class _StreamTimed:
    def __init__(
        self, make: Callable[[], Call], before: Call, empty: float, how: str, problem: str
    ) -> None:
        self.how, self.problem = how, problem
        self._make = make
        self._before = before
        self._empty = empty
        call = make()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        self._hold = min(1.5 * (time.perf_counter() - started), _LONGEST_HOLD)
        torch.cuda.synchronize()

    def sample(self) -> float:
        call = self._make()
        torch.cuda.synchronize()
        self._before()
        torch.cuda._sleep(int(self._hold * _CYCLES))
        return max(events(call) - self._empty, 1e-9)
