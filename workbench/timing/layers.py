"""Time of a whole layer, and of what its code does between the sites"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.timing.capturing import LayerInput, Pass
from dsv4_bench.workbench.timing.clock import Call, Clock
from dsv4_bench.workbench.timing.sites import Effort, interleave, middle_half

_EAGER = 5  # runs from Python, launch by launch


class _Recall:
    """A tap's observer: every op gives what it gave when it ran first, and does nothing."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        if site.path not in self.results:
            self.results[site.path] = site.run(args)
        return self.results[site.path]

    def tensors(self) -> list[Tensor]:
        """What the ops gave."""
        values = self.results.values()
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        return [value for value in flat if isinstance(value, Tensor)]


@torch.inference_mode()
def time_layer(
    model: Transformer, kept: Pass, given: LayerInput, clock: Clock, effort: Effort
) -> dict[str, Any]:
    """A captured layer as the engine runs it, on the route it has.

    `seconds` with `spread` and `repeats`: the whole layer, timed like a site; `between`: the same of
    its code with every op left out, which is what lies between the sites; `how` as in clock.Timed, for
    both; `eager`: the layer by the wall clock, every launch from Python.
    """
    layer, cache = model.layers[given.layer], kept.cache.layers[given.layer]
    indices = _index_tensors(kept.step)

    def make() -> Call:
        cache.restore(given.cache)
        return lambda: layer(given.x, cache, kept.step)

    try:
        eager = _eager(model, make)
        whole = clock.prepare(make, [given.x, *indices])
        values = interleave({"whole": whole}, effort)["whole"]
        with _ops_left_out(model, given.layer) as recall:
            make()()
            code = clock.prepare(make, [given.x, *indices, *recall.tensors()])
            between = interleave({"code": code}, effort)["code"]
    finally:
        cache.restore(given.cache)
    return {
        "seconds": statistics.median(values),
        "spread": middle_half(values),
        "repeats": len(values),
        "how": whole.how,
        "problem": whole.problem or code.problem,
        "between": statistics.median(between),
        "between_how": code.how,
        "eager": eager,
    }


def _index_tensors(step: Step) -> list[Tensor]:
    if isinstance(step, FixedStep):
        return step.tensors()
    return [value for value in vars(step).values() if isinstance(value, Tensor)]


@contextmanager
def _ops_left_out(model: Transformer, layer: int) -> Iterator[_Recall]:
    sites = [site for site in model.sites.values() if site.layer == layer]
    recall = _Recall()
    set_taps(sites, recall)
    try:
        yield recall
    finally:
        set_taps(sites, None)


def _eager(model: Transformer, make: Any) -> float:
    values = []
    for _ in range(_EAGER):
        call = make()
        _wait(model)
        started = time.perf_counter()
        call()
        _wait(model)
        values.append(time.perf_counter() - started)
    return statistics.median(values)


def _wait(model: Transformer) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
