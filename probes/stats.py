"""Statistics of one tensor in one pass over it"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine import cpu_library


class Stats(NamedTuple):
    """Counts of values, and moments over the finite ones (0 when there are none).

    `minus_inf` are those of `inf` below zero. `peaks` counts the finite values of magnitude `abs_max`:
    many of them show a clamp. On an accelerator the fields are tensors there; see `readings.fetch`.
    """

    finite: Any
    nan: Any
    inf: Any
    minus_inf: Any
    zero: Any
    peaks: Any
    abs_max: Any
    rms: Any
    mean: Any

    def to_dict(self) -> dict[str, float]:
        return self._asdict()


def tensor_stats(tensor: Tensor) -> Stats | None:
    """Statistics of a floating-point tensor of any shape; None for other dtypes."""
    if not tensor.is_floating_point():
        return None
    if tensor.is_cpu and tensor.dtype in cpu_library.DTYPES:
        library = cpu_library.kernels_at_hand()
        if library is not None:
            return _compiled(library, tensor)
    return Stats(*(value.item() for value in _reduced(tensor)))


def device_stats(tensor: Tensor) -> Stats | None:
    """The same with every field a 0-d tensor on the tensor's device: nobody waits for it."""
    return _reduced(tensor) if tensor.is_floating_point() else None


def _compiled(library: cpu_library.Kernels, tensor: Tensor) -> Stats:
    out = (ctypes.c_double * 8)()
    values = tensor if tensor.is_contiguous() else tensor.contiguous()
    total = tensor.numel()
    library.call["stats"](
        values.data_ptr(),
        cpu_library.DTYPES[tensor.dtype],
        total,
        ctypes.addressof(out),
        torch.get_num_threads(),
    )
    *counts, abs_max, sums, squares = out
    nan, inf, minus_inf, zero, peaks = map(int, counts)
    finite = total - nan - inf
    count = finite or 1
    rms, mean = math.sqrt(squares / count), sums / count
    return Stats(finite, nan, inf, minus_inf, zero, peaks, abs_max, rms, mean)


def _reduced(tensor: Tensor) -> Stats:
    """With torch's reductions, on the tensor's device; no value decides what is done next."""
    values = tensor.detach().flatten()
    values = values if values.dtype == torch.float64 else values.float()
    good = torch.isfinite(values)
    nan = values.isnan().sum()
    finite = good.sum()
    inf = values.numel() - finite - nan
    minus_inf = (values == -torch.inf).sum()
    values = torch.where(good, values, 0.0)
    magnitude = values.abs()
    abs_max = magnitude.max() if len(values) else values.new_zeros(())
    peaks = ((magnitude == abs_max) & good).sum()
    zero = ((values == 0) & good).sum()
    count = finite.clamp(min=1).double()
    # Squares of float32 cannot overflow a float64 sum.
    rms = torch.linalg.vector_norm(values, dtype=torch.float64) / count.sqrt()
    mean = values.sum(dtype=torch.float64) / count
    return Stats(finite, nan, inf, minus_inf, zero, peaks, abs_max, rms, mean)


def first_nonfinite(tensor: Tensor) -> list[int] | None:
    """Coordinate of the first NaN or infinity in row-major order, or None."""
    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return None
    flat = int(bad.flatten().to(torch.uint8).argmax())
    return [int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)]
