"""Statistics of one tensor in one pass over it, and sums along its axes"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine import cpu_library


class Stats(NamedTuple):
    """Counts of values, and moments over the finite ones (0 when there are none).

    `minus_inf` are those of `inf` below zero. `peaks` counts the finite values of magnitude `abs_max`:
    many of them show a clamp. rms = sqrt(sum x^2 / finite), mean = sum x / finite.
    """

    finite: int
    nan: int
    inf: int
    minus_inf: int
    zero: int
    peaks: int
    abs_max: float
    rms: float
    mean: float

    @classmethod
    def of_row(cls, row: Sequence[float]) -> Stats:
        """From nine numbers as a device reports them: up to abs_max in this order, then sum x^2, sum x."""
        finite, nan, inf, minus_inf, zero, peaks = map(int, row[:6])
        abs_max, squares, total = row[6:9]
        count = finite or 1
        rms, mean = math.sqrt(squares / count), total / count
        return cls(finite, nan, inf, minus_inf, zero, peaks, abs_max, rms, mean)

    def to_dict(self) -> dict[str, float]:
        return self._asdict()


class Sums(NamedTuple):
    """How many sums there are, how many of them NaN, and what the others come to (0 of none)."""

    number: int
    nan: int
    low: float
    high: float
    mean: float

    @classmethod
    def of_row(cls, row: Sequence[float]) -> Sums:
        """From a device's row of nine numbers: how many, NaN, five others, low, high, total."""
        number, nan = int(row[0]), int(row[1])
        if nan == number:
            return cls(number, nan, 0.0, 0.0, 0.0)
        low, high, total = row[6:9]
        return cls(number, nan, low, high, total / (number - nan))

    def furthest(self, target: float) -> float:
        """The sum that is furthest from `target`; NaN if one is NaN."""
        if self.nan:
            return math.nan
        return max(self.low, self.high, key=lambda value: abs(value - target))


def tensor_stats(tensor: Tensor) -> Stats | None:
    """Statistics of a floating-point tensor of any shape; None for other dtypes."""
    if not tensor.is_floating_point():
        return None
    if tensor.is_cpu and tensor.dtype in cpu_library.DTYPES:
        library = cpu_library.kernels_at_hand()
        if library is not None:
            return _compiled(library, tensor)
    return Stats.of_row(reduced(tensor).tolist())


def tensor_sums(tensor: Tensor, axis: int | None) -> Sums:
    """The sums along `axis` of a tensor on the CPU, its values if None, in float64."""
    sums = tensor.double() if axis is None else tensor.double().sum(axis)
    if sums.numel():
        low, high = (value.item() for value in sums.aminmax())
        if low == low and high == high:  # no NaN among them
            return Sums(sums.numel(), 0, low, high, sums.mean().item())
    return Sums.of_row(reduced_sums(tensor, axis).tolist())


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
    nan, inf, minus_inf, zero, peaks, abs_max, sums, squares = out
    return Stats.of_row(
        (total - nan - inf, nan, inf, minus_inf, zero, peaks, abs_max, squares, sums)
    )


def reduced(tensor: Tensor, index: Tensor | None = None) -> Tensor:
    """A row for `Stats` as float64 [9], with torch's reductions on the tensor's device.

    `index`: of these rows alone, those below 0 left out. Nobody waits: no value decides what is done.
    """
    values, kept = _flat(tensor, index)
    values = values if values.dtype == torch.float64 else values.float()
    good = torch.isfinite(values) & kept
    nan = (values.isnan() & kept).sum()
    inf = (values.isinf() & kept).sum()
    minus_inf = ((values == -torch.inf) & kept).sum()
    finite = good.sum()
    values = torch.where(good, values, 0.0)
    magnitude = values.abs()
    abs_max = magnitude.max() if len(values) else values.new_zeros(())
    peaks = ((magnitude == abs_max) & good).sum()
    zero = ((values == 0) & good).sum()
    # Squares of float32 cannot overflow a float64 sum.
    squares = torch.linalg.vector_norm(values, dtype=torch.float64).square()
    total = values.sum(dtype=torch.float64)
    fields = (finite, nan, inf, minus_inf, zero, peaks, abs_max, squares, total)
    return torch.stack([field.double() for field in fields])


def _flat(tensor: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values [n], or those of the rows `index` with others among them, and which count [n] or []."""
    values = tensor.detach()
    if index is None:
        return values.flatten(), torch.ones((), dtype=torch.bool, device=values.device)
    rows = values[index.clamp(min=0)].flatten(1)
    return rows.flatten(), (index >= 0)[:, None].expand(rows.shape).flatten()


def reduced_sums(tensor: Tensor, axis: int | None) -> Tensor:
    """A row for `Sums` as float64 [9]: of the sums along `axis`, or of the values. Nobody waits."""
    sums = tensor.detach().double()
    sums = (sums if axis is None else sums.sum(axis)).flatten()
    nan = sums.isnan()
    row = sums.new_zeros(9)
    row[0], row[1] = len(sums), nan.sum()
    if len(sums):
        row[6] = torch.where(nan, torch.inf, sums).min()
        row[7] = torch.where(nan, -torch.inf, sums).max()
        row[8] = torch.where(nan, 0.0, sums).sum()
    return row


def exponent_counts(tensor: Tensor, index: Tensor | None = None) -> Tensor:
    """[256] int64: values with each biased exponent of float32, on the tensor's device.

    `index`: of these rows alone, those below 0 left out.
    """
    values, kept = _flat(tensor, index)
    exponents = (values.float().contiguous().view(torch.int32) >> 23) & 0xFF
    counts = torch.zeros(256, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, exponents.long(), kept.long().expand(exponents.shape))


def empty_counts(tensor: Tensor) -> Tensor:
    """How many values of each row of [..., n] are -infinity, or below 0 of integers: int64 [...]."""
    empty = tensor == -torch.inf if tensor.is_floating_point() else tensor < 0
    return empty.sum(-1)


def first_nonfinite(tensor: Tensor) -> list[int] | None:
    """Coordinate of the first NaN or infinity in row-major order, or None."""
    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return None
    flat = int(bad.flatten().to(torch.uint8).argmax())
    return [int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)]
