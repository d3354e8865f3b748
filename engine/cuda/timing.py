"""Kernels that measure a GPU: a pass that only reads, and the one that stands before a timed call"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import Library, N, P, unavailable
from dsv4_bench.engine.registry import Context

TIMING = Library("timing", {"read_pass": (P, N, P), "leader": ()})


def read_pass(data: Tensor, sink: Tensor) -> None:
    """Read the contiguous CUDA tensor `data` once; `sink` [1] int32 keeps its value.

    Raises DSV4Error unless its bytes and its address are multiples of 16.
    """
    TIMING.call("read_pass", data, data.data_ptr(), data.nbytes, sink.data_ptr())


def leader(on: Tensor) -> None:
    """Launch a kernel that does nothing but let the next one be launched before it ends."""
    TIMING.call("leader", on)


def available() -> bool:
    """Whether these kernels run here: a GPU they are compiled for, and built or to be built."""
    return unavailable("timing", Context("cuda", torch.float32), (torch.float32,)) is None
