"""Trials: the model with some sites on a route's kernels and the rest on the reference

A trial begins at the first layer that an earlier trial has not already run in the same way, from the
streams that entered it then (workbench/checking/layerwise.py). What it costs is known before it runs.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import RouteEntry, Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.tap import Observer
from dsv4_bench.workbench.checking import layerwise
from dsv4_bench.workbench.checking.calibration import tapped
from dsv4_bench.workbench.checking.layerwise import Streams

SNAPSHOT_BYTES = 1 << 30
Sites = frozenset[str]


class Timer:
    """A tap's observer that adds up the seconds of every site; `inner`, if given, sees the op first."""

    def __init__(self, inner: Observer | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = inner

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        inner = self.inner
        started = time.perf_counter()
        if inner is not None and inner.wants(site):
            result = inner.around(site, args)
        else:
            result = site.run(args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[site.path] += time.perf_counter() - started
        return result


class Snapshots:
    """Streams that entered a part, by what ran before it; the longest unused go first.

    Those of the reference are what most trials begin from: they stay, and may fill half of the room.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: OrderedDict[tuple[int, Sites], Streams] = OrderedDict()
        self._pinned: dict[int, Streams] = {}
        self._used = 0

    def keep(self, part: int, before: Sites, streams: Streams) -> None:
        size = sum(x.nbytes for x in streams)
        key = (part, before)
        if key in self._kept or (not before and part in self._pinned):
            return
        pin = not before and self._used + size <= self.room // 2
        while not pin and self._kept and self._used + size > self.room:
            _, dropped = self._kept.popitem(last=False)
            self._used -= sum(x.nbytes for x in dropped)
        if self._used + size > self.room:
            return
        # Copies, away from the device: a kernel that writes into its input must not change them.
        copies = [x.to("cpu", copy=True) for x in streams]
        if pin:
            self._pinned[part] = copies
        else:
            self._kept[key] = copies
        self._used += size

    def get(self, part: int, before: Sites) -> Streams | None:
        """The streams, not to be written to; None if they are not there."""
        if not before and part in self._pinned:
            return self._pinned[part]
        found = self._kept.get((part, before))
        if found is not None:
            self._kept.move_to_end((part, before))
        return found

    def has(self, part: int, before: Sites) -> bool:
        return (part, before) in self._kept or (not before and part in self._pinned)


class Trials:
    """Runs sets of sites of `route`; `sites` lists those where it differs from the reference."""

    def __init__(
        self,
        model: Transformer,
        route: Sequence[RouteEntry],
        steps: Sequence[Step],
        room: int = SNAPSHOT_BYTES,
    ) -> None:
        self.model = model
        self.steps = steps
        self.kernels = layerwise.chosen_by(model, route)
        self.references = layerwise.references(model)
        self.part = {path: layerwise.part_of(model, site) for path, site in model.sites.items()}
        self.sites = [p for p in model.sites if self.kernels[p] is not self.references[p]]
        self.snapshots = Snapshots(room)
        self.reuse = True  # off for kernels that carry state from one layer to the next
        self.reference_seconds: dict[str, float] = {}
        self.kernel_seconds: dict[str, float] = {}

    @property
    def parts(self) -> int:
        return len(self.model.layers) + 2

    def before(self, on: Sites, part: int) -> Sites:
        """Of the sites `on` kernels, those that run before `part`."""
        return frozenset(path for path in on if self.part[path] < part)

    def first_part(self, on: Sites) -> int:
        """The first part that runs one of the sites `on`."""
        return min(self.part[path] for path in on)

    def start(self, on: Sites) -> int:
        """The part from which a trial of `on` has to run."""
        if not self.reuse:
            return 0
        for part in range(self.parts - 1, 0, -1):
            if self.snapshots.has(part, self.before(on, part)):
                return part
        return 0

    def cost(self, on: Sites) -> float:
        """Seconds that a trial of `on` will take, from the measured seconds of every site."""
        first = self.start(on)
        times = (
            self.kernel_seconds.get(path, 0.0)
            if path in on
            else self.reference_seconds.get(path, 0.0)
            for path, part in self.part.items()
            if part >= first
        )
        return sum(times)

    def use(self, on: Sites) -> None:
        """Put the sites `on` their kernels, the rest on the reference."""
        chosen = {p: (self.kernels if p in on else self.references)[p] for p in self.model.sites}
        layerwise.use(self.model, chosen)

    def run(self, on: Sites, observer: Observer | None = None) -> Tensor:
        """Logits [tokens, v] of all calls with exactly the sites `on` on their kernels.

        `observer` sees the parts that run. The model is left on that route.
        """
        self.use(on)
        first = self.start(on)
        device = self.model.device
        streams: Streams = []
        if first:
            stored = self.snapshots.get(first, self.before(on, first))
            assert stored is not None
            streams = [x.to(device, copy=True) for x in stored]
        with tapped(self.model, observer):
            for part in range(first, self.parts):
                if self.reuse and part > first:
                    self.snapshots.keep(part, self.before(on, part), streams)
                streams = layerwise.run_part(self.model, part, streams, self.steps)
        return torch.cat(streams)

    @torch.inference_mode()
    def run_plainly(self, on: Sites, observer: Observer | None = None) -> Tensor:
        """The same without snapshots and in the usual order, all layers of a call before the next."""
        self.use(on)
        cache = self.model.new_cache(len(self.steps[0].starts))
        logits = []
        with tapped(self.model, observer):
            for step in self.steps:
                for layer in cache.layers:
                    layer.reserve(
                        max(a + b for a, b in zip(step.starts, step.lengths, strict=True))
                    )
                logits.append(self.model.forward(step, cache))
        return torch.cat(logits)
