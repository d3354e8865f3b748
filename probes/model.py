"""Probes that know the model: residual streams, softmax, mHC, router."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv4_bench.engine.ops.attention import gather_rows
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading

_ROUNDING = 1e-3  # of a sum of float32 softmax weights over 10^4 keys, with room


@probe
class ResidualProbe(Probe):
    """Norm of each residual stream after every sublayer, and its growth over the layer."""

    name = "residual"
    help = "rms of each residual stream, and growth against the layer before"
    reads = ("norm", "growth")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._before: dict[tuple[int, int], float] = {}  # (forward, layer) -> rms

    def wants(self, site: Site) -> bool:
        return site.path == "embed" or site.op == "hc_post"

    def observe(self, call: Call) -> Iterable[Reading]:
        x = call.outputs["x"].float()  # [n, hc, d]
        streams = x.square().mean(dim=(0, 2)).sqrt()  # [hc]
        yield call.reading(self.name, "norm", streams.tolist(), "rms")
        layer = -1 if call.site.layer is None else call.site.layer
        if call.site.path.endswith("attn/hc_post"):
            return
        total = float(x.square().mean().sqrt())
        before = self._before.get((call.forward, layer - 1))
        if before:
            yield call.reading(self.name, "growth", total / before, "ratio")
        self._before[(call.forward, layer)] = total


@probe
class SoftmaxProbe(Probe):
    """Attention weights: where the mass goes, recomputed from q and k with the op's own lse.

    With the implementation's lse, keys that were counted and should not be (padding) show as row
    sums below 1: `padding_mass` is what valid keys and sink leave unexplained.
    """

    name = "softmax"
    help = "sink mass, entropy, largest weight, mass on padding, row sum of attention"
    reads = ("sink_mass", "entropy", "max_weight", "padding_mass", "row_sum")

    def wants(self, site: Site) -> bool:
        return site.op == "attention"

    def observe(self, call: Call) -> Iterable[Reading]:
        rows = torch.linspace(0, len(call.inputs["q"]) - 1, min(32, len(call.inputs["q"])))
        weights, sink = _attention_weights(call, rows.long())  # [s, h, keys], [s, h]
        valid = weights.sum(-1)
        row_sum = valid + sink
        error = float((row_sum - 1).abs().max())
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
        judged = "ok" if error <= _ROUNDING else "alarm"
        name = self.name
        yield call.reading(name, "sink_mass", float(sink.mean()), "share")
        yield call.reading(name, "entropy", float(entropy.mean()), "nats")
        yield call.reading(name, "max_weight", float(weights.max()), "share")
        padding = float((1 - row_sum).clamp(min=0).max())
        yield call.reading(name, "padding_mass", padding, "share", _ROUNDING, judged)
        worst = float(row_sum.flatten()[(row_sum - 1).abs().argmax()])
        yield call.reading(name, "row_sum", worst, "share", 1.0, judged, "furthest from 1")


def _attention_weights(call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [s, h, keys] of the valid keys and sink [s, h] of query rows [s], by the op's lse."""
    a, lse = call.inputs, call.outputs["lse"][rows]
    keys = gather_rows(a["window"], a["window_index"][rows])
    valid = a["window_index"][rows] >= 0
    if a.get("entry_index") is not None:
        keys = torch.cat((keys, gather_rows(a["entries"], a["entry_index"][rows])), dim=1)
        valid = torch.cat((valid, a["entry_index"][rows] >= 0), dim=1)
    logits = a["q"][rows].float() @ keys.transpose(1, 2) * a["scale"]
    weights = torch.exp(logits - lse[..., None]).masked_fill(~valid[:, None], 0.0)
    return weights, torch.exp(a["sink"].float() - lse)


@probe
class HyperProbe(Probe):
    """mHC mixing: columns of comb sum to 1, rows only nearly; pre > 0 and post in (0, 2)."""

    name = "hyper"
    help = "row and column sums of the mHC mixing matrix, range of post"
    reads = ("column_error", "row_error", "post_min", "post_max")
    limit = 1e-4  # twenty float32 normalisations with eps 1e-6

    def wants(self, site: Site) -> bool:
        return site.op == "hc_pre"

    def observe(self, call: Call) -> Iterable[Reading]:
        comb, post = call.outputs["comb"].float(), call.outputs["post"].float()
        column = float((comb.sum(-2) - 1).abs().max())
        row = float((comb.sum(-1) - 1).abs().max())
        verdict = "ok" if column <= self.limit else "alarm"
        yield call.reading(self.name, "column_error", column, "", self.limit, verdict)
        yield call.reading(self.name, "row_error", row)
        low, high = float(post.min()), float(post.max())
        yield call.reading(self.name, "post_min", low, "", 0.0, "ok" if low >= 0 else "alarm")
        yield call.reading(self.name, "post_max", high, "", 2.0, "ok" if high <= 2 else "alarm")


@probe
class LoadProbe(Probe):
    """How many tokens each expert got, and whether the routing weights sum to the scale."""

    name = "load"
    help = "tokens of each expert, share of idle experts, sum of the routing weights"
    reads = ("load", "idle", "weight_sum")

    def wants(self, site: Site) -> bool:
        return site.op == "gate"

    def observe(self, call: Call) -> Iterable[Reading]:
        experts, routing = call.outputs["experts"], call.outputs["routing"].float()
        count = call.outputs["scores"].shape[1]
        load = torch.bincount(experts.flatten().long(), minlength=count)
        yield call.reading(self.name, "load", load.tolist(), "tokens")
        yield call.reading(self.name, "idle", float((load == 0).float().mean()), "share")
        scale = float(call.inputs["scale"])
        sums = routing.sum(-1)
        worst = float(sums[(sums - scale).abs().argmax()])
        judged = "ok" if abs(worst - scale) <= 1e-3 * scale else "alarm"
        yield call.reading(self.name, "weight_sum", worst, "", scale, judged)
