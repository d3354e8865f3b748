"""Two tensors that should be equal: how far apart, where, and is it too far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Provisional limits of relative L2 between two implementations on the same inputs, by dtype of the
# activations: a few float32 sums in another order; one bfloat16 rounding, 2^-9, with room.
RELATIVE_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Comparison:
    """`ours` against `theirs`. NaN never passes: where the non-finite values differ, or the shapes,
    `relative_l2` is infinite.

    For discrete outputs `relative_l2` is the share of rows whose sets differ.
    """

    output: str
    relative_l2: float
    max_abs: float
    coordinate: list[int]
    ours: float
    theirs: float
    bits_equal: bool
    masks_equal: bool
    limit: float
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def compare(
    output: str, ours: Tensor, theirs: Tensor, limit: float, discrete: bool = False
) -> Comparison:
    """Compare tensors of one shape; non-finite values must stand in the same places."""
    if ours.shape != theirs.shape:
        return Comparison(output, float("inf"), float("inf"), [], 0, 0, False, False, limit, "over")
    equal = bits_equal(ours, theirs)
    if ours.numel() == 0:
        return Comparison(output, 0.0, 0.0, [], 0, 0, equal, True, limit, "ok")
    if discrete:
        return _compare_sets(output, ours, theirs, equal, limit)
    a, b = ours.double(), theirs.double()
    finite = torch.isfinite(a) & torch.isfinite(b)
    odd = ~finite & ~((a == b) | (a.isnan() & b.isnan()))  # non-finite, and not in the same way
    masks_equal = not bool(odd.any())
    difference = torch.where(finite, a - b, 0.0).abs()
    if masks_equal:
        at = int(difference.argmax())
        scale = float(torch.where(finite, b, 0.0).norm())
        error = float(difference.norm()) / (scale if scale > 0 else 1.0)
    else:
        at, error = int(odd.flatten().to(torch.uint8).argmax()), float("inf")
    return Comparison(
        output,
        error,
        float(difference.max()),
        [int(i) for i in torch.unravel_index(torch.tensor(at), ours.shape)],
        float(a.flatten()[at]),
        float(b.flatten()[at]),
        equal,
        masks_equal,
        limit,
        "ok" if error <= limit else "over",
    )


def _compare_sets(
    output: str, ours: Tensor, theirs: Tensor, equal: bool, limit: float
) -> Comparison:
    """Rows [..., k] as sets. The coordinate is the first row that differs, with one id of each."""
    a = ours.reshape(-1, ours.shape[-1]).sort(-1).values
    b = theirs.reshape(-1, theirs.shape[-1]).sort(-1).values
    rows = (a != b).any(-1)
    share = float(rows.double().mean())
    at = int(rows.to(torch.uint8).argmax())
    column = int((a[at] != b[at]).to(torch.uint8).argmax())
    x, y = float(a[at, column]), float(b[at, column])
    verdict = "ok" if share == 0 else "over"
    return Comparison(output, share, share, [at], x, y, equal, True, 0.0, verdict)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def limit_for(dtype: torch.dtype) -> float:
    """The provisional limit of own error for activations of `dtype`."""
    return RELATIVE_LIMIT.get(dtype, RELATIVE_LIMIT[torch.float32])
