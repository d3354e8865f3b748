"""What kind of wrong: signatures computed from a wrong output and the right one.

`classify` looks at where the two differ (rows, columns, heads, tiles) and how (a constant factor, a
permutation, a shift, a clamp, zeros), and takes the first description that explains the difference
down to the limit. It knows nothing of any implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.probes.metrics import masks_differ, relative_error

KINDS = (
    "constant_factor", "transposed", "permuted", "halves_swapped", "shifted", "rows", "columns",
    "tiles", "positions", "nan", "padding", "saturated", "flushed", "nibbles", "scale_order",
    "stale", "nondeterministic", "decision_flip", "unexplained",
)  # fmt: skip
_EXPLAINS = 0.02  # share of the error that may be left over by a good description


@dataclass(frozen=True)
class Signature:
    """`kind` is one of KINDS; `detail` completes the sentence "<site>: <detail>"."""

    kind: str
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "detail": self.detail}


@dataclass(frozen=True)
class Difference:
    """A wrong output `ours` beside `truth` (both float64 [n, ...]), with the limit it broke."""

    name: str
    ours: Tensor
    truth: Tensor
    limit: float
    positions: Tensor | None = None  # [n] absolute position of each row, if rows are tokens

    @property
    def error(self) -> float:
        return relative_error(self.ours, self.truth)

    def explained_by(self, candidate: Tensor) -> bool:
        """Whether `candidate`, a transform of the truth, is what ours is."""
        return relative_error(self.ours, candidate) <= self.left_over

    @property
    def left_over(self) -> float:
        """How far a good description may be from ours: well below what it has to explain."""
        return max(_EXPLAINS * self.error, min(self.limit, 0.3 * self.error))


def classify(difference: Difference) -> Signature:
    """The first description that fits, from the most to the least specific."""
    if bool(masks_differ(difference.ours, difference.truth).any()):
        return _nonfinite(difference)
    for test in (_zero, _factor, _saturated, _shuffles, _support):
        found = test(difference)
        if found is not None:
            return found
    return Signature(
        "unexplained", f"{difference.name} differs by {difference.error:.2g} everywhere"
    )


# ------------------------------------------------------------------------------ values


def _nonfinite(d: Difference) -> Signature:
    bad = masks_differ(d.ours, d.truth)
    first = [int(i) for i in bad.nonzero()[0]]
    value, right = float(d.ours[tuple(first)]), float(d.truth[tuple(first)])
    rows = bad.flatten(1).any(1) if bad.dim() > 1 else bad
    where = _span(rows.nonzero().flatten(), len(rows), "row")
    return Signature("nan", f"{d.name}{first} is {value}, should be {right:.4g}; {where}")


def _zero(d: Difference) -> Signature | None:
    """Values that should not be zero are: all of them, or the small ones (flushed)."""
    zeroed = (d.ours == 0) & (d.truth != 0)
    if not bool(zeroed.any()):
        return None
    if not d.explained_by(torch.where(zeroed, 0.0, d.truth)):
        return None
    share = float(zeroed.double().mean())
    rest = d.truth.abs()[~zeroed & (d.truth != 0)]
    if rest.numel() == 0:
        return Signature("flushed", f"{d.name} is zero everywhere")
    largest = float(d.truth.abs()[zeroed].max())
    if largest <= float(rest.min()) * 1.01:
        return Signature(
            "flushed", f"{d.name} below {largest:.3g} is flushed to zero ({share:.1%})"
        )
    where = _where(zeroed)
    return Signature(where[0] or "flushed", f"{d.name} is zero {where[1]}")


def _factor(d: Difference) -> Signature | None:
    """ours = c * truth: for the whole tensor, then per row, head, half, block of columns."""
    whole = _least_squares(d.ours, d.truth)
    if abs(whole - 1) > d.limit and d.explained_by(whole * d.truth):
        return Signature("constant_factor", f"{d.name} = {whole:.5g} x reference")
    for label, view in _groupings(d.truth):
        ours, truth = view(d.ours), view(d.truth)  # [groups, members]
        factors = (ours * truth).sum(1) / truth.square().sum(1).clamp(min=1e-300)
        if len(factors) > truth.shape[1] or not _same(ours, factors[:, None] * truth, d):
            continue
        wrong = (factors - 1).abs() > max(10 * d.limit, 1e-6)
        if not bool(wrong.any()):
            continue
        values = factors[wrong]
        text = f"{float(values.min()):.5g}"
        if float(values.max() - values.min()) > 1e-3 * float(values.abs().max()):
            text += f" to {float(values.max()):.5g}"
        where = _span(wrong.nonzero().flatten(), len(wrong), label)
        return Signature("constant_factor", f"{d.name} = {text} x reference for {where}")
    return None


def _least_squares(ours: Tensor, truth: Tensor) -> float:
    return float((ours * truth).sum() / truth.square().sum().clamp(min=1e-300))


def _same(ours: Tensor, candidate: Tensor, d: Difference) -> bool:
    error = float((ours - candidate).norm() / candidate.norm().clamp(min=1e-300))
    return error <= d.left_over


def _groupings(truth: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Ways to cut a tensor into groups that may each have their own factor."""
    if truth.dim() >= 2:
        yield "row", lambda t: t.flatten(1)
    if truth.dim() == 3:
        yield "head", lambda t: t.transpose(0, 1).flatten(1)
    width = truth.shape[-1]
    for parts, label in ((2, "half"), (width // 128, "block of 128 columns")):
        if parts > 1 and width % parts == 0:
            yield label, partial(_column_blocks, parts)
    if truth.dim() >= 2:
        yield "column", lambda t: t.flatten(0, -2).T


def _column_blocks(parts: int, t: Tensor) -> Tensor:
    """[..., k] -> [parts, members]: columns cut into `parts` equal blocks."""
    return t.unflatten(-1, (parts, -1)).movedim(-2, 0).flatten(1)


def _saturated(d: Difference) -> Signature | None:
    """ours is truth clamped, or truth is ours clamped (a clamp that is missing)."""
    top, bottom = float(d.ours.max()), float(d.ours.min())
    for low, high in ((bottom, top), (-torch.inf, top), (bottom, torch.inf)):
        if d.explained_by(d.truth.clamp(low, high)):
            return Signature("saturated", f"{d.name} is clamped to [{low:.4g}, {high:.4g}]")
    return None


# ------------------------------------------------------------------------------ order


def _shuffles(d: Difference) -> Signature | None:
    for kind, detail, candidate in _rearrangements(d.truth):
        if candidate.shape == d.ours.shape and d.explained_by(candidate):
            return Signature(kind, f"{d.name} {detail}")
    return _permuted(d)


def _rearrangements(truth: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Transforms of the truth that a layout mistake would make."""
    if truth.dim() >= 2 and truth.shape[-1] == truth.shape[-2]:
        yield "transposed", "has its last two axes exchanged", truth.transpose(-1, -2)
    width = truth.shape[-1]
    if width % 2 == 0 and truth.dim() >= 2:
        halves = torch.cat((truth[..., width // 2 :], truth[..., : width // 2]), -1)
        yield "halves_swapped", "has its two halves exchanged", halves
        pairs = truth.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        yield "nibbles", "has neighbouring columns exchanged (low and high nibble)", pairs
        by_halves = truth.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        yield "permuted", "interleaves its two halves", by_halves
        by_pairs = truth.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        yield "permuted", "separates even and odd columns", by_pairs
    for axis, label in ((0, "row"), (-1, "column")):
        for shift in (1, -1, 2, -2, 4, -4):
            if truth.shape[axis] > abs(shift):
                rolled = truth.roll(shift, axis)
                yield (
                    "shifted",
                    f"is shifted by {shift} {label}{'s' if abs(shift) > 1 else ''}",
                    rolled,
                )
    if truth.dim() == 3:
        exchanged = truth.transpose(0, 1).reshape(truth.shape)
        yield "transposed", "mixes up rows and heads", exchanged


def _permuted(d: Difference) -> Signature | None:
    """Rows or columns in another order: match each to its nearest."""
    for axis, label in ((-1, "column"), (0, "row")):
        ours, truth = (t.movedim(axis, 0).flatten(1) for t in (d.ours, d.truth))
        if not 2 <= len(truth) <= 4096 or truth.shape[1] < 2:
            continue
        nearest = torch.cdist(ours, truth).argmin(1)
        if len(set(nearest.tolist())) != len(truth):
            continue
        moved = int((nearest != torch.arange(len(nearest))).sum())
        if moved and _same(ours, truth[nearest], d):
            return Signature(
                "permuted", f"{d.name} has {moved} of {len(truth)} {label}s in another order"
            )
    return None


# ------------------------------------------------------------------------------ places


def _support(d: Difference) -> Signature | None:
    """Only some rows, columns or a tile are wrong."""
    scale = float(d.truth.square().mean().sqrt())
    wrong = (d.ours - d.truth).abs() > max(0.05 * d.error, 4 * d.limit) * scale
    kind, where = _where(wrong)
    if d.positions is not None and kind == "rows":
        rows = (wrong.flatten(1) if wrong.dim() > 1 else wrong[:, None]).any(1)
        first = int(d.positions[rows].min())
        right = d.positions[~rows]
        if len(right) and int(right.max()) < first:
            return Signature("positions", f"{d.name} is wrong from position {first} on")
    return Signature(kind, f"{d.name} is wrong {where}") if kind else None


def _where(wrong: Tensor) -> tuple[str, str]:
    """(kind, words) for a mask that covers few rows, few columns or a tile; ("", ...) for all."""
    flat = wrong.flatten(1) if wrong.dim() > 1 else wrong[:, None]
    rows, columns = flat.any(1), flat.any(0)
    few_rows = int(rows.sum()) <= 0.9 * len(rows)
    few_columns = int(columns.sum()) <= 0.9 * len(columns)
    row_text = _span(rows.nonzero().flatten(), len(rows), "row")
    column_text = _span(columns.nonzero().flatten(), len(columns), "column")
    if few_rows and few_columns:
        return "tiles", f"in {row_text} and {column_text}"
    if few_rows:
        return "rows", f"in {row_text}"
    if few_columns:
        return "columns", f"in {column_text}"
    return "", "everywhere"


def _span(indices: Tensor, total: int, label: str) -> str:
    """rows 0-7 of 300, rows 3, 7, 11, ... of 300, all 300 rows."""
    values = indices.tolist()
    plural = label + ("s" if not label.endswith("columns") else "")
    if len(values) == total:
        return f"all {total} {plural}"
    if len(values) == 1:
        return f"{label} {values[0]} of {total}"
    if values[-1] - values[0] + 1 == len(values):
        return f"{plural} {values[0]}-{values[-1]} of {total}"
    steps = {b - a for a, b in pairwise(values)}
    if len(steps) == 1:
        return f"every {steps.pop()}. {label} from {values[0]} of {total}"
    shown = ", ".join(map(str, values[:4]))
    return f"{len(values)} of {total} {plural} ({shown}, ...)"
