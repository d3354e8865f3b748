"""Error metrics between two tensors of one shape; `truth` is usually float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TYPICAL = 0.1  # rows below this share of the typical norm (sums that cancel) are judged by it


def all_finite(x: Tensor) -> bool:
    """Whether every value is finite; one reduction, so cheap where it is true."""
    return bool(torch.isfinite(x.sum(dtype=torch.float64)))


def _finite_pair(value: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, with places where either is not finite set to 0 in both."""
    a, b = value.double(), truth.double()
    if all_finite(a) and all_finite(b):
        return a, b
    finite = torch.isfinite(a) & torch.isfinite(b)
    return torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Relative L2 over the finite places: |value - truth| / |truth|; absolute where truth is 0."""
    return tensor_and_row_error(value, truth)[0]


def tensor_and_row_error(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """(relative L2 of the whole, largest relative L2 of a row), over the finite places.

    A row is an index of the first axis; one far below the typical norm is measured against that.
    """
    if truth.numel() == 0:
        return 0.0, 0.0
    a, b = (rows_of(t) for t in _finite_pair(value, truth))
    errors, norms = (a - b).norm(dim=1), b.norm(dim=1)
    error, scale = float(errors.norm()), float(norms.norm())
    typical = scale / len(norms) ** 0.5
    worst = float((errors / norms.clamp(min=max(_TYPICAL * typical, 1e-30))).max())
    return (error / scale, worst) if scale > 0 else (error, error)


def rows_of(x: Tensor) -> Tensor:
    """[..., k] -> [rows, k]: the first axis is the row, everything else its content."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def masks_differ(value: Tensor, truth: Tensor) -> Tensor:
    """Where exactly one of the two is not finite, or both are but differently (NaN, +inf, -inf)."""
    if value.is_floating_point() and all_finite(value) and all_finite(truth):
        return torch.zeros(truth.shape, dtype=torch.bool, device=truth.device)
    a, b = value.double(), truth.double()
    kind_a = torch.where(torch.isnan(a), 3.0, torch.where(torch.isinf(a), a.sign(), 0.0))
    kind_b = torch.where(torch.isnan(b), 3.0, torch.where(torch.isinf(b), b.sign(), 0.0))
    return kind_a != kind_b


def cosine(value: Tensor, truth: Tensor) -> float:
    """Cosine of the angle between the two; blind to a constant factor, so never used alone."""
    a, b = (t.flatten() for t in _finite_pair(value, truth))
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else 1.0


def max_abs(value: Tensor, truth: Tensor) -> tuple[float, list[int]]:
    """Largest absolute difference and its coordinate."""
    a, b = _finite_pair(value, truth)
    if a.numel() == 0:
        return 0.0, []
    distance = (a - b).abs()
    coordinate: list[int] = []
    flat = int(distance.argmax())
    for length in reversed(a.shape):  # torch.unravel_index imports sympy, which takes a second
        flat, index = divmod(flat, length)
        coordinate.insert(0, index)
    return float(distance.max()), coordinate


def measure(value: Tensor, truth: Tensor) -> dict[str, Any]:
    """How `value` differs from `truth` (one shape), in every number we have.

    relative_l2, worst_row, max_abs with its coordinate `at`, cosine, ulp (counts by distance in
    units in the last place, finite places only), mask_differences (places where one is NaN or
    infinite and the other is not).
    """
    error, row = tensor_and_row_error(value, truth)
    largest, at = max_abs(value, truth)
    finite = torch.isfinite(value) & torch.isfinite(truth)
    return {
        "relative_l2": error,
        "worst_row": row,
        "max_abs": largest,
        "at": at,
        "cosine": cosine(value, truth),
        "ulp": ulp_histogram(value[finite], truth[finite]),
        "mask_differences": int(masks_differ(value, truth).sum()),
    }


def ulp_histogram(value: Tensor, truth: Tensor) -> dict[str, int]:
    """How many values are 0, 1, 2, 3-4, 5-16 and more units in the last place off, in value's dtype."""
    rounded = truth.to(value.dtype)
    distance = (_ordered(value) - _ordered(rounded)).abs()
    edges = {"0": 0, "1": 1, "2": 2, "3-4": 4, "5-16": 16}
    counts, below = {}, 0
    for name, edge in edges.items():
        upto = int((distance <= edge).sum())
        counts[name], below = upto - below, upto
    counts["more"] = distance.numel() - below
    return counts


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the float values, neighbours one apart."""
    bits = {4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()]
    raw = x.contiguous().view(bits).long()
    lowest = {4: 1 << 31, 2: 1 << 15, 8: 0}[x.element_size()]
    return torch.where(raw < 0, -(raw + lowest), raw)
