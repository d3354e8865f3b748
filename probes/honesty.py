"""What watching does to a run: what was seen, how much slower it was, whether it changed a bit"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.observation import Watch
from dsv4_bench.probes.tap import set_taps


@dataclass(frozen=True)
class Honesty:
    """A run with probes beside the same run without.

    `ops` ran in all passes, `observed` of them were looked at by some probe; `sites` says at how many
    sites each probe took a reading. `sampled`: for each reading that is of a part, which part (of the
    last one). `changed` names the outputs and caches whose bits differ; empty is what it should be.
    """

    ops: int
    observed: int
    readings: int
    sites: dict[str, int]
    sampled: dict[str, str]
    seconds_without: float
    seconds_with: float
    changed: tuple[str, ...]

    @property
    def slow_down(self) -> float:
        """Time with probes over time without; 1 is free."""
        return self.seconds_with / self.seconds_without

    @property
    def sentence(self) -> str:
        """Coverage, slow-down and bits in one line."""
        bits = "output bits unchanged"
        if self.changed:
            more = f" and {len(self.changed) - 1} more" if len(self.changed) > 1 else ""
            bits = f"PROBES CHANGED BITS of {self.changed[0]}{more}"
        seen = f"{self.observed} of {self.ops} ops observed, {self.readings} readings"
        return f"{seen}; {self.slow_down:.2f}x the time without probes; {bits}"

    def to_dict(self) -> dict[str, Any]:
        fields = {**vars(self), "changed": list(self.changed)}
        return {**fields, "slow_down": self.slow_down, "sentence": self.sentence}


@torch.inference_mode()
def measure(
    model: Transformer, pieces: Sequence[Sequence[int]], probes: Sequence[Probe], rounds: int = 1
) -> Honesty:
    """Run `pieces` of one sequence through new caches, with and without `probes`, on the model's route.

    Each of `rounds` runs both ways, after one run that is not timed; the better time counts. Taps and
    counts of launches are put back afterwards. Costs 2 `rounds` + 1 runs.
    """
    before = [(site, site.tap, site.stamp.launches) for site in model.sites.values()]
    times: dict[bool, list[float]] = {False: [], True: []}
    changed: dict[str, None] = {}
    try:
        truth, _ = _run(model, pieces, None)
        for _ in range(rounds):
            for watched in (False, True):
                for probe in probes:
                    probe.reset()
                watch = Watch(probes) if watched else None
                results, seconds = _run(model, pieces, watch)
                times[watched].append(seconds)
                same = {name: bits_equal(results[name], tensor) for name, tensor in truth.items()}
                # Without probes too: a run that never repeats would be laid at the probes' door.
                who = "" if watched else " (without probes)"
                changed |= {f"{name}{who}": None for name, equal in same.items() if not equal}
    finally:
        for site, tap, launches in before:
            site.tap, site.stamp.launches = tap, launches
    assert watch is not None
    taken = {(reading.probe, reading.site) for reading in watch.readings}
    return Honesty(
        ops=_scheduled(model, pieces),
        observed=watch.observed,
        readings=len(watch.readings),
        sites={p.name: sum(name == p.name for name, _ in taken) for p in probes},
        sampled={f"{r.probe} {r.name}": r.sampled for r in watch.readings if r.sampled},
        seconds_without=min(times[False]),
        seconds_with=min(times[True]),
        changed=tuple(changed),
    )


def _scheduled(model: Transformer, pieces: Sequence[Sequence[int]]) -> int:
    """Ops of all passes, as the model plans them: not as the watcher counts them."""
    cache, total = model.new_cache(), 0
    for piece in pieces:
        step = cache.step([piece])
        total += len(model.schedule(step))
        cache.advance(step)
    return total


def _run(
    model: Transformer, pieces: Sequence[Sequence[int]], watch: Watch | None
) -> tuple[dict[str, Tensor], float]:
    """Logits of every pass and the caches after the last, by name; and seconds."""
    set_taps(model.sites.values(), watch)
    cache, results = model.new_cache(), {}
    _wait(model.device)
    started = time.perf_counter()
    for number, piece in enumerate(pieces):
        if watch is not None:
            watch.forward = number
        results[f"logits of pass {number}"] = model.forward(cache.step([piece]), cache)
        if watch is not None:
            watch.flush()
    _wait(model.device)
    seconds = time.perf_counter() - started
    for layer, layer_cache in enumerate(cache.layers):
        results |= {f"L{layer} {name}": t for name, t in layer_cache.tensors().items()}
    return results, seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
