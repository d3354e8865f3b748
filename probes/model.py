"""The residual streams: their norms and growth, and the mHC mixing between them"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_least, at_most


@probe
class ResidualProbe(Probe):
    """Norm of each residual stream after every sublayer, and its growth over the layer.

    norm = sqrt(mean x^2) of each stream over tokens and channels; growth = that of all streams
    together, over the same after the layer before.
    """

    name = "residual"
    help = "rms of each residual stream, and growth against the layer before"
    reads = ("norm", "growth")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._before: dict[int, tuple[int, Tensor]] = {}  # layer -> forward, mean square

    def wants(self, site: Site) -> bool:
        return site.path == "embed" or site.op == "hc_post"

    def observe(self, call: Call) -> Iterable[Reading]:
        x = call.outputs["x"].float()  # [n, hc, d]
        streams = x.square().mean(dim=(0, 2))  # [hc]
        yield call.reading(self.name, "norm", streams.sqrt(), "rms")
        if call.site.path.endswith("attn/hc_post"):
            return
        layer = -1 if call.site.layer is None else call.site.layer
        total = streams.mean()
        forward, before = self._before.get(layer - 1, (None, total))
        if forward == call.forward:
            yield call.reading(self.name, "growth", (total / before).sqrt(), "ratio")
        self._before[layer] = (call.forward, total)


@probe
class HyperProbe(Probe):
    """mHC mixing: columns of comb sum to 1, rows only nearly; post in (0, 2)."""

    name = "hyper"
    help = "row and column sums of the mHC mixing matrix, range of post"
    reads = ("column_error", "row_error", "post_min", "post_max")
    limit = 1e-4  # twenty float32 normalisations with eps 1e-6

    def wants(self, site: Site) -> bool:
        return site.op == "hc_pre"

    def observe(self, call: Call) -> Iterable[Reading]:
        comb, post = call.outputs["comb"].float(), call.outputs["post"].float()
        column = (comb.sum(-2) - 1).abs().max()
        yield call.reading(self.name, "column_error", column, "", self.limit, at_most(self.limit))
        yield call.reading(self.name, "row_error", (comb.sum(-1) - 1).abs().max())
        yield call.reading(self.name, "post_min", post.min(), "", 0.0, at_least(0.0))
        yield call.reading(self.name, "post_max", post.max(), "", 2.0, at_most(2.0))
