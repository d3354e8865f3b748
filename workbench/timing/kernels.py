"""What runs inside an op: CUDA kernels by torch's profiler, the CPU library's functions by name"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dsv4_bench.engine import cpu_library

Kernels = list[dict[str, Any]]  # name, calls, seconds


def kernels_of(call: Callable[[], Any], device: torch.device) -> Kernels:
    """The kernels of one call, by time: {name, calls, seconds}. It runs `call` once, watched.

    On a GPU these are CUDA kernels. On the CPU: functions of our library, and torch's operators
    with their own time.
    """
    cuda = device.type == "cuda"
    with _library_calls() as ours, _profiler(cuda) as profile:
        call()
        if cuda:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = dict(ours)
    for event in profile.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if own > 0 and not event.key.startswith(("ProfilerStep", "cuda", "Activity Buffer")):
            found[event.key] = [event.count, own / 1e6]
    if cuda:  # operators are not kernels
        found = {name: value for name, value in found.items() if not name.startswith("aten::")}
    rows = [{"name": n, "calls": int(c), "seconds": s} for n, (c, s) in found.items()]
    return sorted(rows, key=lambda row: -row["seconds"])


def _profiler(cuda: bool) -> Any:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every use writes two lines to stderr
    if cuda:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        return torch.profiler.profile(activities=activities, acc_events=True)  # else it warns
    return torch.autograd.profiler.profile()


@contextmanager
def _library_calls() -> Iterator[dict[str, list[float]]]:
    """Counts and seconds of every function of the CPU library that is called inside the block."""
    seen: dict[str, list[float]] = {}
    loaded = cpu_library.kernels_at_hand()
    if loaded is None:
        yield seen
        return
    originals = dict(loaded.call)
    for name, function in originals.items():
        loaded.call[name] = _counted(f"dsv4_{name}", function, seen)
    try:
        yield seen
    finally:
        loaded.call.update(originals)


def _counted(
    name: str, function: Callable[..., int], seen: dict[str, list[float]]
) -> Callable[..., int]:
    def call(*args: Any) -> int:
        started = time.perf_counter()
        status = function(*args)
        entry = seen.setdefault(name, [0, 0.0])
        entry[0] += 1
        entry[1] += time.perf_counter() - started
        return status

    return call
