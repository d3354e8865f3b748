"""Router and experts: scores, bias, weights of the sum, clamp, gate and up, one expert's weights for another's"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.ops.experts import Expert, ExpertBank, chosen_experts, swiglu
from dsv4_bench.engine.ops.linear import matmul
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses.base import Hypothesis, Values, candidates
from dsv4_bench.probes.hypotheses.weights import changed_weights

Activation = Callable[[Tensor, Tensor, float], Tensor]
Change = Callable[[Expert, int], Expert]
_MATRICES = {"w1": "gate (w1)", "w3": "up (w3)", "w2": "down (w2)"}


# ------------------------------------------------------------------------------ gate


@candidates("gate")
def gate_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    bias, hashed = a["bias"], a["tid2eid"] is not None
    if hashed:
        yield Hypothesis("decision_flip", "the hash table is ignored", {"tid2eid": None})
        words = "the hash table is read by row number, not token id"
        rows = torch.arange(len(a["tokens"]), device=a["tokens"].device)
        yield Hypothesis("decision_flip", words, {"tokens": rows})
    plain: list[tuple[str, str, dict[str, Any]]] = [
        ("constant_factor", "the scale is left out", {"scale": 1.0}),
        ("constant_factor", "the weights are not renormalised", {"renormalise": False}),
        (
            "constant_factor",
            "neither renormalised nor scaled",
            {"renormalise": False, "scale": 1.0},
        ),
        ("decision_flip", "the worst experts are chosen", {"worst": True}),
    ]
    if bias is not None:
        plain += [
            ("constant_factor", "the bias is included in the weights", {"biased_weights": True}),
            ("decision_flip", "the bias is left out", {"bias": None}),
            ("decision_flip", "the bias is subtracted", {"bias": -bias}),
            ("decision_flip", "the bias is added twice", {"bias": 2 * bias}),
        ]
        for shift in (1, -1):
            changed = {"bias": bias.roll(shift)}
            plain.append(("decision_flip", f"the bias is shifted by {shift} expert", changed))
    for kind, words, options in plain:
        yield Hypothesis(kind, words, predict=partial(routed, call, **options))
    scores: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("softmax", lambda x: x.softmax(-1)),
        ("sigmoid", torch.sigmoid),
        ("softplus without the square root", F.softplus),
        ("square root of relu", lambda x: x.relu().sqrt()),
        ("square root of sigmoid", lambda x: x.sigmoid().sqrt()),
        ("the logits themselves", lambda x: x),
        ("square root of exp", lambda x: (x / 2).exp()),
    ]
    for words, function in scores:
        text = f"scores are {words} instead of sqrt(softplus)"
        yield Hypothesis("unexplained", text, predict=partial(routed, call, score=function))


def routed(
    call: Captured,
    *,
    score: Callable[[Tensor], Tensor] = lambda x: F.softplus(x).sqrt(),
    renormalise: bool = True,
    biased_weights: bool = False,
    worst: bool = False,
    **changed: Any,
) -> Values:
    """The gate in float64 by another rule; `changed` replaces its arguments."""
    a = {**call.inputs, **changed}
    with double_precision():
        scores = score(matmul(a["x"].double(), a["weight"]))
    bias = 0.0 if a["bias"] is None else a["bias"].double()
    if a["tid2eid"] is not None:
        chosen = a["tid2eid"][a["tokens"]].long()
    else:
        order = (scores + bias).sort(dim=-1, descending=not worst, stable=True)
        chosen = order.indices[:, : a["k"]]
    weights = (scores + bias if biased_weights else scores).gather(1, chosen)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return {"routing": weights * a["scale"], "experts": chosen.int(), "scores": scores}


# ------------------------------------------------------------------------------ experts


@dataclass(frozen=True)
class ChangedBank:
    """A layer's experts, each as `change(expert, number)` makes it."""

    bank: ExpertBank
    change: Change

    def __getitem__(self, expert: int) -> Expert:
        return self.change(self.bank[expert], expert)

    def __len__(self) -> int:
        return len(self.bank)


def _changes(first: Expert) -> Iterator[tuple[str, str, Change]]:
    """(kind, words, change) of an expert's three matrices; `first` is one of them, for its format."""
    yield "permuted", "gate (w1) and up (w3) are exchanged", lambda e, n: Expert(e.w3, e.w2, e.w1)
    yield from _scales_exchanged(first)
    for name, label in _MATRICES.items():
        for kind, words, _ in changed_weights(getattr(first, name)):

            def one(expert: Expert, number: int, name: str = name, words: str = words) -> Expert:
                return expert._replace(**{name: _misread(getattr(expert, name), words)})

            yield kind, f"{label}: {words}", one
    for kind, words, _ in changed_weights(first.w1):

        def each(expert: Expert, number: int, words: str = words) -> Expert:
            return Expert(*(_misread(weight, words) for weight in expert))

        yield kind, f"all three matrices: {words}", each


def _misread(weight: Weight, words: str) -> Weight:
    for _, text, changed in changed_weights(weight):
        if text == words:
            return changed
    return weight


def _scaled(weight: Weight, global_scale: float) -> Weight:
    return replace(weight, global_scale=global_scale, _dense=None)


def _scales_exchanged(first: Expert) -> Iterator[tuple[str, str, Change]]:
    """A matrix with the global scale of another of the same expert, or with none."""
    if first.w1.format != "nvfp4":
        return

    def borrowed(name: str, source: str, expert: Expert, number: int) -> Expert:
        scale = getattr(expert, source).global_scale
        return expert._replace(**{name: _scaled(getattr(expert, name), scale)})

    def unscaled(expert: Expert, number: int) -> Expert:
        return Expert(*(_scaled(weight, 1.0) for weight in expert))

    owners = {"w1": "gate's", "w3": "up's"}
    for name, source in (("w3", "w1"), ("w1", "w3"), ("w2", "w1"), ("w2", "w3")):
        words = f"{_MATRICES[name]} is used with {owners[source]} global scale"
        yield "constant_factor", words, partial(borrowed, name, source)
    yield "constant_factor", "no global scale is used", unscaled


def _neighbours(bank: ExpertBank) -> Iterator[tuple[str, str, Change]]:
    """Weights, or global scales, of another expert."""

    def of_first(names: tuple[str, ...], expert: Expert, number: int) -> Expert:
        scales = {name: getattr(bank[0], name).global_scale for name in names}
        return expert._replace(
            **{name: _scaled(getattr(expert, name), scale) for name, scale in scales.items()}
        )

    def shifted(shift: int, expert: Expert, number: int) -> Expert:
        return bank[(number + shift) % len(bank)]

    def one_shifted(name: str, shift: int, expert: Expert, number: int) -> Expert:
        return expert._replace(**{name: getattr(shifted(shift, expert, number), name)})

    for name, label in _MATRICES.items():
        words = f"{label} has expert 0's global scale in every expert"
        yield "constant_factor", words, partial(of_first, (name,))
    words = "expert 0's global scales are used for every expert"
    yield "constant_factor", words, partial(of_first, tuple(_MATRICES))
    for shift in (1, -1):
        words = f"expert e's weights are those of expert e {shift:+d}"
        yield "shifted", words, partial(shifted, shift)
        for name, label in _MATRICES.items():
            words = f"{label} of expert e is that of expert e {shift:+d}"
            yield "shifted", words, partial(one_shifted, name, shift)


def _activations(limit: float) -> Iterator[tuple[str, str, Activation]]:
    yield "saturated", "the clamp is missing", lambda g, u, m: F.silu(g) * u
    yield (
        "saturated",
        "the gate is clamped on both sides",
        lambda g, u, m: F.silu(g.clamp(-m, m)) * u.clamp(-m, m),
    )
    yield "saturated", "up is not clamped", lambda g, u, m: F.silu(g.clamp(max=m)) * u
    yield "saturated", "the gate is not clamped", lambda g, u, m: F.silu(g) * u.clamp(-m, m)
    yield (
        "saturated",
        "up is clamped from above only",
        lambda g, u, m: F.silu(g.clamp(max=m)) * u.clamp(max=m),
    )
    yield (
        "saturated",
        "the clamp is applied after silu",
        lambda g, u, m: F.silu(g).clamp(max=m) * u.clamp(-m, m),
    )
    yield (
        "saturated",
        "the product is clamped",
        lambda g, u, m: (F.silu(g) * u).clamp(-m, m),
    )
    yield "permuted", "silu is applied to up", lambda g, u, m: swiglu(u, g, m)
    for name, function in (
        ("gelu", F.gelu),
        ("gelu (tanh)", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", torch.relu),
        ("sigmoid", torch.sigmoid),
        ("gelu (sigmoid)", lambda x: x * torch.sigmoid(1.702 * x)),
    ):
        yield (
            "unexplained",
            f"{name} is taken instead of silu",
            partial(_gated, function),
        )
    yield (
        "unexplained",
        "up is taken plus 1",
        lambda g, u, m: F.silu(g.clamp(max=m)) * (u.clamp(-m, m) + 1),
    )


def _gated(function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return function(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _forward(
    x: Tensor, expert: Expert, limit: float, act: Activation, routing: Tensor | None
) -> Tensor:
    hidden = act(matmul(x, expert.w1), matmul(x, expert.w3), limit)
    if routing is not None:
        hidden = hidden * routing[:, None]
    return matmul(hidden, expert.w2)


def _experts_with(call: Captured, act: Activation) -> Values:
    a = call.inputs
    x, routing = a["x"].double(), a["routing"].double()
    y = torch.zeros_like(x)
    with double_precision():
        for number, rows, slots in chosen_experts(a["experts"], len(a["bank"])):
            weights = routing[rows, slots]
            part = _forward(x[rows], a["bank"][number], a["limit"], act, weights)
            y.index_add_(0, rows, part)
    return {"y": y}


def _shared_with(call: Captured, act: Activation) -> Values:
    a = call.inputs
    with double_precision():
        return {"y": _forward(a["x"].double(), a["expert"], a["limit"], act, None)}


@candidates("experts")
def experts_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    bank, routing, chosen = a["bank"], a["routing"], a["experts"]
    for kind, words, act in _activations(a["limit"]):
        yield Hypothesis(kind, words, predict=partial(_experts_with, call, act))
    ones = torch.ones_like(routing)
    yield Hypothesis("constant_factor", "the routing weights are left out", {"routing": ones})
    twice = {"routing": routing.square()}
    yield Hypothesis("constant_factor", "the routing weights are applied twice", twice)
    even = routing.mean(-1, keepdim=True).expand_as(routing)
    yield Hypothesis("constant_factor", "every expert gets the same weight", {"routing": even})
    order = {"routing": routing.flip(-1)}
    yield Hypothesis("permuted", "routing weights go to the experts in reverse", order)
    yield Hypothesis(
        "permuted", "routing weights go to the next expert", {"routing": routing.roll(1, -1)}
    )
    for shift in (1, -1):
        moved = (chosen + shift) % len(bank)
        yield Hypothesis("shifted", f"expert ids are {shift:+d}", {"experts": moved})
    for slot in range(chosen.shape[1]):
        without = routing.clone()
        without[:, slot] = 0
        words = f"the expert in slot {slot} is left out"
        yield Hypothesis("columns", words, {"routing": without})
    for kind, words, change in [*_changes(bank[int(chosen.flatten()[0])]), *_neighbours(bank)]:
        yield Hypothesis(kind, words, {"bank": ChangedBank(bank, change)})
    for number in sorted(set(chosen.flatten().tolist()))[:32]:
        dropped = {"routing": torch.where(chosen == number, 0.0, routing)}
        yield Hypothesis("rows", f"expert {number} is left out", dropped)


@candidates("shared_expert")
def shared_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    for kind, words, act in _activations(a["limit"]):
        yield Hypothesis(kind, words, predict=partial(_shared_with, call, act))
    for kind, words, change in _changes(a["expert"]):
        yield Hypothesis(kind, words, predict=partial(_shared_changed, call, change))


def _shared_changed(call: Captured, change: Change) -> Values:
    return call.oracle(expert=change(call.inputs["expert"], 0))
