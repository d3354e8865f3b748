"""Time of one op, reference beside kernel, on captured inputs"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Implementation, choose
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.judge import Judge
from dsv4_bench.probes.nvtx import site_range
from dsv4_bench.workbench.timing.ceilings import Ceilings
from dsv4_bench.workbench.timing.clock import Call, Clock, Timed
from dsv4_bench.workbench.timing.cuda_clock import CudaClock
from dsv4_bench.workbench.timing.kernels import Kernels, kernels_of


@dataclass(frozen=True)
class Effort:
    """How long to measure: repeats until `seconds` are spent, within the bounds."""

    seconds: float = 0.4
    least: int = 5
    most: int = 200


@dataclass
class SiteTime:
    """Seconds by implementation: median and the middle half's width; the kernel's own error.

    `how` and `problem` say how each was timed (see clock.Timed). `floor` is what this machine needs at least (see
    ceilings.py), `bound` what that comes from.
    """

    site: str
    op: str
    layer: int | None
    kernel: str
    hash: str = ""  # of the kernel's code
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    problem: dict[str, str] = field(default_factory=dict)
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
    with_kernels: bool = True,
) -> SiteTime:
    """Reference and the route's kernel, interleaved on the same inputs; `judge` has the limits.

    The kernels inside each implementation are listed `with_kernels`, which takes a run of torch's
    profiler.
    """
    site = call.site
    contenders, note = _contenders(model, call)
    best = contenders[-1]
    row = SiteTime(site.path, site.op, site.layer, best.name, best.hash, note=note)
    with torch.inference_mode():
        results = {impl.name: call.run(impl.function) for impl in contenders}  # warm-up too
        timed = {impl.name: prepared(call, impl, clock) for impl in contenders}
        samples = interleave(timed, effort)
        if with_kernels:
            for impl in contenders:
                row.kernels[impl.name] = kernels_of(caller(call, impl), model.device)
        if row.kernel != "reference":
            _judge(row, call, judge, results)
    row.repeats = len(samples["reference"])
    for name, values in samples.items():
        row.seconds[name] = statistics.median(values)
        row.spread[name] = middle_half(values)
        row.how[name], row.problem[name] = timed[name].how, timed[name].problem
    cost = site.spec.cost(call.args, site.params, tuple(results["reference"].values()))
    dtype = str(model.dtype).removeprefix("torch.")
    row.bytes, row.flops = cost.bytes, cost.flops
    row.floor = ceiling.floor(cost.bytes, cost.flops, dtype)
    row.bound = ceiling.bound(cost.bytes, cost.flops, dtype)
    return row


def _contenders(model: Transformer, call: Captured) -> tuple[list[Implementation], str]:
    """The reference, then the kernel of the route (or the best one) if that is another; its note."""
    site = call.site
    kernel, note = site.impl, site.stamp.note
    if kernel.name == "reference":
        kernel, note = choose(site.op, "kernel", model.context)
    reference = IMPLEMENTATIONS[site.op]["reference"]
    return list({impl.name: impl for impl in (reference, kernel)}.values()), note


@torch.inference_mode()
def learn(model: Transformer, call: Captured, judge: Judge) -> None:
    """Show an op to `judge` before any verdict: limits that only one call has taught are too tight."""
    contenders, _ = _contenders(model, call)
    if len(contenders) > 1:
        results = [call.run(impl.function) for impl in contenders]
        judge.judge(replace(call, outputs=results[0]), results[1])


def run_recorded(model: Transformer, calls: Sequence[Captured], repeats: int) -> None:
    """Reference and kernel of every op as Python calls them, for a profiler that records all of it.

    Each call lies in the NVTX range of its site, and in one named like the implementation.
    """
    for call in calls:
        for impl in _contenders(model, call)[0]:
            for _ in range(repeats):
                run = caller(call, impl)
                with site_range(call.site.path, call.site.layer), site_range(impl.name):
                    run()


def run_counted(model: Transformer, calls: Sequence[Captured], clock: CudaClock) -> None:
    """The kernel of every op once, for a profiler that is started before it and stopped after.

    The caches are as `prepared` has them; a profiler that leaves them alone measures what we do.
    """
    for call in calls:
        impl = _contenders(model, call)[0][-1]
        caller(call, impl)()  # builds and tables are not counted
        run = caller(call, impl)
        clock.fill_caches(_warm(call))
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with site_range(call.site.path, call.site.layer), site_range(impl.name):
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def prepared(call: Captured, impl: Implementation, clock: Clock) -> Timed:
    """The op on `impl`, ready to be timed: weights and cache cold, what the ops before wrote warm."""
    return clock.prepare(lambda: caller(call, impl), _warm(call))


def _warm(call: Captured) -> list[Tensor]:
    """What the ops before have just written: the arguments that are no cache."""
    names = call.site.spec.parameters
    return [
        value
        for name, value in zip(names, call.args, strict=False)
        if isinstance(value, Tensor) and name not in call.cached
    ]


def interleave(timed: dict[str, Timed], effort: Effort) -> dict[str, list[float]]:
    """Samples by name, taking turns, so that a change of clocks meets all of them."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    started = time.perf_counter()
    for repeat in range(effort.most):
        for name, one in timed.items():
            samples[name].append(one.sample())
        if repeat + 1 >= effort.least and time.perf_counter() - started > effort.seconds:
            break
    return samples


def caller(call: Captured, impl: Implementation) -> Call:
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


def middle_half(values: list[float]) -> float:
    """Width of the middle half; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
