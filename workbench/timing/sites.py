"""Time of one op, reference beside kernel, on captured inputs"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Implementation, choose
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.judge import Judge
from dsv4_bench.probes.nvtx import site_range
from dsv4_bench.workbench.timing.capturing import LayerInput, Pass, run_layer
from dsv4_bench.workbench.timing.ceilings import Ceilings
from dsv4_bench.workbench.timing.clock import Clock
from dsv4_bench.workbench.timing.kernels import Kernels, kernels_of


@dataclass(frozen=True)
class Effort:
    """How long to measure: repeats until `seconds` are spent, within the bounds."""

    seconds: float = 0.4
    least: int = 5
    most: int = 50


@dataclass
class SiteTime:
    """Seconds by implementation: median and the middle half's width; the kernel's own error.

    `floor` is what this machine needs at least (see ceilings.py), `bound` what that comes from.
    """

    site: str
    op: str
    layer: int | None
    kernel: str
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    repeats: int = 0
    bytes: int = 0
    flops: int = 0
    floor: float = 0.0
    bound: str = ""
    own_error: float | None = None
    limit: float | None = None
    verdict: str = ""
    note: str = ""
    kernels: dict[str, Kernels] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Reference time over kernel time; None where the kernel is the reference."""
        if self.kernel == "reference" or not self.seconds.get(self.kernel):
            return None
        return self.seconds["reference"] / self.seconds[self.kernel]

    @property
    def of_floor(self) -> float | None:
        """Floor over kernel time: 1 is as fast as this machine can be."""
        seconds = self.seconds.get(self.kernel)
        return self.floor / seconds if seconds else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "of_floor": self.of_floor}


def time_site(
    model: Transformer,
    call: Captured,
    clock: Clock,
    ceiling: Ceilings,
    judge: Judge,
    effort: Effort,
    counted: bool = False,
    with_kernels: bool = True,
) -> SiteTime:
    """Reference and the route's kernel, interleaved on the same inputs; `judge` has the limits.

    `counted`: ncu watches; its profiler is started and stopped around the timed calls. The kernels
    inside each implementation are listed `with_kernels`, which takes a run of torch's profiler.
    """
    site = call.site
    kernel, note = site.impl, site.stamp.note
    if kernel.name == "reference":
        kernel, note = choose(site.op, "kernel", model.context)
    row = SiteTime(site.path, site.op, site.layer, kernel.name, note=note)
    reference = IMPLEMENTATIONS[site.op]["reference"]
    contenders = list({impl.name: impl for impl in (reference, kernel)}.values())
    with torch.inference_mode():
        results = {impl.name: call.run(impl.function) for impl in contenders}  # warm-up too
        with torch.cuda.profiler.profile() if counted else nullcontext():
            samples = _interleave(call, contenders, clock, effort)
        if with_kernels and not counted:  # one profiler at a time
            for impl in contenders:
                row.kernels[impl.name] = kernels_of(_caller(call, impl), model.device)
        if kernel.name != "reference":
            _judge(row, call, judge, results)
    row.repeats = len(samples["reference"])
    for name, values in samples.items():
        row.seconds[name] = statistics.median(values)
        row.spread[name] = _middle_half(values)
    cost = site.spec.cost(call.args, site.params, tuple(results["reference"].values()))
    dtype = str(model.dtype).removeprefix("torch.")
    row.bytes, row.flops = cost.bytes, cost.flops
    row.floor = ceiling.floor(cost.bytes, cost.flops, dtype)
    row.bound = ceiling.bound(cost.bytes, cost.flops, dtype)
    return row


def _interleave(
    call: Captured, contenders: list[Implementation], clock: Clock, effort: Effort
) -> dict[str, list[float]]:
    """Samples by implementation, taking turns, so that a change of clocks meets all of them."""
    samples: dict[str, list[float]] = {impl.name: [] for impl in contenders}
    started = time.perf_counter()
    for repeat in range(effort.most):
        for impl in contenders:
            run = _caller(call, impl)
            clock.evict()
            with site_range(call.site.path, call.site.layer), site_range(impl.name):
                samples[impl.name].append(clock.seconds(run))
        if repeat + 1 >= effort.least and time.perf_counter() - started > effort.seconds:
            break
    return samples


def _caller(call: Captured, impl: Implementation) -> Callable[[], Any]:
    """The op as a function of nothing; in-place arguments are fresh copies, made beforehand."""
    site, spec = call.site, call.site.spec
    inputs: dict[str, Any] = {**call.inputs, **{n: t.clone() for n, t in call.before.items()}}
    args = tuple(inputs[name] for name in spec.parameters[: len(call.args)])
    return lambda: impl.function(*args, **site.params)


def _judge(
    row: SiteTime, call: Captured, judge: Judge, results: dict[str, dict[str, Tensor]]
) -> None:
    """The kernel's own error and verdict, into `row`."""
    found = judge.judge(replace(call, outputs=results["reference"]), results[row.kernel])
    if found is not None:
        comparison = found.comparison
        row.own_error, row.limit = comparison.relative_l2, comparison.limit
        row.verdict = comparison.verdict


@torch.inference_mode()
def time_layer(
    model: Transformer, kept: Pass, given: LayerInput, clock: Clock, effort: Effort
) -> dict[str, float]:
    """A whole layer as the engine runs it, on the route it has: median seconds and spread."""
    run_layer(model, kept, given)
    values: list[float] = []
    started = time.perf_counter()
    layer, cache = model.layers[given.layer], kept.cache.layers[given.layer]
    while len(values) < effort.least or (
        len(values) < effort.most and time.perf_counter() - started < effort.seconds
    ):
        cache.restore(given.cache)
        clock.evict()
        values.append(clock.seconds(lambda: layer(given.x, cache, kept.step)))
    cache.restore(given.cache)
    middle, spread = statistics.median(values), _middle_half(values)
    return {"seconds": middle, "spread": spread, "repeats": len(values)}


def _middle_half(values: list[float]) -> float:
    """Width of the middle half; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
