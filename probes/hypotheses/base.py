"""Hypotheses, how they are tried, and the rule which mechanism counts as which kind

| mechanism | kind |
|---|---|
| a scale, eps, sink, weight of a sum missing, applied twice, squared, taken from elsewhere | constant_factor |
| a square argument transposed, N and K exchanged, the wrong axis normalised | transposed |
| arguments exchanged; rows, heads, experts, streams in another order | permuted |
| halves of a row exchanged, halves paired instead of neighbours | halves_swapped |
| position, row, slot, index, window or entry off by a few | shifted |
| positions or frequencies that are not the layer's: right at position 0, worse with distance | positions |
| padding counted, hidden entries scored | padding |
| a clamp missing, added, or on the wrong side | saturated |
| an argument or negative values taken as zero | flushed |
| low and high nibble of a byte exchanged | nibbles |
| block scales in another order, transposed, swizzled, decoded as another format, left out | scale_order |
| a part of the sum over K, or of the list of keys, is left out | tiles |
| all compressed entries left out: right until the first one is visible | positions |
| an in-place argument keeps what it held, earlier state is used | stale |
| other experts or entries than the scores say | decision_flip |
| another formula on the same inputs | unexplained (the sentence names it) |
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.limits import Limits, judged
from dsv4_bench.probes.metrics import rows_of
from dsv4_bench.probes.signatures import words_for_rows
from dsv4_bench.probes.verdicts import in_one_order

Values = dict[str, Tensor]
Predict = Callable[[], Values]
_LEFT_OVER = 0.02  # share of the error that an explanation may leave
_ORDERS = ("shifted", "permuted")
_FEW = 0.02  # share of the rows that is hardly any
_SCREENED, _SCREENED_EXPERTS = (
    32,
    8,
)  # rows to try on first; fewer where rows have their own weights
_NARROW = 8  # columns up to which each is scaled alone
_SECONDS = 60.0  # then no explanation is looked for any more: real experts take long to misread


@dataclass(frozen=True)
class Hypothesis:
    """A way to be wrong. `changed` replaces arguments of the oracle; or `predict` gives the outputs.

    words complete "<what is seen>: <words>". `edge` rows at either end may hold anything (what a
    shift brings in from outside).
    """

    kind: str
    words: str
    changed: dict[str, Any] | None = None
    predict: Predict | None = None
    edge: int = 0

    def outputs(self, call: Captured) -> Values:
        if self.predict is not None:
            return self.predict()
        assert self.changed is not None
        return call.oracle(**self.changed)


@dataclass(frozen=True)
class Explanation:
    """A hypothesis that explains the wrong values: all of them, or (`where`) those of some rows.

    `few`: of hardly any rows. Then the place says more than what was put there.
    """

    hypothesis: Hypothesis
    where: str = ""
    few: bool = False

    @property
    def kind(self) -> str:
        return "rows" if self.few and self.hypothesis.kind in _ORDERS else self.hypothesis.kind

    @property
    def words(self) -> str:
        return f"{self.hypothesis.words} ({self.where})" if self.where else self.hypothesis.words


Candidates = Callable[[Captured, Config | None], Iterator[Hypothesis]]
CANDIDATES: dict[str, list[Candidates]] = {}


def candidates(*ops: str) -> Callable[[Candidates], Candidates]:
    """Register the decorated generator of hypotheses for `ops`; the most specific come first."""

    def register(function: Candidates) -> Candidates:
        for op in ops:
            CANDIDATES.setdefault(op, []).append(function)
        return function

    return register


def hypotheses_for(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    """Every hypothesis about a call: its op's own, then those about any argument."""
    from dsv4_bench.probes.hypotheses.arguments import changed_arguments

    for source in CANDIDATES.get(call.site.op, []):
        yield from source(call, config)
    yield from changed_arguments(call)


# ------------------------------------------------------------------------------ trying them


def explain(
    call: Captured,
    ours: Values,
    limits: Limits,
    config: Config | None = None,
    groups: dict[str, Tensor] | None = None,
    kind: str | None = None,
    only: Explanation | None = None,
) -> Explanation | None:
    """The first hypothesis that explains every wrong value of `ours`, or else one that explains every
    wrong row or column; None if there is none.

    It stops looking after a minute. With `kind` only hypotheses of that kind are tried, and only a whole explanation counts. With
    `only` nothing but that hypothesis is tried, on this call.
    """
    if only is not None:
        return _confirmed(call, ours, limits, config, only.hypothesis, groups or {})
    small, our_small = _screening(call, ours, limits)
    best: Explanation | None = None
    started = time.monotonic()
    for hypothesis in hypotheses_for(small, config):
        if time.monotonic() - started > _SECONDS:
            return best
        if kind is not None and hypothesis.kind != kind:
            continue
        found = try_one(small, our_small, limits, hypothesis, groups or {})
        if found is None or (found.where and best is not None):
            continue
        if small is not call:
            found = _confirmed(call, ours, limits, config, hypothesis, groups or {})
            if found is None or (found.where and best is not None):
                continue
        if not found.where:
            return found
        best = found
    if kind is not None:
        return None
    return best or fitted_factor(small, our_small, limits)


def _confirmed(
    call: Captured,
    ours: Values,
    limits: Limits,
    config: Config | None,
    hypothesis: Hypothesis,
    groups: dict[str, Tensor],
) -> Explanation | None:
    """The same hypothesis about the whole call, if it still explains it."""
    for whole in hypotheses_for(call, config):
        if (whole.kind, whole.words) == (hypothesis.kind, hypothesis.words):
            return try_one(call, ours, limits, whole, groups)
    return None


def try_one(
    call: Captured,
    ours: Values,
    limits: Limits,
    hypothesis: Hypothesis,
    groups: dict[str, Tensor],
) -> Explanation | None:
    """Whether one hypothesis explains `ours`, and if only partly, where."""
    try:
        predicted = hypothesis.outputs(call)
    except Exception:  # the changed arguments do not fit this op: then it is not what happened
        return None
    spec = call.site.spec
    names = [n for n, t in call.truth.items() if n in spec.discrete or judged(call, n, t)]
    sets = [in_one_order(spec, values) for values in (ours, call.truth, predicted)]
    for axis in (0, -1, 1):
        where, whole, few = "", True, False
        explained = False
        for name in names:
            a, truth, guess = (values.get(name) for values in sets)
            if a is None or truth is None or guess is None or guess.shape != a.shape:
                return None
            if axis != 0 and (a.dim() < 2 or (axis == 1 and a.dim() < 3) or name in spec.discrete):
                return None
            limit = limits.of(call.site.op, name)[1] if name not in spec.discrete else 0.0
            found = _fit(a, truth, guess, limit, axis, hypothesis.edge)
            if found is None:
                break
            wrong, fits = found
            explained |= bool(wrong.any())
            whole &= fits
            if not fits and not where:
                few = axis == 0 and 0 < int(wrong.sum()) <= _FEW * len(wrong)
                where = _words(wrong, axis, groups) if bool(wrong.any()) else f"but not in {name}"
        else:
            if explained:
                return Explanation(hypothesis, "" if whole else where, few)
            return None
    return None


def _words(wrong: Tensor, axis: int, groups: dict[str, Tensor]) -> str:
    if axis == 0:
        return "only in " + words_for_rows(wrong, groups)
    return "only in " + words_for_rows(wrong, {}).replace("row", "column" if axis == -1 else "head")


def _fit(
    ours: Tensor, truth: Tensor, guess: Tensor, limit: float, axis: int, edge: int
) -> tuple[Tensor, bool] | None:
    """(wrong slices, whether `guess` is right for all of them), None if it leaves a wrong one."""
    before = _slice_errors(ours, truth, truth, axis)
    after = _slice_errors(ours, guess, truth, axis)
    wrong = before > limit
    if not bool(wrong.any()) and float(before.max()) > 0.5 * limit > 0:
        wrong = before > 0.2 * float(before.max())  # over the limit of the whole tensor only
    allowed = (_LEFT_OVER * before.nan_to_num(posinf=0.0)).clamp(min=limit)
    fits = (after <= allowed) & (~wrong | (after <= 0.3 * before))
    if bool(wrong.any()) and not bool((wrong & fits).any()):
        return None  # nothing wrong is explained but what an edge may hold anyway
    if edge and axis == 0 and len(fits) > 2 * edge:
        fits[:edge] = True
        fits[-edge:] = True
    if bool((wrong & ~fits).any()):
        return None
    return wrong, bool(fits.all())


def _slice_errors(ours: Tensor, other: Tensor, truth: Tensor, axis: int) -> Tensor:
    """|ours - other| of each slice along `axis`, relative to the larger of ours and the truth.

    Infinite where non-finite values differ. Integers: 1 where a slice differs.
    """
    a, b, right = (rows_of(t.movedim(axis, 0)) for t in (ours, other, truth))
    if not b.is_floating_point():
        return (a != b).any(1).double()
    a, b, right = a.double(), b.double(), right.double()
    same = (a == b) | (a.isnan() & b.isnan())
    finite = torch.isfinite(a) & torch.isfinite(b)
    difference = torch.where(finite, a - b, 0.0).norm(dim=1)
    norms = torch.maximum(*(torch.where(torch.isfinite(t), t, 0.0).norm(dim=1) for t in (a, right)))
    typical = float(norms.square().mean().sqrt()) if len(norms) else 0.0
    errors = difference / norms.clamp(min=max(1e-2 * typical, 1e-30))
    return torch.where((finite | same).all(1), errors, torch.inf)


# ------------------------------------------------------------------------------ screening


# Arguments with a row a token, of the ops whose rows are independent.
ROWWISE: dict[str, tuple[str, ...]] = {
    "embed": ("tokens",),
    "hc_pre": ("x",),
    "hc_post": ("y", "x", "post", "comb"),
    "hc_head": ("x",),
    "rms_norm": ("x",),
    "linear": ("x",),
    "grouped_linear": ("o",),
    "rope": ("x", "positions"),
    "attention": ("q", "window_index", "entry_index"),
    "index_topk": ("score", "visible"),
    "gate": ("x", "tokens"),
    "experts": ("x", "routing", "experts"),
    "shared_expert": ("x",),
    "moe_sum": ("routed", "shared"),
}


def _screening(call: Captured, ours: Values, limits: Limits) -> tuple[Captured, Values]:
    """The call cut to the stretch of rows with most wrong ones in it, if it is long."""
    op = call.site.op
    length = len(next(iter(call.truth.values())))
    count = _SCREENED_EXPERTS if op == "experts" else _SCREENED
    if op not in ROWWISE or length <= 1.5 * count:
        return call, ours
    wrong = torch.zeros(length)
    for name, truth in call.truth.items():
        if name in ours and len(truth) == length:
            errors = _slice_errors(ours[name], truth, truth, 0)
            bound = limits.of(op, name)[1] if judged(call, name, truth) else 0.0
            wrong += (errors > bound).float().cpu()
    totals = wrong.cumsum(0)
    counts = totals[count - 1 :] - torch.cat((torch.zeros(1), totals[:-count]))
    first = int(counts.argmax())
    part = slice(first, first + count)
    return cut(call, part), {n: v[part] if len(v) == length else v for n, v in ours.items()}


def cut(call: Captured, part: slice) -> Captured:
    """The rows `part` of a call whose rows are independent."""
    names = call.site.spec.parameters[: len(call.args)]
    rowwise = ROWWISE[call.site.op]
    args = tuple(
        a[part] if n in rowwise and isinstance(a, Tensor) else a
        for n, a in zip(names, call.args, strict=True)
    )
    outputs = {n: v[part] for n, v in call.outputs.items()}
    return replace(call, args=args, outputs=outputs)


# ------------------------------------------------------------------------------ factors


def fitted_factor(call: Captured, ours: Values, limits: Limits) -> Explanation | None:
    """An argument that enters with some factor: the factor is searched for."""
    for name, words, scaled in _scalable(call):

        def loss(factor: float, name: str = name, scaled: Any = scaled) -> float:
            return _total_error(call, ours, {name: scaled(factor)}, limits)

        coarse = [-1.0, *(2.0 ** (k / 2) for k in range(-8, 9))]
        factor = _refined(loss, min(coarse, key=loss))
        if loss(factor) > 0.5 * loss(1.0):
            continue
        kind = "saturated" if name == "limit" else "constant_factor"
        text = f"{words} enters with {factor:.4g} times its value"
        found = try_one(call, ours, limits, Hypothesis(kind, text, {name: scaled(factor)}), {})
        if found is not None and not found.where:
            return found
    return None


def _scalable(call: Captured) -> Iterator[tuple[str, str, Callable[[float], Any]]]:
    """(argument, words, its value times a factor): numbers, tensors, columns of narrow tensors."""
    inputs = call.inputs
    for name, value in inputs.items():
        if isinstance(value, float) and value != 0.0:
            yield name, name, partial(operator.mul, value)
    tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for name, value in tensors.items():
        yield name, name, partial(operator.mul, value)
    for name, value in tensors.items():
        if value.dim() == 2 and value.shape[1] <= _NARROW and name not in call.site.params:
            for column in range(value.shape[1]):
                one = torch.arange(value.shape[1], device=value.device) == column
                words = f"column {column} of {name}"
                yield name, words, partial(_scaled_where, value, one)


def _scaled_where(value: Tensor, where: Tensor, factor: float) -> Tensor:
    return torch.where(where, value * factor, value)


def _total_error(call: Captured, ours: Values, changed: dict[str, Any], limits: Limits) -> float:
    try:
        guess = call.oracle(**changed)
    except Exception:  # the changed argument does not fit this op
        return float("inf")
    total = 0.0
    for name, truth in call.truth.items():
        if judged(call, name, truth):
            errors = _slice_errors(ours[name], guess[name], truth, 0)
            total += float(errors.square().mean().sqrt().nan_to_num(nan=1e9, posinf=1e9))
    return total


def _refined(loss: Callable[[float], float], start: float) -> float:
    """The best factor between the neighbours of `start`, by golden section."""
    low, high, ratio = start * 2**-0.5, start * 2**0.5, 0.618034
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    for _ in range(24):
        if loss_a < loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = loss(b)
    return (low + high) / 2
