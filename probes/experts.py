"""The mixture of experts: who gets how many tokens, routing weights, how often SwiGLU clamps"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.ops.linear import matmul
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe, probe
from dsv4_bench.probes.readings import Call, Reading, at_most, near
from dsv4_bench.probes.sampling import sample_rows

_TOKENS = 8  # as many as the clamp probe computes again


@probe
class LoadProbe(Probe):
    """How many tokens each expert got, now and in the session, and the sum of the routing weights.

    skew = largest load over mean load (1 is even). idle = share of experts without a token.
    `session_load` and `session_idle` are over all passes so far; a pass that is run again counts
    once. The routing weights of a token sum to the layer's scale.
    """

    name = "load"
    help = "tokens of each expert in this pass and the session, skew, idle experts, routing sum"
    reads = (
        "load", "idle", "skew", "session_load", "session_idle", "bad_ids", "weight_sum",
    )  # fmt: skip
    captures = True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        # site -> forward, load of that pass, load of all before it
        self._session: dict[str, tuple[int, list[int], list[int]]] = {}

    def wants(self, site: Site) -> bool:
        return site.op == "gate"

    def observe(self, call: Call) -> Iterable[Reading]:
        call.ask("values", "experts")
        call.ask("sums", "routing", 1)
        return ()

    def explain(self, call: Call) -> Iterable[Reading]:
        name, scale = self.name, float(call.inputs["scale"])
        ids = torch.tensor(call.values("experts"), dtype=torch.int64).flatten()
        count = call.outputs["scores"].shape[1]
        good = (ids >= 0) & (ids < count)
        load = ids[good].bincount(minlength=count).tolist()
        total = self._over_session(call, load)
        skew = max(load) / max(sum(load) / count, 1e-9)
        worst = call.sums("routing", 1).furthest(scale)
        yield call.reading(name, "load", load, "tokens")
        yield call.reading(name, "idle", _idle(load), "share")
        yield call.reading(name, "skew", skew, "ratio", detail="largest load over mean load")
        yield call.reading(name, "session_load", total, "tokens")
        yield call.reading(name, "session_idle", _idle(total), "share")
        yield call.reading(name, "bad_ids", int((~good).sum()), "values", 0, at_most(0))
        yield call.reading(name, "weight_sum", worst, "", scale, near(scale, 1e-3 * scale))

    def _over_session(self, call: Call, load: list[int]) -> list[int]:
        """Tokens of each expert in all passes, this one included."""
        forward, last, before = self._session.get(call.site.path, (-1, load, [0] * len(load)))
        if forward != call.forward and forward >= 0:
            before = [a + b for a, b in zip(before, last, strict=True)]
        self._session[call.site.path] = (call.forward, load, before)
        return [a + b for a, b in zip(before, load, strict=True)]


def _idle(load: list[int]) -> float:
    return load.count(0) / len(load)


@probe
class ClampProbe(Probe):
    """How often the SwiGLU clamp bites: gate and up, computed again for some tokens.

    `clamped_gate` is the share of gate values above the limit, `clamped_up` that of up values beyond
    plus or minus the limit; the largest magnitudes beside them show how much was cut off.
    """

    name = "clamp"
    help = "share of SwiGLU's gate and up values beyond the clamp, and the largest ones"
    reads = ("clamped_gate", "clamped_up", "gate_max", "up_max")

    def wants(self, site: Site) -> bool:
        return site.op in ("experts", "shared_expert")

    def observe(self, call: Call) -> Iterable[Reading]:
        x, limit, name = call.inputs["x"], float(call.inputs["limit"]), self.name
        rows, note = sample_rows(torch.arange(len(x), device=x.device), _TOKENS, "tokens")
        pairs = [
            (_product(x[part], expert.w1), _product(x[part], expert.w3))
            for expert, part in _in_use(call, rows)
        ]
        if not pairs:
            return
        gate, up = (
            torch.cat([values.flatten() for values in side]) for side in zip(*pairs, strict=True)
        )
        clamped = ((gate > limit).double().mean(), (up.abs() > limit).double().mean())
        yield call.reading(name, "clamped_gate", clamped[0], "share", sampled=note)
        yield call.reading(name, "clamped_up", clamped[1], "share", sampled=note)
        yield call.reading(name, "gate_max", gate.max(), "", limit, sampled=note)
        yield call.reading(name, "up_max", up.abs().max(), "", limit, sampled=note)


def _product(x: Tensor, weight: Weight) -> Tensor:
    """As the reference rounds it: [m, i] float32 of a product in x's dtype."""
    return matmul(x, weight).to(x.dtype).float()


def _in_use(call: Call, rows: Tensor) -> Iterator[tuple[Expert, Tensor]]:
    """Each expert with those of `rows` that it serves."""
    if call.site.op == "shared_expert":
        yield call.inputs["expert"], rows
        return
    chosen, bank = call.inputs["experts"][rows], call.inputs["bank"]
    for expert in sorted(set(chosen.flatten().tolist())):
        if 0 <= expert < len(bank):
            yield bank[expert], rows[(chosen == expert).any(-1)]
