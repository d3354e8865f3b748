"""Probe of quantisation scales: magnitudes of block and global scales of the weights in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dsv4_bench.engine.formats import E4M3_MAX, Weight, e8m0_to_float
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading

_E4M3_MIN_NORMAL = 2.0**-6


def scale_values(scale: Tensor) -> Tensor:
    """Block scales of any stored dtype as float32, same shape."""
    return scale.float() if scale.dtype != torch.float8_e8m0fnu else e8m0_to_float(scale)


@probe
class ScalesProbe(Probe):
    """Range of the block scales of every quantised weight, and the global scale beside them."""

    name = "scales"
    help = "block-scale range, share at maximum and subnormal, global scale"
    reads = ("block_max", "block_min", "at_max", "subnormal", "global", "gate_up_ratio")

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
    scales = [scale_values(w.scale).flatten() for w in quantised if w.scale is not None]
    values = torch.cat(scales)
    bad = int((~torch.isfinite(values)).sum() + (values < 0).sum())
    judged = "alarm" if bad else "ok"
    detail = f"{len(quantised)} {quantised[0].format} matrices" + (f", {bad} bad" if bad else "")
    yield "block_max", float(values.max()), "", None, judged, detail
    yield "block_min", float(values.min()), "", None, judged, detail
    if any(w.format == "nvfp4" for w in quantised):
        yield "at_max", float((values >= E4M3_MAX).float().mean()), "share", None, "info", detail
        small = (values > 0) & (values < _E4M3_MIN_NORMAL)
        yield "subnormal", float(small.float().mean()), "share", None, "info", detail
        scales2 = [w.global_scale for w in quantised]
        fine = all(0 < g < float("inf") for g in scales2)
        verdict = "ok" if fine else "alarm"
        yield "global", [min(scales2), max(scales2)], "", None, verdict, "smallest, largest"
    ups = {w.name.rpartition(".")[0]: w.global_scale for w in quantised if w.name.endswith(".w3")}
    ratios = [
        w.global_scale / ups[base]
        for w in quantised
        if w.name.endswith(".w1") and ups.get(base := w.name.rpartition(".")[0])
    ]
    if ratios:
        worst = max(ratios, key=lambda r: max(r, 1 / r) if r else 0.0)
        yield "gate_up_ratio", worst, "ratio", None, "info", "w1 / w3 global scale, furthest from 1"
