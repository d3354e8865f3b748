"""Statistics of one tensor, with as few passes over it as a healthy tensor needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stats:
    """Counts of values, and moments over the finite ones (0 when there are none)."""

    finite: int
    nan: int
    inf: int
    abs_max: float
    rms: float
    mean: float

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


def tensor_stats(tensor: Tensor) -> Stats | None:
    """Statistics of a floating-point tensor of any shape; None for other dtypes."""
    if not tensor.is_floating_point():
        return None
    values = tensor.detach().float().flatten()
    count = values.numel()
    if count == 0:
        return Stats(0, 0, 0, 0.0, 0.0, 0.0)
    # Squares of float32 cannot overflow a float64 sum, so a finite norm means finite values.
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    nan = inf = 0
    if not math.isfinite(norm):
        finite = torch.isfinite(values)
        nan = int(torch.isnan(values).sum())
        inf = count - int(finite.sum()) - nan
        values = values[finite]
        count = values.numel()
        if count == 0:
            return Stats(0, nan, inf, 0.0, 0.0, 0.0)
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    low, high = torch.stack(torch.aminmax(values)).tolist()
    mean = float(values.sum(dtype=torch.float64)) / count
    return Stats(count, nan, inf, max(-low, high), norm / math.sqrt(count), mean)


def first_nonfinite(tensor: Tensor) -> list[int] | None:
    """Coordinate of the first NaN or infinity in row-major order, or None."""
    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return None
    flat = int(bad.flatten().to(torch.uint8).argmax())
    return [int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape)]
