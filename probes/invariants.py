"""What must hold for an op's outputs whatever the input: measured, with a limit that the reference sets

Each invariant is a number that is 0 where it holds. Its limit is a small constant plus four times
what the reference itself shows on the same inputs, so that rounding is no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.signatures import Signature

Values = dict[str, Tensor]
_SLACK = 4.0  # times the reference's own violation


@dataclass(frozen=True)
class Held:
    """One invariant at one site: its largest violation, the limit, and in words what must hold."""

    words: str
    value: float
    limit: float
    kind: str

    @property
    def ok(self) -> bool:
        return self.value <= self.limit  # NaN is not

    @property
    def sentence(self) -> str:
        return f"{self.words}: off by {self.value:.3g} (limit {self.limit:.2g})"

    @property
    def signature(self) -> Signature:
        return Signature(self.kind, self.sentence)

    def to_dict(self) -> dict[str, Any]:
        return {"words": self.words, "value": self.value, "limit": self.limit, "ok": self.ok}


@dataclass(frozen=True)
class Invariant:
    """`measure(inputs, outputs, truth)`: the largest violation, 0.0 where it holds exactly.

    floor: what any implementation may show. kind: the kind of a finding that only this one raises.
    """

    op: str
    words: str
    measure: Callable[[dict[str, Any], Values, Values], float]
    floor: float = 1e-6
    kind: str = "unexplained"


INVARIANTS: list[Invariant] = []


def invariant(
    op: str, words: str, floor: float = 1e-6, kind: str = "unexplained"
) -> Callable[[Callable[[dict[str, Any], Values, Values], float]], Any]:
    """Register the decorated function as an invariant of `op`."""

    def register(measure: Callable[[dict[str, Any], Values, Values], float]) -> Any:
        INVARIANTS.append(Invariant(op, words, measure, floor, kind))
        return measure

    return register


def check_invariants(call: Captured, outputs: Values) -> dict[str, Held]:
    """Every invariant of the call's op on `outputs`, by its words."""
    held = {}
    for item in INVARIANTS:
        if item.op != call.site.op:
            continue
        inputs = call.inputs
        value = item.measure(inputs, outputs, call.truth)
        allowed = item.floor + _SLACK * item.measure(inputs, call.outputs, call.truth)
        held[item.words] = Held(item.words, value, allowed, item.kind)
    return held


def _largest(x: Tensor) -> float:
    """The largest value, at least 0; NaN counts as infinite."""
    if x.numel() == 0:
        return 0.0
    value = float(x.double().nan_to_num(nan=math.inf).max())
    return max(value, 0.0)


# ------------------------------------------------------------------------------ mHC


@invariant("hc_pre", "comb's columns sum to 1", 1e-5)
def _columns(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    return _largest((outputs["comb"].double().sum(1) - 1).abs())


@invariant("hc_pre", "comb is not negative")
def _comb_sign(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    return _largest(-outputs["comb"].double())


@invariant("hc_pre", "post is between 0 and 2")
def _post(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    post = outputs["post"].double()
    return max(_largest(-post), _largest(post - 2))


@invariant("hc_pre", "u is a positive combination of the streams", 1e-2)
def _pre(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    """pre, solved from u = sum of pre_k x_k by least squares, must be positive."""
    x = inputs["x"].double()  # [n, hc, d]
    gram = x @ x.transpose(1, 2)
    ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-30  # the streams may be equal
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    side = x @ outputs["u"].double().unsqueeze(-1)
    pre = torch.linalg.solve(gram + ridge[:, None, None] * eye, side)
    return _largest(-pre)


# ------------------------------------------------------------------------------ attention


@invariant("attention", "softmax and sink sum to 1", 1e-3)
def _softmax(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    """Sum of exp(logit - lse) over the keys and the sink is exp(true lse - lse)."""
    return _largest((torch.exp(truth["lse"] - outputs["lse"].double()) - 1).abs())


@invariant("attention", "no weight on padding", 1e-3, "padding")
def _padding(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    """In rows with padding: the share of the softmax that lse has beyond keys and sink."""
    padded = (inputs["window_index"] < 0).any(1)
    if inputs["entry_index"] is not None and inputs["entry_index"].shape[1]:
        padded = padded | (inputs["entry_index"] < 0).any(1)
    return _largest(1 - torch.exp(truth["lse"] - outputs["lse"].double())[padded])


# ------------------------------------------------------------------------------ indexer, router


@invariant("index_topk", "index entries are in range and causal", 0.0, "padding")
def _causal(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    index = outputs["index"]
    return float(((index < -1) | (index >= inputs["visible"][:, None])).sum())


@invariant("index_topk", "index entries are unique", 0.0, "decision_flip")
def _unique(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    index = outputs["index"].sort(-1).values
    return float(((index[:, 1:] == index[:, :-1]) & (index[:, 1:] >= 0)).sum())


@invariant("index_score", "hidden entries have score -inf", 0.0, "padding")
def _hidden(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    hidden = truth["score"] == -torch.inf
    return float((outputs["score"][hidden] != -torch.inf).sum())


@invariant("gate", "routing weights sum to the scale", 1e-5, "constant_factor")
def _routing(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    total = outputs["routing"].double().sum(-1)
    return _largest((total / inputs["scale"] - 1).abs())


@invariant("gate", "experts are in range and unique", 0.0, "decision_flip")
def _experts(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    chosen = outputs["experts"].sort(-1).values
    outside = (chosen < 0) | (chosen >= inputs["weight"].shape[0])
    return float(outside.sum() + (chosen[:, 1:] == chosen[:, :-1]).sum())


# ------------------------------------------------------------------------------ rows


@invariant("rope", "rotation keeps the norm of every pair", 1e-5)
def _norms(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    rd = 2 * inputs["freqs"].numel()
    before, after = (
        t[..., -rd:].double().unflatten(-1, (-1, 2)).norm(dim=-1)
        for t in (inputs["x"], outputs["y"])
    )
    scale = float(before.square().mean().sqrt()) if before.numel() else 1.0
    return _largest((after - before).abs()) / (scale or 1.0)


@invariant("rope", "dims before the rotated ones are copied", 0.0, "columns")
def _copied(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    rd = 2 * inputs["freqs"].numel()
    return float((inputs["x"][..., :-rd] != outputs["y"][..., :-rd]).sum())


@invariant("cache_write", "other rows of the cache are left alone", 0.0, "rows")
def _untouched(inputs: dict[str, Any], outputs: Values, truth: Values) -> float:
    slots = inputs["slots"]
    kept = torch.ones(len(inputs["cache"]), dtype=torch.bool, device=slots.device)
    kept[slots[slots >= 0]] = False
    before, after = inputs["cache"][kept], outputs["cache"][kept]
    return float(((before != after) & ~(before.isnan() & after.isnan())).sum())


# ------------------------------------------------------------------------------ scales


def weights_of(call: Captured) -> list[Weight]:
    """Every weight that a call reads; of a layer's experts those that were chosen."""
    found: list[Weight] = []
    for value in call.inputs.values():
        if isinstance(value, Weight):
            found.append(value)
        elif isinstance(value, Expert):
            found.extend(value)
    if call.site.op == "experts":
        bank = call.inputs["bank"]
        for number in sorted(set(call.inputs["experts"].flatten().tolist())):
            found.extend(bank[number])
    return found


def check_scales(weight: Weight) -> Held | None:
    """Scales of a quantised weight are finite and not negative, its global scale positive.

    The value counts those that are not; None for a weight without scales.
    """
    if weight.scale is None:
        return None
    scale = weight.scale.float()  # e8m0 too: byte 255 is NaN
    bad = int((~torch.isfinite(scale) | (scale < 0)).sum())
    bad += not (math.isfinite(weight.global_scale) and weight.global_scale > 0)
    return Held(f"scales of {weight.name} are finite and positive", float(bad), 0.0, "nan")
