"""Probes of any tensor: statistics, and the first value that is not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.stats import first_nonfinite


def expected_nonfinite(site: Site, output: str) -> bool:
    """Whether infinities are declared for this output (masks, the compressor's empty slots)."""
    return output in site.spec.nonfinite


@probe
class StatsProbe(Probe):
    """NaN and Inf counts, largest magnitude, rms and mean of every output."""

    name = "stats"
    help = "nan, inf, abs_max, rms, mean of every output"
    reads = ("nan", "inf", "abs_max", "rms", "mean")

    def wants(self, site: Site) -> bool:
        return True

    def observe(self, call: Call) -> Iterable[Reading]:
        for output in call.outputs:
            stats = call.stats(output)
            if stats is None:
                continue
            for count, name in ((stats.nan, "nan"), (stats.inf, "inf")):
                expected = name == "inf" and expected_nonfinite(call.site, output)
                if expected and count:
                    continue
                verdict = "alarm" if count else "ok"
                yield call.reading(self.name, name, count, "values", 0, verdict, output=output)
            yield call.reading(self.name, "abs_max", stats.abs_max, output=output)
            yield call.reading(self.name, "rms", stats.rms, output=output)
            yield call.reading(self.name, "mean", stats.mean, output=output)


@probe
class NonFiniteProbe(Probe):
    """Sites whose inputs are finite and an output is not: where a NaN is made, not where it spreads."""

    name = "nonfinite"
    help = "sites that make a NaN or Inf of finite inputs, with its first coordinate"
    reads = ("first_nonfinite",)

    def wants(self, site: Site) -> bool:
        return True

    def observe(self, call: Call) -> Iterable[Reading]:
        for output, tensor in call.outputs.items():
            stats = call.stats(output)
            if stats is None or not stats.nan + stats.inf:
                continue
            if expected_nonfinite(call.site, output):
                tensor = torch.where(tensor == -torch.inf, 0.0, tensor)
            coordinate = first_nonfinite(tensor)
            if coordinate is None or not _finite_inputs(call):
                continue
            value = float(tensor[tuple(coordinate)])
            detail = f"{output}{coordinate} is {value}; inputs all finite"
            where = [float(i) for i in coordinate]
            yield call.reading(
                self.name, "first_nonfinite", where, "index", None, "alarm", detail, output
            )
            return


def _finite_inputs(call: Call) -> bool:
    """Whether every input is finite, as it was before the op; declared infinities are fine."""
    for name, value in call.inputs.items():
        value = call.before.get(name, value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if name in call.site.spec.nonfinite:
            value = torch.where(value == -torch.inf, 0.0, value)
        if not bool(torch.isfinite(value.float()).all()):
            return False
    return True
