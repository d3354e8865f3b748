"""The residual streams: their norms and growth, and the mHC mixing between them"""

from __future__ import annotations

import math
from collections.abc import Iterable

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_least, at_most
from dsv4_bench.probes.stats import Stats


@probe
class ResidualProbe(Probe):
    """Norm of each residual stream after every sublayer, and its growth over the layer.

    norm = sqrt(mean x^2) of each stream over tokens and channels; growth = that of all streams
    together, over the same after the layer before.
    """

    name = "residual"
    help = "rms of each residual stream, and growth against the layer before"
    reads = ("norm", "growth")
    captures = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._before: dict[int, tuple[int, float]] = {}  # layer -> forward, mean square

    def wants(self, site: Site) -> bool:
        return site.path == "embed" or site.op == "hc_post"

    def observe(self, call: Call) -> Iterable[Reading]:
        for stream in range(call.outputs["x"].shape[1]):  # x [n, hc, d]
            call.ask("stats", "x", stream)
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        norms = [_rms(call.stats("x", stream)) for stream in range(call.outputs["x"].shape[1])]
        yield call.reading(self.name, "norm", norms, "rms")
        if call.site.path.endswith("attn/hc_post"):
            return
        layer = -1 if call.site.layer is None else call.site.layer
        total = sum(norm * norm for norm in norms) / len(norms)
        forward, before = self._before.get(layer - 1, (None, total))
        if forward == call.forward:
            growth = math.sqrt(total / before) if before else math.inf
            yield call.reading(self.name, "growth", growth, "ratio")
        self._before[layer] = (call.forward, total)


def _rms(stats: Stats | None) -> float:
    """Root of the mean square; NaN unless all values are finite."""
    assert stats is not None
    return math.nan if stats.nan or stats.inf else stats.rms


@probe
class HyperProbe(Probe):
    """mHC mixing: columns of comb sum to 1, rows only nearly; post in (0, 2)."""

    name = "hyper"
    help = "row and column sums of the mHC mixing matrix, range of post"
    reads = ("column_error", "row_error", "post_min", "post_max")
    captures = True
    limit = 1e-4  # twenty float32 normalisations with eps 1e-6

    def wants(self, site: Site) -> bool:
        return site.op == "hc_pre"

    def observe(self, call: Call) -> Iterable[Reading]:
        for output, axis in _SUMS:
            call.ask("sums", output, axis)
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        columns, rows, post = (call.sums(output, axis) for output, axis in _SUMS)
        column, limit = abs(columns.furthest(1.0) - 1), self.limit
        low, high = (math.nan, math.nan) if post.nan else (post.low, post.high)
        yield call.reading(self.name, "column_error", column, "", limit, at_most(limit))
        yield call.reading(self.name, "row_error", abs(rows.furthest(1.0) - 1))
        yield call.reading(self.name, "post_min", low, "", 0.0, at_least(0.0))
        yield call.reading(self.name, "post_max", high, "", 2.0, at_most(2.0))


# Columns and rows of comb [n, hc, hc]; the values of post [n, hc].
_SUMS: tuple[tuple[str, int | None], ...] = (("comb", 1), ("comb", 2), ("post", None))
