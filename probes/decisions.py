"""Discrete decisions of a run: recorded, compared, replayed into another run; and KL split by them

Two sites decide: the gate picks experts, the indexer picks entries. A kernel whose scores move by a
rounding may pick another expert, and the logits jump although its arithmetic is fine. Replaying the
reference's picks into the kernel's run takes these jumps away:

    total      = KL(reference || route)                      the route as it is
    arithmetic = KL(reference || route, decisions replayed)  what its numbers alone do
    decisions  = total - arithmetic                          what the flipped decisions add

Each is a mean over positions, in nats. `decisions` is negative where flips happen to make up for
wrong numbers; it is 0 when nothing flipped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.tap import Observer

DECIDERS = ("gate", "index_topk")


@dataclass(frozen=True)
class Choice:
    """One call of a site that decides.

    chosen [n, k] int: the picks of each row, -1 for none. scores [n, options]: what was ranked; None
    where a table decides (hash layers). options: how many could be picked.
    """

    chosen: Tensor
    scores: Tensor | None
    options: int


def choice_of(site: Site, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> Choice:
    """The decision in what `site` returned for `inputs`, both by name; copies."""
    if site.op == "index_topk":
        score = inputs["score"]
        return Choice(outputs["index"].clone(), score.clone(), score.shape[1])
    experts, scores = outputs["experts"].clone(), outputs["scores"]
    options = scores.shape[1]
    if inputs["tid2eid"] is not None:
        return Choice(experts, None, options)
    bias = inputs["bias"]
    return Choice(experts, scores + (0.0 if bias is None else bias), options)


def replayed(site: Site, args: tuple[Any, ...], result: Any, rows: Tensor, chosen: Tensor) -> Any:
    """`result` with the picks of `rows` [n] bool replaced by `chosen`; the other rows keep their bits.

    Routing weights of replaced rows are those the op's own scores give the new picks, by the
    reference's formula: the numbers stay the route's.
    """
    if site.op == "index_topk":
        return torch.where(rows[:, None], chosen.to(result.dtype), result)
    routing, experts, scores = result
    experts = torch.where(rows[:, None], chosen.to(experts.dtype), experts)
    weights = scores[rows].gather(1, experts[rows].long())
    routing = routing.clone()
    scale = site.spec.bind(args, site.params)["scale"]
    routing[rows] = (weights / weights.sum(-1, keepdim=True) * scale).to(routing.dtype)
    return routing, experts, scores


# ------------------------------------------------------------------------------ comparing


def differing_rows(a: Tensor, b: Tensor) -> Tensor:
    """[n] bool: rows of picks [n, k] that differ as sets."""
    return (a.sort(-1).values != b.sort(-1).values).any(-1)


def members(chosen: Tensor, options: int) -> Tensor:
    """Picks [n, k] -> [n, options] bool; ids out of range are no members."""
    ids = torch.where((chosen >= 0) & (chosen < options), chosen, options).long()
    mask = torch.zeros(len(chosen), options + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, ids, True)[:, :options]


def _extreme(scores: Tensor, mask: Tensor, largest: bool) -> Tensor:
    """[n] float64: the largest (or smallest) score under `mask`, -inf (or inf) where there is none."""
    empty = -math.inf if largest else math.inf
    kept = torch.where(mask, scores.double(), empty)
    if not kept.shape[1]:
        return kept.new_full((len(kept),), empty)
    return kept.amax(1) if largest else kept.amin(1)


def spread(ours: Tensor, theirs: Tensor, scores: Tensor | None) -> Tensor:
    """[n] float64: how far apart, by `scores` [n, options], the picks are that were swapped.

    Small means a near tie. Infinite where the sets have different sizes, where a score is NaN, or
    where no scores decide.
    """
    if scores is None:
        return torch.full((len(ours),), math.inf, dtype=torch.float64, device=ours.device)
    a, b = (members(picks, scores.shape[1]) for picks in (ours, theirs))
    swapped = a ^ b
    distance = _extreme(scores, swapped, True) - _extreme(scores, swapped, False)
    balanced = (a & swapped).sum(1) == (b & swapped).sum(1)
    return torch.where(balanced, distance, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)


@dataclass
class Flips:
    """The decisions of one site in a run against the reference's.

    overlap: share of the reference's picks that were picked too, mean and lowest over all rows.
    margin: median over rows of the reference's score gap at the cut. gap: the largest advantage,
    by the reference's scores, of what it picked over what was picked instead. move: median over rows
    of the rms difference of the scores. against_scores: rows that were picked against the run's own
    scores, which no rounding explains.
    """

    site: str
    rows: int = 0
    flipped: int = 0
    overlap: float = 1.0
    lowest_overlap: float = 1.0
    margin: float | None = None
    gap: float = 0.0
    move: float | None = None
    against_scores: int = 0
    _margins: list[Tensor] = field(default_factory=list, repr=False)
    _moves: list[Tensor] = field(default_factory=list, repr=False)

    def add(self, ours: Choice, theirs: Choice, differ: Tensor) -> None:
        """Count one call: `ours` against the reference's, `differ` [n] the rows whose sets differ."""
        count, flipped = len(differ), int(differ.sum())
        a, b = (members(choice.chosen[differ], theirs.options) for choice in (ours, theirs))
        shares = (a & b).sum(1) / b.sum(1).clamp(min=1)  # [flipped]
        kept = self.overlap * self.rows + float(shares.sum()) + count - flipped
        self.rows += count
        self.flipped += flipped
        self.overlap = kept / max(self.rows, 1)
        if flipped:
            self.lowest_overlap = min(self.lowest_overlap, float(shares.min()))
            self._add_scores(ours, theirs, differ, a & ~b, b & ~a)
        if ours.scores is not None and theirs.scores is not None:
            self._moves.append(row_moves(ours.scores, theirs.scores))
            self._margins.append(cut_margin(theirs))
            self.move, self.margin = (_median(kept) for kept in (self._moves, self._margins))

    def _add_scores(
        self, ours: Choice, theirs: Choice, differ: Tensor, instead: Tensor, lost: Tensor
    ) -> None:
        """instead, lost [flipped, options] bool: picked only by this run, only by the reference."""
        if ours.scores is None or theirs.scores is None:
            self.against_scores += len(lost)  # a table has no ties
            self.gap = math.inf
            return
        own, right = ours.scores[differ], theirs.scores[differ]
        gap = _extreme(right, lost, False) - _extreme(right, instead, True)
        self.gap = max(self.gap, float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max()))
        fine = _extreme(own, instead, False) >= _extreme(own, lost, True)
        fine &= instead.sum(1) == lost.sum(1)
        self.against_scores += int((~fine).sum())

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def row_moves(ours: Tensor, theirs: Tensor) -> Tensor:
    """Rms difference of two scores [n, options] over what is finite in both, of rows that have any."""
    finite = torch.isfinite(ours) & torch.isfinite(theirs)
    counts = finite.sum(1)
    squares = torch.where(finite, ours.double() - theirs.double(), 0.0).square().sum(1)
    return (squares / counts.clamp(min=1)).sqrt()[counts > 0]


def _median(rows: list[Tensor]) -> float | None:
    values = torch.cat(rows)
    return float(values.median()) if len(values) else None


def cut_margin(choice: Choice) -> Tensor:
    """Score gap between the worst pick and the best that was left out, of rows that had both."""
    assert choice.scores is not None
    picked = members(choice.chosen, choice.options)
    worst = _extreme(choice.scores, picked, False)
    best = _extreme(choice.scores, ~picked, True)
    margin = worst - best
    return margin[torch.isfinite(margin)]


# ------------------------------------------------------------------------------ observers


def _run(inner: Observer | None, site: Site, args: tuple[Any, ...]) -> Any:
    return inner.around(site, args) if inner is not None and inner.wants(site) else site.run(args)


class Record:
    """A tap's observer that keeps the decisions of a run, call by call. `inner`, if given, sees the
    op first."""

    def __init__(self, inner: Observer | None = None) -> None:
        self.inner = inner
        self.choices: dict[str, list[Choice]] = {}

    @classmethod
    def of(cls, calls: Iterable[Captured]) -> Record:
        """The decisions among captured calls."""
        record = cls()
        for call in calls:
            record.add(call.site, call.inputs, call.outputs)
        return record

    def add(self, site: Site, inputs: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> None:
        """Keep the decision of one call; nothing happens at a site that does not decide."""
        if site.op in DECIDERS:
            self.choices.setdefault(site.path, []).append(choice_of(site, inputs, outputs))

    def wants(self, site: Site) -> bool:
        return site.op in DECIDERS or (self.inner is not None and self.inner.wants(site))

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        result = _run(self.inner, site, args)
        self.add(site, site.spec.bind(args, site.params), site.spec.name_outputs(result))
        return result


class Replay:
    """A tap's observer that counts how a run's decisions differ from `record`, and may undo it.

    A row whose set differs is replaced by the recorded picks if what was swapped lies within
    `tolerance` by the run's own scores: math.inf replays every decision, a negative one none, a small
    one settles near ties as the reference did. A mapping gives it by site. `inner`, if given, sees
    the op first, and sees the run's own decision.
    """

    def __init__(
        self,
        record: Record,
        tolerance: float | Mapping[str, float] = math.inf,
        inner: Observer | None = None,
    ) -> None:
        self.record = record
        self.tolerance = tolerance
        self.inner = inner
        self.flips: dict[str, Flips] = {}
        self._calls: Counter[str] = Counter()

    def follow(self, record: Record) -> None:
        """From now on compare with `record`, from its first call on; what was counted stays."""
        self.record = record
        self._calls.clear()

    def wants(self, site: Site) -> bool:
        return site.op in DECIDERS or (self.inner is not None and self.inner.wants(site))

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        result = _run(self.inner, site, args)
        if site.op not in DECIDERS:
            return result
        inputs, outputs = site.spec.bind(args, site.params), site.spec.name_outputs(result)
        ours = choice_of(site, inputs, outputs)
        theirs = self.record.choices[site.path][self._calls[site.path]]
        self._calls[site.path] += 1
        differ = differing_rows(ours.chosen, theirs.chosen)
        self.flips.setdefault(site.path, Flips(site.path)).add(ours, theirs, differ)
        rows = differ & self._undone(site, ours, theirs)
        return replayed(site, args, result, rows, theirs.chosen) if bool(rows.any()) else result

    def _undone(self, site: Site, ours: Choice, theirs: Choice) -> Tensor:
        tolerance = self.tolerance
        if isinstance(tolerance, Mapping):
            tolerance = tolerance.get(site.path, -1.0)
        return spread(ours.chosen, theirs.chosen, ours.scores) <= tolerance


# ------------------------------------------------------------------------------ KL


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of every position in nats: [n, v] twice -> float64 [n] >= 0.

    Infinite where the logits, of either, hold a NaN: that never passes.
    """
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).nan_to_num(nan=math.inf, posinf=math.inf).clamp(min=0.0)


@dataclass(frozen=True)
class KLSplit:
    """Means over `positions` in nats (see the head of the file), and the position of the largest total.

    top1_changed counts the positions whose most likely token differs; `top1_arithmetic` those where
    it still does with the decisions replayed.
    """

    total: float
    arithmetic: float
    decisions: float
    positions: int
    worst_position: int
    worst: float
    top1_changed: int
    top1_arithmetic: int

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "unit": "nats"}


class KLMeter:
    """Adds up the divergences of forward calls; of the logits nothing is kept."""

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._arithmetic: list[Tensor] = []
        self._changed = self._changed_arithmetic = 0

    def add(self, reference: Tensor, route: Tensor, with_replay: Tensor) -> None:
        """Logits [n, v] of one call: of the reference, the route, and it with decisions replayed."""
        self._totals.append(kl_divergence(reference, route))
        self._arithmetic.append(kl_divergence(reference, with_replay))
        best = reference.argmax(-1)
        self._changed += int((route.argmax(-1) != best).sum())
        self._changed_arithmetic += int((with_replay.argmax(-1) != best).sum())

    def split(self) -> KLSplit:
        """The split over every position so far, at least one."""
        totals = torch.cat(self._totals)
        total, arithmetic = float(totals.mean()), float(torch.cat(self._arithmetic).mean())
        both_infinite = math.isinf(total) and math.isinf(arithmetic)  # the numbers alone explain it
        decisions = 0.0 if both_infinite else total - arithmetic
        at = int(totals.argmax())
        return KLSplit(
            total,
            arithmetic,
            decisions,
            len(totals),
            at,
            float(totals[at]),
            self._changed,
            self._changed_arithmetic,
        )
