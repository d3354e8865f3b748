"""Two tensors that should be equal: how far apart, where, and is it too far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Provisional limits of relative L2 between two implementations on the same inputs, by dtype of the
# activations: a few float32 sums in another order; one bfloat16 rounding, 2^-9, with room.
RELATIVE_LIMIT = {torch.float32: 2e-5, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Comparison:
    """`ours` against `theirs`. NaN never passes: different non-finite masks are `over`.

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
        return asdict(self)


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
    same_elsewhere = torch.where(finite, torch.zeros_like(a), a).nan_to_num(
        nan=7.25
    ) == torch.where(finite, torch.zeros_like(b), b).nan_to_num(nan=7.25)
    masks_equal = bool(same_elsewhere.all())
    difference = torch.where(finite, a - b, 0.0).abs()
    at = (
        int(difference.argmax())
        if masks_equal
        else int((~same_elsewhere).flatten().to(torch.uint8).argmax())
    )
    scale = float(torch.where(finite, b, 0.0).norm())
    error = float(difference.norm()) / scale if scale > 0 else float(difference.norm())
    verdict = "ok" if masks_equal and error <= limit else "over"
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
        verdict,
    )


def _compare_sets(
    output: str, ours: Tensor, theirs: Tensor, equal: bool, limit: float
) -> Comparison:
    a, b = ours.sort(-1).values, theirs.sort(-1).values
    rows = (a != b).flatten(0, -2).any(-1) if a.dim() > 1 else (a != b)
    share = float(rows.double().mean())
    at = int(rows.to(torch.uint8).argmax())
    first = (a.flatten(0, -2) if a.dim() > 1 else a)[at].flatten()
    other = (b.flatten(0, -2) if b.dim() > 1 else b)[at].flatten()
    column = int((first != other).to(torch.uint8).argmax())
    verdict = "ok" if share == 0 else "over"
    return Comparison(
        output,
        share,
        share,
        [at],
        float(first[column]),
        float(other[column]),
        equal,
        True,
        0.0,
        verdict,
    )


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def limit_for(dtype: torch.dtype) -> float:
    """The provisional limit of own error for activations of `dtype`."""
    return RELATIVE_LIMIT.get(dtype, RELATIVE_LIMIT[torch.float32])
