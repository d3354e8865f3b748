"""Compressor, indexer scores and top-k: overlap, position bias, causality, order"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses.base import Hypothesis, Values, candidates

# ------------------------------------------------------------------------------ compressor


@candidates("compressor")
def compressor_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    ape, kv, score = a["ape"], a["kv"], a["score"]
    ratio, width = ape.shape
    overlap = a["kv_state"].shape[1] == 2 * ratio
    yield Hypothesis("constant_factor", "the position bias (ape) is left out", {"ape": ape * 0})
    yield Hypothesis("constant_factor", "the position bias (ape) is added twice", {"ape": ape * 2})
    added = {"kv": kv + ape[a["step"].positions % ratio], "ape": ape * 0}
    yield Hypothesis("unexplained", "the position bias (ape) is added to kv, not score", added)
    for shift in (1, -1):
        words = f"the position bias (ape) is shifted by {shift} row"
        yield Hypothesis("shifted", words, {"ape": ape.roll(shift, 0)})
    yield Hypothesis("permuted", "the position bias (ape) is read in reverse", {"ape": ape.flip(0)})
    if overlap:
        half = width // 2
        swapped = {
            "kv": kv.roll(half, 1),
            "score": score.roll(half, 1),
            "ape": ape.roll(half, 1),
            "kv_state": a["kv_state"].roll(half, 2),
            "score_state": a["score_state"].roll(half, 2),
        }
        fresh = {name: swapped[name] for name in ("kv", "score", "ape")}
        words = "the two halves of the channels are exchanged"
        yield Hypothesis("halves_swapped", words, fresh)
        words = "previous and current window take each other's half of the channels"
        yield Hypothesis("halves_swapped", words, predict=partial(_unrolled, call, swapped, half))
        yield from _overlap(call)
    yield from _state(call)
    yield from _pooling(call)


def _unrolled(call: Captured, changed: dict[str, Any], half: int) -> Values:
    """The oracle on changed halves, its state put back into the order it is kept in."""
    outputs = call.oracle(**changed)
    states = {n: outputs[n].roll(half, 2) for n in ("kv_state", "score_state")}
    return {**outputs, **states}


def _overlap(call: Captured) -> Iterator[Hypothesis]:
    """The previous window of ratio 4: forgotten within a step, or between steps."""
    current = "the previous window is left out (no overlap)"
    yield Hypothesis("stale", current, predict=partial(pooled, call, previous=False))
    own = "both halves are taken from the current window"
    yield Hypothesis("shifted", own, predict=partial(pooled, call, lag=0))
    two = "the window before the previous one is taken"
    yield Hypothesis("shifted", two, predict=partial(pooled, call, lag=2))


def _state(call: Captured) -> Iterator[Hypothesis]:
    a = call.inputs
    kv, score = a["kv_state"], a["score_state"]
    empty = {"kv_state": kv * 0, "score_state": torch.full_like(score, -math.inf)}
    yield Hypothesis("stale", "the state of earlier steps is ignored", empty)
    states = ("kv_state", "score_state")
    kept = {name: a[name].double() for name in states}
    yield from _emptied(call)
    words = "the state keeps its previous contents"
    yield Hypothesis("stale", words, predict=lambda: {**call.truth, **kept})
    ratio = a["ape"].shape[0]
    if kv.shape[1] == 2 * ratio:
        for part, what in ((slice(0, ratio), "previous"), (slice(ratio, None), "open")):

            def partly(part: slice = part) -> Values:
                changed = {}
                for name in states:
                    changed[name] = call.truth[name].clone()
                    changed[name][:, part] = kept[name][:, part]
                return {**call.truth, **changed}

            words = f"the state of the {what} window keeps its previous contents"
            yield Hypothesis("stale", words, predict=partly)

    def without_bias() -> Values:
        return {**call.truth, "score_state": call.oracle(ape=call.inputs["ape"] * 0)["score_state"]}

    words = "the state keeps scores without the position bias"
    yield Hypothesis("constant_factor", words, predict=without_bias)
    yield from _unreset(call)


def _emptied(call: Captured) -> Iterator[Hypothesis]:
    """The previous window of ratio 4 is not kept for the next step."""
    ratio = call.inputs["ape"].shape[0]
    if call.inputs["kv_state"].shape[1] != 2 * ratio:
        return

    def predict(previous: bool) -> Values:
        values = dict(pooled(call, previous=previous))
        for name, empty in (("kv_state", 0.0), ("score_state", -math.inf)):
            values[name] = values[name].clone()
            values[name][:, :ratio] = empty
        return values

    words = "the previous window is not kept in the state"
    yield Hypothesis("stale", words, predict=partial(predict, True))
    words = "the previous window is left out and not kept in the state"
    yield Hypothesis("stale", words, predict=partial(predict, False))


def _unreset(call: Captured) -> Iterator[Hypothesis]:
    """Slots of the open window that are not cleared when the window closes."""

    def predict() -> Values:
        truth, a = call.truth, call.inputs
        empty = truth["score_state"] == -math.inf
        kv = torch.where(empty, a["kv_state"].double(), truth["kv_state"])
        score = torch.where(empty, a["score_state"].double(), truth["score_state"])
        return {**truth, "kv_state": kv, "score_state": score}

    yield Hypothesis("stale", "closed slots of the state are not cleared", predict=predict)


def _pooling(call: Captured) -> Iterator[Hypothesis]:
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("unexplained", "the window is averaged, its scores are not used", {"weigh": _mean}),
        ("unexplained", "one softmax weight a token, not one a channel", {"weigh": _per_token}),
        ("transposed", "the softmax runs over channels, not tokens", {"weigh": _over_channels}),
        ("constant_factor", "the weights are not normalised", {"weigh": _unnormalised}),
        ("unexplained", "sigmoid gates instead of a softmax", {"weigh": _sigmoid}),
        ("unexplained", "the largest score takes all", {"weigh": _hard}),
    ]
    for kind, words, options in variants:
        yield Hypothesis(kind, words, predict=partial(pooled, call, **options))


def _mean(score: Tensor) -> Tensor:
    valid = torch.isfinite(score).double()
    return valid / valid.sum(1, keepdim=True).clamp(min=1)


def _per_token(score: Tensor) -> Tensor:
    finite = torch.where(torch.isfinite(score), score, -1e30)
    return finite.mean(-1, keepdim=True).softmax(1).expand_as(score)


def _over_channels(score: Tensor) -> Tensor:
    return score.softmax(-1).nan_to_num()


def _unnormalised(score: Tensor) -> Tensor:
    return torch.exp(score - score.amax(1, keepdim=True))


def _sigmoid(score: Tensor) -> Tensor:
    return torch.sigmoid(score)


def _hard(score: Tensor) -> Tensor:
    return (score == score.amax(1, keepdim=True)).double()


def _softmax(score: Tensor) -> Tensor:
    return score.softmax(1)


def pooled(
    call: Captured,
    *,
    previous: bool = True,
    lag: int = 1,
    weigh: Callable[[Tensor], Tensor] = _softmax,
) -> Values:
    """`pooled` in float64 by another rule; the states as they should be.

    previous: whether the previous window takes part (ratio 4). lag: how many windows back it is.
    weigh: scores [m, slots, d] -> weights of the slots.
    """
    a = call.inputs
    ape = a["ape"].double()
    ratio, width = ape.shape
    step: Step = a["step"]
    overlap = a["kv_state"].shape[1] == 2 * ratio
    score = a["score"].double() + ape[step.positions % ratio]
    found = []
    for b, (start, rows) in enumerate(zip(step.starts, step.rows(), strict=True)):
        kept = slice(ratio, 2 * ratio) if overlap else slice(0, ratio)
        filled = start % ratio
        state = [a[name][b].double() for name in ("kv_state", "score_state")]
        fresh = [a["kv"][rows].double(), score[rows]]
        count = (filled + len(fresh[0])) // ratio
        kv, scores = (
            torch.cat((old[kept][:filled], new))[: count * ratio].view(count, ratio, width)
            for old, new in zip(state, fresh, strict=True)
        )
        if overlap:
            d = width // 2
            pad = [
                state[0].new_zeros(lag, ratio, width),
                torch.full((lag, ratio, width), -math.inf),
            ]
            pad = [p.to(kv) for p in pad]
            if previous and lag:
                pad[0][-1], pad[1][-1] = state[0][:ratio], state[1][:ratio]
            before_kv = torch.cat((pad[0], kv))[:count] if previous else torch.zeros_like(kv)
            hidden = torch.full_like(scores, -math.inf)
            before = torch.cat((pad[1], scores))[:count] if previous else hidden
            kv = torch.cat((before_kv[..., :d], kv[..., d:]), 1)
            scores = torch.cat((before[..., :d], scores[..., d:]), 1)
        found.append((weigh(scores) * kv).sum(1))
    return {**call.truth, "pooled": torch.cat(found)}


# ------------------------------------------------------------------------------ scores


@candidates("index_score")
def score_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    step, ratio = a["step"], a["ratio"]
    for shift in (1, -1, 2, -2):
        words = f"visibility is off by {shift:+d} entries"
        yield Hypothesis("shifted", words, predict=partial(scored, call, entries=shift))
    for words, visible in (
        ("an entry is visible one token too late", step.positions // ratio),
        ("an entry is visible before its last token", (step.positions + ratio - 1) // ratio),
    ):
        yield Hypothesis("shifted", words, predict=partial(scored, call, visible=visible))
    everything = torch.full_like(step.positions, step.entries(ratio))
    words = "hidden entries are scored (no causal mask)"
    yield Hypothesis("padding", words, predict=partial(scored, call, visible=everything))
    words = "hidden entries have score 0, not -inf"
    yield Hypothesis("padding", words, predict=partial(scored, call, hidden=0.0))
    plain: list[tuple[str, str, dict[str, Any]]] = [
        ("flushed", "relu is missing", {"act": lambda x: x}),
        ("flushed", "relu is replaced by the absolute value", {"act": torch.abs}),
        ("constant_factor", "the heads' weights are left out", {"weights": "ones"}),
        ("flushed", "negative weights of heads are taken as 0", {"weights": "relu"}),
        ("unexplained", "the heads' weights go through a sigmoid", {"weights": "sigmoid"}),
        ("unexplained", "the heads' weights go through a softmax", {"weights": "softmax"}),
        ("unexplained", "the best head counts, not the sum", {"reduce": "max"}),
        ("flushed", "relu is applied to the sum of the heads", {"late": True}),
    ]
    for kind, words, options in plain:
        yield Hypothesis(kind, words, predict=partial(scored, call, **options))
    keys = a["keys"]
    for shift in (1, -1):
        words = f"entries are read {shift:+d} rows away"
        yield Hypothesis("shifted", words, {"keys": keys.roll(-shift, 1)})
    if len(keys) > 1:
        first = keys[:1].expand_as(keys)
        yield Hypothesis("rows", "every sequence reads the first one's entries", {"keys": first})


def scored(
    call: Captured,
    *,
    entries: int = 0,
    visible: Tensor | None = None,
    hidden: float = -math.inf,
    act: Callable[[Tensor], Tensor] = torch.relu,
    weights: str = "",
    reduce: str = "sum",
    late: bool = False,
) -> Values:
    """index_score in float64 by another rule; `entries` more or fewer are visible."""
    a = call.inputs
    step, ratio = a["step"], a["ratio"]
    total = step.entries(ratio)
    score = torch.zeros(len(a["q"]), total, dtype=torch.float64, device=a["q"].device)
    factors = {
        "": lambda w: w,
        "ones": torch.ones_like,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "softmax": lambda w: w.softmax(-1),
    }
    head_weights = factors[weights](a["weights"].double()) * a["scale"]
    for b, rows in enumerate(step.rows()):
        keys = a["keys"][b].double()
        reach = min(total, len(keys))
        dots = a["q"][rows].double() @ keys[:reach].T  # [s, ih, reach]
        weighted = head_weights[rows, :, None] * (dots if late else act(dots))
        value = weighted.amax(1) if reduce == "max" else weighted.sum(1)
        score[rows, :reach] = torch.relu(value) if late else value
    seen = step.visible(ratio) if visible is None else visible
    columns = torch.arange(total, device=score.device)
    return {"score": score.masked_fill(columns >= (seen + entries)[:, None], hidden)}


# ------------------------------------------------------------------------------ top-k


@candidates("index_topk")
def topk_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    score, visible, k = a["score"], a["visible"], min(a["k"], a["score"].shape[1])
    columns = torch.arange(score.shape[1], device=score.device).expand_as(score)
    seen = columns < visible[:, None]
    for shift in (1, -1):
        words = f"visibility is off by {shift:+d}"
        yield Hypothesis("shifted", words, {"visible": (visible + shift).clamp(min=0)})
    for words, ranked in (
        ("the worst entries are kept", -score),
        ("scores are ranked by their absolute value", score.abs()),
        ("the first entries are kept, whatever their score", -columns.float()),
        ("the newest entries are kept, whatever their score", columns.float()),
    ):
        hidden = ranked.masked_fill(~seen, -math.inf)
        yield Hypothesis("decision_flip", words, {"score": hidden})
    for fewer in (1, 2, 4, 8, 16, k // 2):
        if 0 < fewer < k:
            words = f"only {k - fewer} entries are kept"

            def cut(fewer: int = fewer) -> Values:
                index = call.truth["index"].clone()
                index[:, k - fewer :] = -1
                return {"index": index}

            yield Hypothesis("decision_flip", words, predict=cut)
    for shift in (1, -1):

        def moved(shift: int = shift) -> Values:
            index = call.truth["index"]
            return {"index": torch.where(index >= 0, index + shift, index)}

        yield Hypothesis("shifted", f"indices are {shift:+d}", predict=moved)

    def unmasked() -> Values:
        ranked = call.inputs["score"].sort(1, descending=True, stable=True).indices[:, :k]
        return {"index": ranked.int()}

    yield Hypothesis("padding", "hidden entries are kept instead of -1", predict=unmasked)

    def zero_for_none() -> Values:
        return {"index": call.truth["index"].clamp(min=0)}

    yield Hypothesis("padding", "0 stands for none instead of -1", predict=zero_for_none)
