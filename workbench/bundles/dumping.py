"""`dump`: capture chosen ops of a run into a bundle, with readings, errors and what watching cost

The run goes layer by layer, all forward passes through one layer before the next. Every layer runs
three times: unwatched (for time and bits), watched (readings, captures), and on the reference
(carried error). What a capture will need is estimated from shapes before anything runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site, select_sites
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.bundle import LeftOut, Writer, examine
from dsv4_bench.probes.bundle.estimate import Shapes, estimate
from dsv4_bench.probes.capture import Capture
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.layout import clone_tensors
from dsv4_bench.probes.limits import Limits
from dsv4_bench.probes.metrics import relative_error
from dsv4_bench.probes.observation import Watch
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.bundles.bundling import (
    DEFAULT_MAX_BYTES,
    REPORT_BYTES,
    RunFacts,
    Written,
    finish,
)
from dsv4_bench.workbench.checking import layerwise

Progress = Callable[[str, int, int], None]
Streams = list[Tensor]


@dataclass(frozen=True)
class Selection:
    """What to capture: layers (None: all, and what is outside of layers), a glob, forward passes."""

    layers: tuple[int, ...] | None = None
    sites: str | None = None
    forwards: tuple[int, ...] | None = None


@dataclass
class Plan:
    """What will be captured, as (forward, site), and what will not be.

    `bytes` is the estimate of everything that was asked for, `selected` how many sites that are.
    """

    chosen: set[tuple[int, str]] = field(default_factory=set)
    left_out: list[LeftOut] = field(default_factory=list)
    bytes: int = 0
    selected: int = 0


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """``3-5,8`` -> (3, 4, 5, 8). Raises DSV4Error for anything that is no layer."""
    layers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < count:
            raise DSV4Error(f"--layers {text!r}: no such layers", f"0 to {count - 1}, e.g. 3-5,8")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def select(model: Transformer, selection: Selection) -> list[Site]:
    """The sites a selection names, in the order they run. Raises DSV4Error if there are none."""
    sites = list(model.sites.values())
    if selection.sites is not None:
        sites = select_sites(sites, selection.sites)
    if selection.layers is not None:
        sites = [site for site in sites if site.layer in selection.layers]
    if not sites:
        layers = ", ".join(map(str, selection.layers or ()))
        raise DSV4Error(
            f"no site matches {selection.sites!r} in layers {layers}", "`check` lists the sites"
        )
    return sites


def plan(
    model: Transformer, steps: Sequence[Step], selection: Selection, max_bytes: int | None
) -> Plan:
    """Which ops will be captured, and how large all that was asked for would be.

    An op that cannot fit into `max_bytes` by itself is left out before anything runs. For the others
    the writer decides: those over their limit go first, then those that run first.
    """
    sites = select(model, selection)
    result = Plan(selected=len(sites))
    wanted = {site.path for site in sites}
    shapes, paid = Shapes(model.config, model.dtype), set[str]()
    cache = model.new_cache(len(steps[0].starts))
    for forward, step in enumerate(steps):
        ends = [start + length for start, length in zip(step.starts, step.lengths, strict=True)]
        for layer in cache.layers:
            layer.reserve(max(ends))
        if selection.forwards is not None and forward not in selection.forwards:
            continue
        for path in model.schedule(step):
            if path not in wanted:
                continue
            site = model.sites[path]
            layer_cache = None if site.layer is None else cache.layers[site.layer]
            size = estimate(site, step, layer_cache, shapes)
            result.bytes += size.call + (0 if path in paid else size.constants)
            paid.add(path)
            alone = size.call + size.constants
            if max_bytes is not None and alone > max_bytes:
                why = f"alone larger than the {max_bytes} bytes of the bundle"
                result.left_out.append(LeftOut(path, forward, alone, why))
                continue
            result.chosen.add((forward, path))
    return result


class Dumper:
    """Runs `tokens` in `chunks` on the model's route, and writes the bundle.

    `quick` leaves out the unwatched and the reference run: no slow-down, no carried error.
    """

    def __init__(
        self,
        model: Transformer,
        tokens: Sequence[int],
        chunks: Sequence[int],
        selection: Selection,
        probes: Sequence[Probe],
        max_bytes: int | None = DEFAULT_MAX_BYTES,
        quick: bool = False,
    ) -> None:
        self.model = model
        self.tokens = list(tokens)
        self.steps = layerwise.forward_calls(model, [self.tokens], [chunks])
        passes = selection.forwards or ()
        if any(not 0 <= number < len(self.steps) for number in passes):
            raise DSV4Error(
                f"--forward {','.join(map(str, passes))}: there are {len(self.steps)} forward passes",
                f"0 to {len(self.steps) - 1}; --chunks decides how many there are",
            )
        self.room = None if max_bytes is None else max_bytes - REPORT_BYTES
        if self.room is not None and self.room <= 0:
            raise DSV4Error(
                f"--max-size {max_bytes} bytes leaves no room beside the reports",
                f"they need {REPORT_BYTES} bytes",
            )
        self.plan = plan(model, self.steps, selection, self.room)
        self.limits = Limits(model.dtype)
        self.watch = Watch(probes)
        self.quick = quick
        self.carried: list[Reading] = []
        self.seconds = {"unwatched": 0.0, "watched": 0.0}
        self.bits_changed = False

    def run(self, target: Path, layout: str, progress: Progress) -> Written:
        """Capture and write. Raises DSV4Error; whatever happens, no half bundle is left."""
        with Writer(target, self.room) as writer:
            self._run_layers(writer, progress)
            observer = None
            if not self.quick:
                slower = self.seconds["watched"] / max(self.seconds["unwatched"], 1e-9)
                observer = {
                    "seconds": dict(self.seconds),
                    "slow_down": slower,
                    "bits_changed": self.bits_changed,
                }
            facts = RunFacts(
                self.tokens,
                [len(step.tokens) for step in self.steps],
                layout,
                observer=observer,
                selected=self.plan.selected,
                left_out=self.plan.left_out,
            )
            readings = [r.to_dict() for r in [*self.watch.readings, *self.carried]]
            progress("write", 1, 1)
            return finish(writer, self.model, facts, readings, self.limits)

    @torch.inference_mode()
    def _run_layers(self, writer: Writer, progress: Progress) -> None:
        model = self.model
        names = layerwise.part_names(model)
        streams: Streams = []
        right: Streams = []
        for part, name in enumerate(names):
            progress(f"dump {name}", part, len(names))
            plain = [] if self.quick else self._timed("unwatched", part, streams)
            streams = self._watched(part, streams, writer)
            for a, b in zip(plain, streams, strict=not self.quick):
                self.bits_changed |= not bits_equal(a, b)
            if not self.quick:
                right = self._reference(part, right)
                self._carry(part, streams, right)
        progress("dump", len(names), len(names))

    def _timed(self, kind: str, part: int, streams: Streams) -> Streams:
        started = time.perf_counter()
        result = layerwise.run_part(self.model, part, streams, self.steps)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[kind] += time.perf_counter() - started
        return result

    def _watched(self, part: int, streams: Streams, writer: Writer) -> Streams:
        """One part on the route, with probes, and with captures that go into the bundle at once."""
        watcher = _Watcher(self.watch, self.plan, self._first_site(part), self.limits, writer)
        set_taps(self.model.sites.values(), watcher)
        try:
            return self._timed("watched", part, streams)
        finally:
            set_taps(self.model.sites.values(), None)
            self.watch.flush()
            self.seconds["watched"] -= watcher.seconds

    def _first_site(self, part: int) -> str:
        count = len(self.model.layers)
        return (
            "embed"
            if part == 0
            else f"L{part - 1}/attn/hc_pre"
            if part <= count
            else "head/hc_head"
        )

    def _reference(self, part: int, right: Streams) -> Streams:
        """The same part on the reference; the route and its stamps are back afterwards."""
        with layerwise.kept_route(self.model):
            layerwise.use(self.model, layerwise.references(self.model))
            return layerwise.run_part(self.model, part, right, self.steps)

    def _carry(self, part: int, streams: Streams, right: Streams) -> None:
        """How far what leaves this part has moved from the reference's own run."""
        layers = len(self.model.layers)
        path = (
            "embed" if part == 0 else "head/logits" if part > layers else f"L{part - 1}/ffn/hc_post"
        )
        layer = part - 1 if 0 < part <= layers else None
        for forward, (x, truth) in enumerate(zip(streams, right, strict=True)):
            error = relative_error(x, truth)
            self.carried.append(
                Reading(
                    path,
                    "dump",
                    "carried_error",
                    error,
                    "relative L2",
                    layer=layer,
                    forward=forward,
                )
            )


class _Watcher:
    """A tap's observer of one part: probes on every site they want, captures of the planned ops.

    The part's first site tells the forward passes apart. `seconds` went into examining and writing.
    """

    def __init__(
        self, watch: Watch, plan: Plan, first: str, limits: Limits, writer: Writer
    ) -> None:
        self.watch = watch
        self.chosen = plan.chosen
        self.sites = {path for _, path in plan.chosen}
        self.first = first
        self.limits = limits
        self.writer = writer
        self.forward = -1
        self.seconds = 0.0
        self._capture = Capture()

    def wants(self, site: Site) -> bool:
        return site.path == self.first or site.path in self.sites or self.watch.wants(site)

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        self.forward += site.path == self.first
        self.watch.forward = self.forward
        wanted = self.watch.wants(site)
        if (self.forward, site.path) not in self.chosen:
            return self.watch.around(site, args) if wanted else site.run(args)
        result = self._capture.around(site, args)
        captured = self._capture.calls.pop()
        captured.outputs = clone_tensors(captured.outputs)  # a kernel may use its buffers again
        if wanted:
            call = Call(site, captured.inputs, {}, self.forward, captured.before)
            call.ran(captured.outputs)
            self.watch.readings += self.watch.observation.look(call)
        started = time.perf_counter()
        self.writer.add_call(examine(captured, self.forward, self.limits))
        self.seconds += time.perf_counter() - started
        return result
