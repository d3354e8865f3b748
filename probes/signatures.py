"""What kind of wrong: signatures computed from a wrong output and the right one

`classify` looks at how the two differ (zeros, a constant factor, a clamp, another order) and where
(rows, columns, heads, tiles), and takes the first description that explains the difference down to
the limit. It knows nothing of any implementation. `sharp` descriptions explain every value; `loose`
ones say where it is wrong, or by which factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.probes.metrics import masks_differ, relative_error, rows_of

KINDS = (
    "constant_factor", "transposed", "permuted", "halves_swapped", "shifted", "rows", "columns",
    "tiles", "positions", "nan", "padding", "saturated", "flushed", "nibbles", "scale_order",
    "stale", "nondeterministic", "decision_flip", "unexplained",
)  # fmt: skip
_EXPLAINS = 0.02  # share of the error that may be left over by a good description
_CLAMPED = 3  # values at the bound that make a clamp


@dataclass(frozen=True)
class Signature:
    """`kind` is one of KINDS; `detail` completes the sentence "<site>: <detail>".

    start: of kind `positions`, the first wrong position, where that was read off the rows.
    """

    kind: str
    detail: str
    start: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "detail": self.detail}


@dataclass(frozen=True)
class Difference:
    """A wrong output `ours` beside `truth` (both float64 [n, ...]), with the limit it broke.

    positions: absolute position of each row, if rows are tokens. groups: [n] bool masks of rows by
    what they have in common, in words ("rows with fewer than 128 keys"), for the sentence.
    """

    name: str
    ours: Tensor
    truth: Tensor
    limit: float
    positions: Tensor | None = None
    groups: dict[str, Tensor] = field(default_factory=dict)

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
    return sharp(difference) or loose(difference)


def sharp(d: Difference) -> Signature | None:
    """A description that explains every value of the output, if there is one."""
    if bool(masks_differ(d.ours, d.truth).any()):
        return _nonfinite(d)
    for test in (_zero, _factor, _shuffles, _saturated, _rounded):
        found = test(d)
        if found is not None:
            return found
    return None


def loose(d: Difference) -> Signature:
    """Factors by row, head or column, another order, one row for all, wrong places, or `unexplained`."""
    for test in (_factors, _permuted, _repeated, _support):
        found = test(d)
        if found is not None:
            return found
    return Signature("unexplained", f"{d.name} differs by {d.error:.2g} everywhere")


# ------------------------------------------------------------------------------ values


def _nonfinite(d: Difference) -> Signature:
    bad = masks_differ(d.ours, d.truth)
    first = [int(i) for i in bad.nonzero()[0]]
    value, right = float(d.ours[tuple(first)]), float(d.truth[tuple(first)])
    where = words_for_rows(rows_of(bad).any(1), d.groups)
    text = f"{d.name}{first} is {value:.4g}, should be {right:.4g}; {where}"
    finite = bool(torch.isfinite(d.ours[bad]).all())
    # Finite values where -inf is due: something hidden became visible.
    return Signature("padding" if finite else "nan", text)


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
    signs = d.truth[zeroed]
    if bool((signs < 0).all()) and float(rest.numel()) and bool((d.truth[~zeroed] >= 0).all()):
        return Signature("flushed", f"{d.name} is zero where it should be negative ({share:.1%})")
    kind, where = _where(zeroed, d.groups)
    return Signature(kind or "flushed", f"{d.name} is zero {where}")


def _factor(d: Difference) -> Signature | None:
    """ours = c * truth for the whole tensor."""
    whole = float((d.ours * d.truth).sum() / d.truth.square().sum().clamp(min=1e-300))
    if abs(whole - 1) > d.limit and d.explained_by(whole * d.truth):
        return Signature("constant_factor", f"{d.name} = {whole:.5g} x reference")
    return None


def _factors(d: Difference) -> Signature | None:
    """ours = c * truth per row, head, half, block of columns or column."""
    for label, view in _groupings(d.truth):
        ours, truth = view(d.ours), view(d.truth)  # [groups, members]
        factors = (ours * truth).sum(1) / truth.square().sum(1).clamp(min=1e-300)
        # A factor a group must explain many more values than there are factors, or it explains nothing.
        free = truth.numel() - len(factors)
        if free < max(len(factors) // 2, 8) or not _same(ours, factors[:, None] * truth, d):
            continue
        wrong = (factors - 1).abs() > max(10 * d.limit, 1e-6)
        if not bool(wrong.any()):
            continue
        values = factors[wrong]
        text = f"{float(values.min()):.5g}"
        if float(values.max() - values.min()) > 1e-3 * float(values.abs().max()):
            text += f" to {float(values.max()):.5g}"
        rows = wrong.view(len(d.truth), -1).any(1) if label.startswith("row") else None
        if rows is None:
            where = _span(wrong.nonzero().flatten(), len(wrong), label)
        else:
            where = words_for_rows(rows, d.groups)
        kind = "columns" if label == "column" and not bool(wrong.all()) else "constant_factor"
        return Signature(kind, f"{d.name} = {text} x reference for {where}")
    return None


def _same(ours: Tensor, candidate: Tensor, d: Difference) -> bool:
    error = float((ours - candidate).norm() / candidate.norm().clamp(min=1e-300))
    return error <= d.left_over


def _groupings(truth: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Ways to cut a tensor into groups that may each have their own factor."""
    if truth.dim() >= 2:
        yield "row", lambda t: t.flatten(1)
    if truth.dim() == 3:
        yield "head", lambda t: t.transpose(0, 1).flatten(1)
        yield "row and head", lambda t: t.flatten(0, 1)
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
    """ours is truth clamped."""
    top, bottom = float(d.ours.max()), float(d.ours.min())
    for low, high in ((bottom, top), (-torch.inf, top), (bottom, torch.inf)):
        clamped = d.truth.clamp(low, high)
        if int((clamped != d.truth).sum()) >= _CLAMPED and d.explained_by(clamped):
            return Signature("saturated", f"{d.name} is clamped to [{low:.4g}, {high:.4g}]")
    return None


def _rounded(d: Difference) -> Signature | None:
    """ours is truth in a format with fewer bits."""
    truth = d.truth.float()
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        rounded = truth.to(dtype).double()
        finite = bool(torch.isfinite(rounded).all())
        exact = torch.equal(d.ours.float().to(dtype).double(), d.ours)
        if finite and exact and d.explained_by(rounded):
            name = str(dtype).removeprefix("torch.")
            return Signature("unexplained", f"{d.name} is rounded to {name}")
    return None


# ------------------------------------------------------------------------------ order


def _shuffles(d: Difference) -> Signature | None:
    for kind, detail, candidate, free in _rearrangements(d.truth):
        if candidate.shape != d.ours.shape:
            continue
        # Rows at the edge that something shifted in from outside may hold anything.
        candidate = torch.where(free, d.ours, candidate) if free is not None else candidate
        if d.explained_by(candidate):
            return Signature(kind, f"{d.name} {detail}")
    return None


def _rearrangements(truth: Tensor) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
    """Transforms of the truth that a layout mistake would make, with the places they leave open."""
    if truth.dim() >= 2 and truth.shape[-1] == truth.shape[-2]:
        yield "transposed", "has its last two axes exchanged", truth.transpose(-1, -2), None
    width = truth.shape[-1]
    if width % 2 == 0 and width > 2 and truth.dim() >= 2:
        halves = torch.cat((truth[..., width // 2 :], truth[..., : width // 2]), -1)
        yield "halves_swapped", "has its two halves exchanged", halves, None
        pairs = truth.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        yield "nibbles", "has neighbouring columns exchanged (low and high nibble)", pairs, None
        by_halves = truth.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        yield "permuted", "interleaves its two halves", by_halves, None
        by_pairs = truth.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        yield "permuted", "separates even and odd columns", by_pairs, None
    yield from _shifts(truth)
    if truth.dim() == 3:
        exchanged = truth.transpose(0, 1).reshape(truth.shape)
        yield "transposed", "mixes up rows and heads", exchanged, None
    if truth.dim() == 2 and truth.shape[0] > 1:
        yield "transposed", "is written column by column", truth.T.reshape(truth.shape), None


def _shifts(truth: Tensor) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
    axes = [(0, "row"), (-1, "column")] + ([(1, "head")] if truth.dim() == 3 else [])
    for axis, label in axes:
        length = truth.shape[axis]
        for shift in (1, -1, 2, -2, 4, -4):
            if length <= 2 * abs(shift):
                continue
            index = torch.arange(length, device=truth.device)
            edge = index < shift if shift > 0 else index >= length + shift
            shape = [1] * truth.dim()
            shape[axis] = length
            words = f"is shifted by {shift} {label}{'s' if abs(shift) > 1 else ''}"
            yield "shifted", words, truth.roll(shift, axis), edge.view(shape)


def _permuted(d: Difference) -> Signature | None:
    """Rows or columns in another order: match each to its nearest."""
    axes = [(-1, "column"), (0, "row")] + ([(1, "head")] if d.truth.dim() == 3 else [])
    for axis, label in axes:
        ours, truth = (t.movedim(axis, 0).flatten(1) for t in (d.ours, d.truth))
        if not 2 <= len(truth) <= 4096 or truth.shape[1] < 2:
            continue
        nearest = torch.cdist(ours, truth).argmin(1)
        if len(set(nearest.tolist())) != len(truth):
            continue
        places = torch.arange(len(nearest), device=nearest.device)
        moved = int((nearest != places).sum())
        if moved and _same(ours, truth[nearest], d):
            shifts = ((places - nearest) % len(nearest)).unique()
            if len(shifts) == 1 and len(nearest) > 4:  # two exchanged are no shift
                by = int(shifts) if int(shifts) <= len(nearest) // 2 else int(shifts) - len(nearest)
                plural = "s" if abs(by) > 1 else ""
                return Signature("shifted", f"{d.name} is shifted by {by} {label}{plural}")
            return Signature(
                "permuted", f"{d.name} has {moved} of {len(truth)} {label}s in another order"
            )
    return None


def _repeated(d: Difference) -> Signature | None:
    """Every row is the same one, where the right rows differ: a row stride that is taken for zero."""
    if d.truth.dim() < 2 or len(d.truth) < 3:
        return None
    ours, truth = d.ours.flatten(1), d.truth.flatten(1)
    if not bool((ours == ours[:1]).all()):
        return None
    if bool((truth == truth[:1]).all()):
        return None
    source = int((truth - ours[:1]).norm(dim=1).argmin())
    same = _same(ours[:1], truth[source : source + 1], d)
    words = f"reference's row {source}" if same else "same one, which is none of the reference's"
    return Signature("rows", f"every row of {d.name} is the {words}")


# ------------------------------------------------------------------------------ places


def wrong_places(d: Difference) -> Tensor:
    """Mask of the places that are wrong, by more than the rounding around them."""
    scale = float(d.truth.square().mean().sqrt())
    return (d.ours - d.truth).abs() > max(0.05 * d.error, 4 * d.limit) * scale


def _support(d: Difference) -> Signature | None:
    """Only some rows, columns or a tile are wrong."""
    wrong = wrong_places(d)
    if not bool(wrong.any()):  # off by little more than the limit
        return None
    kind, where = _where(wrong, d.groups)
    if d.positions is not None and kind == "rows":
        rows = rows_of(wrong).any(1)
        first = int(d.positions[rows].min())
        right = d.positions[~rows]
        if len(right) and int(right.max()) < first:
            words = f"{d.name} is wrong {where} (from position {first} on)"
            return Signature("positions", words, first)
    return Signature(kind, f"{d.name} is wrong {where}") if kind else None


def _where(wrong: Tensor, groups: dict[str, Tensor]) -> tuple[str, str]:
    """(kind, words) for a mask that covers few rows, few columns or a tile; ("", ...) for all."""
    flat = rows_of(wrong)
    rows, columns = flat.any(1), flat.any(0)
    few_rows = int(rows.sum()) <= 0.9 * len(rows)
    few_columns = int(columns.sum()) <= 0.9 * len(columns)
    column_text = _span(columns.nonzero().flatten(), len(columns), "column")
    row_text = words_for_rows(rows, groups)
    if few_rows and few_columns:
        return "tiles", f"in {row_text} and {column_text}"
    if few_rows:
        return "rows", f"in {row_text}"
    if few_columns:
        return "columns", f"in {column_text}"
    return "", "everywhere"


def words_for_rows(rows: Tensor, groups: dict[str, Tensor]) -> str:
    """The rows [n] bool in words: by what they have in common, if a group is exactly they."""
    for words, group in groups.items():
        if not bool(rows.all()) and group.shape == rows.shape and torch.equal(group, rows):
            return words
    return _span(rows.nonzero().flatten(), len(rows), "row")


def _span(indices: Tensor, total: int, label: str) -> str:
    """rows 0-7 of 300, rows 3, 7, 11, ... of 300, all 300 rows."""
    values = indices.tolist()
    if not values:
        return f"no {label}"
    plural = label if label.endswith("columns") else label + "s"
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
