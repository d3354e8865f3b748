"""Time per site of one layer, on the inputs a real forward pass gave it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import split
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation, choose
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.probes.judge import Judge
from dsv4_bench.probes.nvtx import site_range
from dsv4_bench.probes.tap import set_taps

_MIN_REPEATS, _MAX_REPEATS, _SITE_SECONDS = 3, 50, 0.4


@dataclass
class SiteTime:
    """Seconds by implementation: median and the middle half's width; own error of the kernel."""

    site: str
    op: str
    kernel: str
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    repeats: int = 0
    bytes: int = 0
    flops: int = 0
    own_error: float | None = None
    verdict: str = ""
    note: str = ""

    @property
    def speedup(self) -> float | None:
        """Reference time over kernel time; None where the kernel is the reference."""
        kernel = self.seconds.get(self.kernel)
        if self.kernel == "reference" or not kernel:
            return None
        return self.seconds["reference"] / kernel

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup}


def capture_layer(
    model: Transformer, layer: int, tokens: list[int], phase: str, progress: Callable[[str], None]
) -> list[Captured]:
    """Run `tokens` through the model and keep layer `layer`'s ops.

    Phase ``prefill`` captures one pass over all tokens; ``decode`` the pass of the last token,
    after the others have been prefilled. Layers after `layer` are not run in the captured pass.
    """
    count = len(model.layers)
    if not 0 <= layer < count:
        raise DSV4Error(f"layer {layer} does not exist", f"layers are 0 to {count - 1}")
    if phase == "decode" and len(tokens) < 2:
        raise DSV4Error("decode needs at least 2 tokens of context", "--context or a longer prompt")
    cache = model.new_cache()
    observer = Capture(lambda site: site.layer == layer)
    with torch.inference_mode():
        pieces = split(len(tokens), [len(tokens) - 1, 1] if phase == "decode" else [])
        for number, (start, stop) in enumerate(pieces):
            last = number + 1 == len(pieces)
            step = cache.step([tokens[start:stop]])
            x = model.embed(step.tokens)
            for index in range(layer + 1):
                progress(f"{'capture' if last else 'prefill'} L{index}")
                if last and index == layer:
                    set_taps(model.sites.values(), observer)
                try:
                    x = model.layers[index](x, cache.layers[index], step)
                finally:
                    set_taps(model.sites.values(), None)
            cache.advance(step)
    return observer.calls


def time_site(model: Transformer, captured: Captured, judge: Judge) -> SiteTime:
    """Reference and the route's kernel, interleaved on the same inputs; `judge` has the limits."""
    site = captured.site
    kernel = site.impl
    if kernel.name == "reference":
        kernel, note = choose(site.op, "kernel", model.context)
    else:
        note = site.stamp.note
    row = SiteTime(site.path, site.op, kernel.name, note=note)
    reference, _ = choose(site.op, "reference", model.context)
    contenders = list({impl.name: impl for impl in (reference, kernel)}.values())
    samples: dict[str, list[float]] = {impl.name: [] for impl in contenders}
    results: dict[str, dict[str, Tensor]] = {}
    with torch.inference_mode():
        for impl in contenders:  # warm-up: builds, caches, first touches
            _, results[impl.name] = _run(model, captured, impl)
        started = time.perf_counter()
        while row.repeats < _MAX_REPEATS:
            for impl in contenders:
                seconds, _ = _run(model, captured, impl)
                samples[impl.name].append(seconds)
            row.repeats += 1
            if row.repeats >= _MIN_REPEATS and time.perf_counter() - started > _SITE_SECONDS:
                break
    for name, values in samples.items():
        row.seconds[name] = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        row.spread[name] = high - low
    cost = site.spec.cost(captured.args, site.params, tuple(results["reference"].values()))
    row.bytes, row.flops = cost.bytes, cost.flops
    if kernel.name != "reference":
        call = replace(captured, outputs=results["reference"])
        with torch.inference_mode():
            found = judge.judge(call, results[kernel.name])
        if found is not None:
            row.own_error, row.verdict = found.comparison.relative_l2, found.comparison.verdict
    return row


def _run(
    model: Transformer, captured: Captured, impl: Implementation
) -> tuple[float, dict[str, Tensor]]:
    """One timed run on the captured inputs; in-place arguments are fresh copies."""
    site, spec = captured.site, captured.site.spec
    fresh = {name: tensor.clone() for name, tensor in captured.before.items()}
    names = spec.parameters[: len(captured.args)]
    args = tuple(fresh.get(n, a) for n, a in zip(names, captured.args, strict=True))
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    with site_range(site.path):
        started = time.perf_counter()
        result = impl.function(*args, **site.params)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds, {**spec.name_outputs(result), **fresh}
