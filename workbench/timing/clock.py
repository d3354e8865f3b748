"""How long one call takes: on the CPU by the wall clock, on a GPU by events, caches emptied before"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

_L2_DEFAULT = 2 << 20  # bytes of a core's own cache where the system does not say
_GPU_SCRATCH = 256 << 20  # more than four times the L2 of a Hopper GPU


class Clock(Protocol):
    """Measures single calls. `evict` empties the fast caches, so that inputs come from memory."""

    def seconds(self, call: Callable[[], Any]) -> float: ...
    def evict(self) -> None: ...


class CpuClock:
    """perf_counter around the call; eviction writes four times the cores' L2."""

    @cached_property
    def _scratch(self) -> torch.Tensor:
        return torch.zeros(4 * l2_bytes() * torch.get_num_threads() // 4, dtype=torch.float32)

    def evict(self) -> None:
        self._scratch.add_(1.0)

    def seconds(self, call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


class CudaClock:
    """CUDA events around the call, less what an empty pair reads.

    The eviction is a long kernel, so that the call is queued behind it and its launch is not part
    of the time; a call that waits for the device itself shows that wait.
    """

    def __init__(self) -> None:
        self._scratch = torch.zeros(_GPU_SCRATCH // 4, dtype=torch.float32, device="cuda")
        self._empty = 0.0
        self._empty = statistics.median(self._pair(lambda: None) for _ in range(20))

    def evict(self) -> None:
        self._scratch.add_(1.0)

    def seconds(self, call: Callable[[], Any]) -> float:
        return max(self._pair(call) - self._empty, 1e-9)

    def _pair(self, call: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        self.evict()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3


def make_clock(device: torch.device) -> Clock:
    """The clock for `device`."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def l2_bytes() -> int:
    """Bytes of one core's L2, from the system; 2 MiB where it does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
    except (OSError, ValueError):
        return _L2_DEFAULT
