"""How long one call takes: on the CPU by the wall clock, on a GPU inside a CUDA graph, caches emptied before"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_L2_DEFAULT = 2 << 20  # bytes of a core's own cache where the system does not say

Call = Callable[[], Any]


class Timed(Protocol):
    """One call, ready to be timed again and again.

    `how`: ``wall`` (the wall clock), ``graph`` (inside a CUDA graph), ``stream`` (between two events,
    launched ahead of the GPU), ``waits`` (the same of a call that waits for the GPU on its way, so
    that its launches are part of the time). `problem`: why it could not be captured in a graph.
    """

    how: str
    problem: str

    def sample(self) -> float:
        """Seconds of one call whose inputs come from memory, except what was to be warm."""
        ...


class Clock(Protocol):
    """Prepares calls for timing."""

    def prepare(self, make: Callable[[], Call], warm: Sequence[Tensor] = ()) -> Timed:
        """`make` gives the call, with arguments of its own where they are written in place.

        `warm`: tensors that the op before has just written, and that are in the cache therefore.
        """
        ...


class CpuClock:
    """perf_counter around the call; before it, four times the cores' L2 is written over."""

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.zeros(4 * l2_bytes() * torch.get_num_threads() // 4, dtype=torch.float32)

    def evict(self) -> None:
        self._scratch.add_(1.0)

    def prepare(self, make: Callable[[], Call], warm: Sequence[Tensor] = ()) -> Timed:
        make()()
        return _WallTimed(self, make)


class _WallTimed:
    how, problem = "wall", ""

    def __init__(self, clock: CpuClock, make: Callable[[], Call]) -> None:
        self.clock = clock
        self.make = make

    def sample(self) -> float:
        call = self.make()
        self.clock.evict()
        started = time.perf_counter()
        call()
        return time.perf_counter() - started


def make_clock(device: torch.device) -> Clock:
    """The clock for `device`."""
    if device.type == "cuda":
        from dsv4_bench.workbench.timing.cuda_clock import CudaClock

        return CudaClock()
    return CpuClock()


def l2_bytes() -> int:
    """Bytes of one core's L2, from the system; 2 MiB where it does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.rstrip("KM")) << (20 if text.endswith("M") else 10)
    except (OSError, ValueError):
        return _L2_DEFAULT
