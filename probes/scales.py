"""Quantised weights in use: ranges of their scales, and under the microscope their codes"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch

from dsv4_bench.engine.formats import E4M3_MAX, Weight
from dsv4_bench.engine.microscope import E4M3_MIN_NORMAL, Blocks, block_scales, examine
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading


@probe
class ScalesProbe(Probe):
    """Range of the block scales of every quantised weight, and the global scale beside them."""

    name = "scales"
    help = "block-scale range, share at maximum and subnormal, global scale"
    reads = (
        "block_max", "block_min", "at_max", "subnormal", "global", "gate_up_ratio", "input_scale_ratio",
    )  # fmt: skip

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple]] = {}  # weights do not change: computed once a site

    def wants(self, site: Site) -> bool:
        return any(isinstance(v, (Weight, Expert)) or k == "bank" for k, v in site.params.items())

    def observe(self, call: Call) -> Iterable[Reading]:
        if call.site.op == "experts":  # other tokens choose other experts
            rows = list(_rows(_used_experts(call)))
        else:
            path = call.site.path
            if path not in self._seen:
                self._seen[path] = list(_rows(_weights(call.site.params.values())))
            rows = self._seen[path]
        for row in rows:
            yield call.reading(self.name, *row)


def _weights(values: Iterable[object]) -> Iterator[Weight]:
    for value in values:
        if isinstance(value, Weight):
            yield value
        elif isinstance(value, Expert):
            yield from value


def _used_experts(call: Call) -> Iterator[Weight]:
    bank, count = call.inputs["bank"], len(call.inputs["bank"])
    for expert in sorted(set(call.inputs["experts"].flatten().tolist())):
        if 0 <= expert < count:
            yield from bank[expert]


def _rows(weights: Iterable[Weight]) -> Iterator[tuple]:
    """(name, value, unit, limit, verdict, detail) over all given weights together."""
    quantised = [w for w in weights if w.scale is not None]
    if not quantised:
        return
    values = torch.cat([block_scales(w).flatten() for w in quantised])
    bad = int((~torch.isfinite(values)).sum() + (values < 0).sum())
    judged = "alarm" if bad else "ok"
    detail = f"{len(quantised)} {quantised[0].format} matrices" + (f", {bad} bad" if bad else "")
    yield "block_max", float(values.max()), "", None, judged, detail
    yield "block_min", float(values.min()), "", None, judged, detail
    if any(w.format == "nvfp4" for w in quantised):
        yield "at_max", float((values >= E4M3_MAX).float().mean()), "share", None, "info", detail
        small = (values > 0) & (values < E4M3_MIN_NORMAL)
        yield "subnormal", float(small.float().mean()), "share", None, "info", detail
        scales2 = [w.global_scale for w in quantised]
        fine = all(0 < g < float("inf") for g in scales2)
        verdict = "ok" if fine else "alarm"
        yield "global", [min(scales2), max(scales2)], "", None, verdict, "smallest, largest"
    for name, ratios in (
        ("gate_up_ratio", _gate_up(quantised, lambda w: w.global_scale)),
        ("input_scale_ratio", _gate_up(quantised, lambda w: w.input_scale)),
    ):
        if ratios:
            worst = max(ratios, key=lambda r: max(r, 1 / r))
            what = "global" if name == "gate_up_ratio" else "input"
            yield name, worst, "ratio", None, "info", f"w1 / w3 {what} scale, furthest from 1"


def _gate_up(weights: list[Weight], scale: Callable[[Weight], float | None]) -> list[float]:
    """Ratios of the scale of gate to up, where an expert has both and they are positive."""
    found = {w.name: value for w in weights if (value := scale(w)) is not None and value > 0}
    pairs = [(name, f"{name[:-2]}w3") for name in found if name.endswith(".w1")]
    return [found[gate] / found[up] for gate, up in pairs if up in found]


_BLOCK_FIELDS = {  # reading -> field of Blocks
    "at_top": "at_top",
    "zero_codes": "zeros",
    "zero_blocks": "zero_blocks",
    "slack": "slack",
    "noise": "noise",
    "best_noise": "best_noise",
}


@probe
class MicroscopeProbe(Probe):
    """How well the quantised weights in use spend their scales and codes; see engine/microscope.py.

    `exponents`: pairs of floor(log2 block scale) and its count. Shares: `at_top` elements of the
    largest magnitude, `zero_codes` elements 0, `zero_blocks` blocks of zeros under a scale, `slack`
    blocks that could have half their scale. `noise` is the estimated rounding error, mean square
    over mean square, `best_noise` that of the best block scales; 4-bit formats only.
    """

    name = "microscope"
    help = "block-scale exponents, elements at the top and zero, slack, rounding noise of weights"
    reads = ("exponents", *_BLOCK_FIELDS)

    def __init__(self) -> None:
        self._seen: dict[str, Blocks] = {}  # by name: weights do not change

    def wants(self, site: Site) -> bool:
        return any(isinstance(v, (Weight, Expert)) or k == "bank" for k, v in site.params.items())

    def observe(self, call: Call) -> Iterable[Reading]:
        experts = call.site.op == "experts"
        weights = _used_experts(call) if experts else _weights(call.site.params.values())
        seen = [self._blocks(w) for w in weights if w.scale is not None]
        if not seen:
            return
        sampled = next((blocks.sampling for blocks in seen if blocks.sampling), "")
        detail = f"{len(seen)} {seen[0].format} matrices"
        pairs: Counter[int] = Counter()
        for blocks in seen:
            pairs.update(blocks.exponents)
        flat = [float(number) for pair in sorted(pairs.items()) for number in pair]
        yield call.reading(self.name, "exponents", flat, "log2, count", detail=detail)
        for name, field in _BLOCK_FIELDS.items():
            known = [value for blocks in seen if (value := getattr(blocks, field)) is not None]
            if known:
                unit = "ratio" if "noise" in name else "share"
                mean = sum(known) / len(known)
                yield call.reading(self.name, name, mean, unit, detail=detail, sampled=sampled)

    def _blocks(self, weight: Weight) -> Blocks:
        if weight.name not in self._seen:
            self._seen[weight.name] = examine(weight.to(torch.device("cpu")))
        return self._seen[weight.name]
