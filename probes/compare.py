"""Two tensors that should be equal: how far apart, where, and is it too far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.probes.metrics import masks_differ, max_abs, tensor_and_row_error

INF = math.inf


@dataclass(frozen=True)
class Comparison:
    """`ours` against `theirs`. NaN never passes: where the non-finite values differ, or the shapes,
    the errors are infinite.

    `row_error` is the largest relative L2 of a row. For discrete outputs both errors are the share
    of rows whose sets differ. `against` says what theirs are: ``reference`` or ``float64``.
    """

    output: str
    relative_l2: float
    row_error: float
    max_abs: float
    coordinate: list[int]
    ours: float
    theirs: float
    bits_equal: bool
    masks_equal: bool
    limit: float
    row_limit: float = INF
    against: str = "reference"
    note: str = ""

    @property
    def times(self) -> float:
        """The error in units of its limit, of the tensor or its worst row, whichever is more."""
        return max(_times(self.relative_l2, self.limit), _times(self.row_error, self.row_limit))

    @property
    def worst(self) -> tuple[float, float]:
        """(error, limit): the tensor's, or its worst row's if that is further over."""
        whole = _times(self.relative_l2, self.limit) >= _times(self.row_error, self.row_limit)
        return (self.relative_l2, self.limit) if whole else (self.row_error, self.row_limit)

    @property
    def verdict(self) -> str:
        return "ok" if self.times <= 1 else "over"

    def to_dict(self) -> dict[str, Any]:
        more = {"times": self.times, "verdict": self.verdict, "worst": list(self.worst)}
        return {**vars(self), **more}


def _times(error: float, limit: float) -> float:
    if error == 0:
        return 0.0
    return INF if limit == 0 or not math.isfinite(error) else error / limit


def compare(
    output: str,
    ours: Tensor,
    theirs: Tensor,
    limit: float,
    row_limit: float = INF,
    discrete: bool = False,
    against: str = "reference",
) -> Comparison:
    """Compare tensors of one shape; non-finite values must stand in the same places.

    Equal bits are seen first, and cost one pass. `discrete` compares rows [..., k] as sets, with
    limit 0.
    """
    if ours.shape != theirs.shape:
        return Comparison(
            output, INF, INF, INF, [], 0, 0, False, False, limit, row_limit, against
        )  # fmt: skip
    equal = bits_equal(ours, theirs)
    if equal or ours.numel() == 0:
        at = [0] * ours.dim() if ours.numel() else []
        value = float(ours[tuple(at)]) if ours.numel() else 0.0
        return Comparison(
            output, 0.0, 0.0, 0.0, at, value, value, equal, True, limit, row_limit, against
        )
    if discrete:
        return _compare_sets(output, ours, theirs, against)
    a, b = ours.double(), theirs.double()
    odd = masks_differ(a, b)  # not finite, and not in the same way
    distance, at = max_abs(a, b)
    masks_equal = not bool(odd.any())
    if masks_equal:
        error, row = tensor_and_row_error(a, b)
    else:
        error = row = INF
        at = [int(i) for i in odd.nonzero()[0]]
    place = tuple(at)
    return Comparison(
        output, error, row, distance, at, float(a[place]), float(b[place]), False, masks_equal,
        limit, row_limit, against,
    )  # fmt: skip


def _compare_sets(output: str, ours: Tensor, theirs: Tensor, against: str) -> Comparison:
    """Rows [..., k] as sets. The coordinate is the first row that differs, with one id of each."""
    a = ours.reshape(-1, ours.shape[-1]).sort(-1).values
    b = theirs.reshape(-1, theirs.shape[-1]).sort(-1).values
    rows = (a != b).any(-1)
    share = float(rows.double().mean())
    at = int(rows.to(torch.uint8).argmax())
    column = int((a[at] != b[at]).to(torch.uint8).argmax())
    x, y = float(a[at, column]), float(b[at, column])
    return Comparison(output, share, share, share, [at], x, y, False, True, 0.0, 0.0, against)


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
