"""The indexer's cut: are the kept entries the best ones, by how much, and what mass do they hold"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.kv_entry import unpack
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_most
from dsv4_bench.probes.sampling import on_device, sample_rows

_QUERIES = 8  # as many as are computed again
_ROUNDOFF = 2.0**-24
# Rounding of a float32 sum grows with the root of its length; this many standard deviations.
_SPREAD = 8.0


@dataclass
class _Scored:
    """The scoring that a layer's top-k and attention go back to."""

    layer: int | None
    forward: int
    inputs: dict[str, Any]

    @property
    def step(self) -> Step:
        step: Step = self.inputs["step"]
        return step


@probe
class IndexProbe(Probe):
    """Queries that see more entries than they may keep: what the cut at k costs.

    The scores are computed again in float64 on the op's inputs. `score_recall` is the share of the
    exact k best that were kept. `margin` is (k-th - (k+1)-th exact score) / noise, the smallest of
    all queries: below 1 rounding decides; `undecided` is the share of such queries. `wrong_entries`
    are kept ones whose exact score is below the k-th by more than the noise, and places lost to
    duplicates. noise = 8 sqrt(ih + id) 2^-24 scale sum_h |w_h| |q_h| max_j |k_j|, in float32.

    `mass_recall` is the attention mass that the kept entries have of that of all visible ones, mean
    over queries and heads; `mass_recall_min` the lowest.
    """

    name = "index"
    help = "indexer: recall of scores and attention mass, margin at the cut, wrong entries"
    reads = (
        "score_recall", "margin", "undecided", "wrong_entries", "mass_recall", "mass_recall_min",
    )  # fmt: skip

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._scored: _Scored | None = None  # of one layer: its tensors are large

    def wants(self, site: Site) -> bool:
        return site.op in ("index_score", "index_topk", "attention")

    def observe(self, call: Call) -> Iterable[Reading]:
        layer = call.site.layer
        if call.site.op == "index_score":
            self._scored = _Scored(layer, call.forward, call.inputs)
            return ()
        scored = self._scored
        if scored is None or (scored.layer, scored.forward) != (layer, call.forward):
            return ()
        cut = call.site.op == "index_topk"
        return self._cut(call, scored) if cut else self._mass(call, scored)

    def _cut(self, call: Call, scored: _Scored) -> Iterable[Reading]:
        index = call.outputs["index"]
        k, total = index.shape[1], call.inputs["score"].shape[1]
        rows, note = _rows_with_a_cut(scored, k)
        if not rows:
            return
        exact, noise = exact_scores(scored.inputs, rows, total)  # [s, T], [s]
        best = exact.topk(k + 1)
        last, next_ = best.values[:, k - 1], best.values[:, k]
        kept = _mask(index[on_device(rows, index.device)], total)
        recall = _mask(best.indices[:, :k], total).logical_and(kept).sum(-1) / k
        margin = (last - next_) / noise
        worse = (kept & (exact < (last - noise)[:, None])).sum()
        lost = (k - kept.sum(-1)).sum()
        name = self.name
        yield call.reading(name, "score_recall", recall.mean(), "share", sampled=note)
        yield call.reading(name, "margin", margin.min(), "x noise", sampled=note)
        undecided = (margin < 1).double().mean()
        yield call.reading(name, "undecided", undecided, "share", sampled=note)
        yield call.reading(
            name, "wrong_entries", worse + lost, "entries", 0, at_most(0), sampled=note
        )

    def _mass(self, call: Call, scored: _Scored) -> Iterable[Reading]:
        index, entries = call.inputs["entry_index"], call.inputs["entries"]
        rows, note = _rows_with_a_cut(scored, index.shape[1])
        if not rows:
            return
        step, ratio = scored.step, scored.inputs["ratio"]
        capacity = len(entries) // len(step.starts)
        recall = []
        for row, (sequence, position) in zip(rows, _places(step, rows), strict=True):
            first = sequence * capacity
            visible = entries[first : first + (position + 1) // ratio]
            packed = visible.dtype == torch.uint8
            visible = unpack(visible, call.inputs["q"].shape[2]) if packed else visible.float()
            logits = call.inputs["q"][row].float() @ visible.T * call.inputs["scale"]  # [h, v]
            local = index[row].long() - first
            kept = logits.index_select(1, local.clamp(min=0))
            kept = torch.where(local >= 0, kept, -torch.inf)
            recall.append(torch.exp(kept.logsumexp(-1) - logits.logsumexp(-1)))
        shares = torch.stack(recall)  # [s, h]
        yield call.reading(self.name, "mass_recall", shares.mean(), "share", sampled=note)
        yield call.reading(self.name, "mass_recall_min", shares.min(), "share", sampled=note)


def _places(step: Step, rows: Iterable[int]) -> list[tuple[int, int]]:
    """Sequence and position of tokens, from what the host knows."""
    places = [
        (b, start + i)
        for b, (start, length) in enumerate(zip(step.starts, step.lengths, strict=True))
        for i in range(length)
    ]
    return [places[row] for row in rows]


def _rows_with_a_cut(scored: _Scored, k: int) -> tuple[list[int], str]:
    """Tokens that see more than k entries, at most `_QUERIES` of them, and words about the sample."""
    step, ratio = scored.step, scored.inputs["ratio"]
    places = _places(step, range(len(step.tokens)))
    rows = [row for row, (_, position) in enumerate(places) if (position + 1) // ratio > k]
    chosen, note = sample_rows(torch.tensor(rows, dtype=torch.long), _QUERIES)
    return chosen.tolist(), note


def _mask(index: Tensor, total: int) -> Tensor:
    """Index sets [s, k], -1 for none, as a mask [s, T]."""
    found = torch.zeros(len(index), total + 1, dtype=torch.bool, device=index.device)
    places = torch.where((index >= 0) & (index < total), index, total).long()
    return found.scatter_(1, places, True)[:, :total]


def exact_scores(inputs: dict[str, Any], rows: list[int], total: int) -> tuple[Tensor, Tensor]:
    """Scores [s, T] float64 of token rows [s], -inf where not visible, and float32's noise [s]."""
    step, ratio, scale = inputs["step"], inputs["ratio"], inputs["scale"]
    index = on_device(rows, inputs["q"].device)
    q, weights = inputs["q"][index].double(), inputs["weights"][index].double()
    exact = q.new_full((len(rows), total), -torch.inf)
    largest = []
    for i, (sequence, position) in enumerate(_places(step, rows)):
        keys = inputs["keys"][sequence, : (position + 1) // ratio].double()  # [visible, id]
        dots = torch.relu(q[i] @ keys.T)  # [ih, visible]
        exact[i, : len(keys)] = scale * (weights[i] @ dots)
        largest.append(keys.norm(dim=-1).max())
    heads, width = q.shape[1:]
    reach = scale * (weights.abs() * q.norm(dim=-1)).sum(-1) * torch.stack(largest)
    return exact, _SPREAD * (heads + width) ** 0.5 * _ROUNDOFF * reach
