"""Statistics of every output: counts of odd values, largest magnitude, moments, exponents"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_most


def expected_nonfinite(site: Site, output: str) -> bool:
    """Whether -inf is declared for this output (masks, the compressor's empty slots)."""
    return output in site.spec.nonfinite


_NONE = at_most(0)


@probe
class StatsProbe(Probe):
    """NaN and Inf counts, zeros, values at the largest magnitude, that magnitude, rms and mean.

    rms = sqrt(sum x^2 / n) and mean = sum x / n over the n finite values. `zero` is a share of all
    values; `peaks` counts the values of magnitude `abs_max`: more than a few show a clamp. The two are
    left out where they are 0 and 1. Infinities that the op declares do not count.
    """

    name = "stats"
    help = "nan, inf, zeros, abs_max, clamped values, rms, mean of every output"
    reads = ("nan", "inf", "zero", "peaks", "abs_max", "rms", "mean")
    captures = True

    def wants(self, site: Site) -> bool:
        return True

    def observe(self, call: Call) -> Iterable[Reading]:
        for output in call.outputs:
            call.ask("stats", output)
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        site = call.site
        for output in call.outputs:
            stats = call.stats(output)
            if stats is None:
                continue
            reading = partial(
                Reading, site.path, self.name, layer=site.layer, forward=call.forward, output=output
            )
            inf = stats.inf
            if inf and expected_nonfinite(site, output):
                inf -= stats.minus_inf
            yield reading("nan", stats.nan, "values", 0, _NONE(stats.nan))
            yield reading("inf", inf, "values", 0, _NONE(inf))
            if stats.zero:
                zero = stats.zero / max(stats.finite + stats.nan + stats.inf, 1)
                yield reading("zero", zero, "share")
            if stats.peaks > 1:
                yield reading("peaks", stats.peaks, "values")
            yield reading("abs_max", stats.abs_max)
            yield reading("rms", stats.rms)
            yield reading("mean", stats.mean)


@probe
class ExponentsProbe(Probe):
    """How the magnitudes of every output spread: values of each binary exponent.

    Pairs of e and the count of values in [2^e, 2^(e+1)), by float32's exponents; -127 stands for zero
    and subnormal values, 128 for infinities and NaN.
    """

    name = "exponents"
    help = "histogram of binary exponents of every output"
    reads = ("exponents",)
    captures = True

    def wants(self, site: Site) -> bool:
        return True

    def observe(self, call: Call) -> Iterable[Reading]:
        for output in call.outputs:
            call.ask("exponents", output)
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        for output, tensor in call.outputs.items():
            if not tensor.is_floating_point():
                continue
            counts = call.exponents(output)
            pairs = [float(v) for e, n in enumerate(counts) if n for v in (e - 127, n)]
            yield call.reading(self.name, "exponents", pairs, "log2, count", output=output)
