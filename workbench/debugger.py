"""The debugger: runs the model op by op in the worker's engine thread, and stops where it is told.

It is the tap's observer. After an op has run, `around` asks the probes, then the goal and the
breakpoints; to stop it calls `talk`, which handles commands until one of them says to go on. So a
stop *is* a call stack inside the forward pass, with the op's inputs and outputs in hand. Going back
raises `Rewind` through that stack and restarts from a layer's snapshot.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation, Site, choose, matches
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.compare import Comparison, compare, limit_for
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench import goals
from dsv4_bench.workbench.breakpoints import Breakpoint
from dsv4_bench.workbench.snapshots import LayerSnapshot, Resume, SnapshotStore, take

Emit = Callable[[dict[str, Any]], None]


class Rewind(Exception):
    """Leave the forward pass; it starts again at `layer`'s snapshot (-1: at embed)."""

    def __init__(self, layer: int) -> None:
        self.layer = layer


class Restart(Exception):
    """Leave the forward pass and begin again at the first token."""


class Quit(Exception):
    """Leave the forward pass for good."""


@dataclass(frozen=True)
class Plan:
    """What a session feeds: prompt ids in chunks, then greedy tokens.

    `chunks` are piece sizes, the last one repeats; empty means one prefill.
    """

    tokens: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    max_new_tokens: int = 0


@dataclass
class Request:
    """One command from the client."""

    id: int
    name: str
    arguments: dict[str, Any]


@dataclass
class Record:
    """What is known of a site in the present forward pass."""

    state: str = "pending"
    seconds: dict[str, float] = field(default_factory=dict)  # by implementation
    own_error: Comparison | None = None
    alarm: str = ""


@dataclass
class Held:
    """The op the session stands at."""

    call: Call
    args: tuple[Any, ...]
    result: Any
    effect: str = ""


class Debugger:
    """One session's engine side. `emit` sends an event; `handle(request)` is set by the worker."""

    def __init__(self, model: Transformer, plan: Plan, emit: Emit, store: SnapshotStore) -> None:
        self.model = model
        self.plan = plan
        self.emit = emit
        self.store = store
        self.requests: queue.Queue[Request | None] = queue.Queue()
        self.handle: Callable[[Request], None] = lambda request: None
        self.on_stop: Callable[[], None] = lambda: None
        self.pause = False
        self.goal: goals.Goal | None = None
        self.breaks: list[Breakpoint] = []
        self.probes: list[Probe] = []
        self.shadow = ""  # site glob, empty for off
        self._resume: Resume | None = None
        self.clear()
        set_taps(model.sites.values(), self)

    # -- position

    def clear(self) -> None:
        """Back to the first token with an empty cache."""
        self.cache = self.model.new_cache()
        self.tokens = list(self.plan.tokens)
        self.forward = 0  # the pass that runs, or ran last
        self.complete = False  # whether it ran to its end
        self.span = (0, 0)
        self.layer = -1
        self.index = -1
        self.order: list[str] = []
        self.held: Held | None = None
        self.logits: Tensor | None = None
        self.state = "ready"
        self.why = "ready"
        self.snapshots: dict[int, LayerSnapshot] = {}
        self.records = {path: Record() for path in self.model.sites}
        self.readings: dict[tuple[str, ...], Reading] = {}
        self._fresh_readings: list[dict[str, Any]] = []
        for probe in self.probes:
            probe.reset()

    def resume(self, resume: Resume) -> None:
        """Go on where a worker before this one had started a layer; the cache is restored."""
        self.tokens = resume.tokens
        self.forward, self.span, self.layer = resume.forward, resume.span, resume.layer
        self._resume = resume
        self.state, self.why = "stopped", f"resumed before layer {resume.layer}"
        for row in self.store.load_readings():
            self._keep(Reading(**row))

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.plan.tokens) :]

    @property
    def site(self) -> str | None:
        """The op that ran last."""
        return self.order[self.index] if 0 <= self.index < len(self.order) else None

    def spans(self) -> Iterator[tuple[int, int]]:
        """Token ranges still to be fed, prompt chunks first, then one generated token each."""
        sizes = list(self.plan.chunks) or [len(self.plan.tokens)]
        start = number = 0
        while start < len(self.plan.tokens):
            size = sizes[min(number, len(sizes) - 1)]
            yield start, min(start + size, len(self.plan.tokens))
            start, number = start + size, number + 1
        for extra in range(self.plan.max_new_tokens - 1):
            yield len(self.plan.tokens) + extra, len(self.plan.tokens) + extra + 1

    def forwards(self) -> int:
        """Forward passes in the whole plan."""
        return sum(1 for _ in self.spans())

    # -- running

    @torch.inference_mode()
    def run(self) -> None:
        """Serve the session until it is told to quit."""
        while True:
            try:
                self._run_plan()
                self.state, self.why = "finished", "finished"
                self.talk()
            except Rewind as rewind:
                self._restore(rewind.layer)
            except Restart:
                self.clear()
            except Quit:
                return

    def _run_plan(self) -> None:
        if self.goal is None:
            self.talk()
        for number, span in enumerate(self.spans()):
            if number < self.forward or (number == self.forward and self.complete):
                continue
            if span[0] and len(self.tokens) <= span[0]:
                self.tokens.append(self._next_token())
                if self.tokens[-1] == self.model.config.eos_token_id:
                    break
            self._run_forward(number, span)

    def _next_token(self) -> int:
        assert self.logits is not None
        return int(self.logits[-1].argmax())

    def _begin(self, number: int, span: tuple[int, int]) -> Step:
        step = self.cache.step([self.tokens[span[0] : span[1]]])
        if self.span != span or not self.order:
            self.records = {path: Record() for path in self.model.sites}
        self.forward, self.span, self.complete = number, span, False
        self.order = self.model.schedule(step)
        self._at = {path: i for i, path in enumerate(self.order)}
        self.state = "running"
        return step

    def _run_forward(self, number: int, span: tuple[int, int]) -> None:
        step = self._begin(number, span)
        start = max(self.layer, 0)
        if self._resume is not None:
            x, self._resume = self._resume.x, None
        elif self.layer >= 0:
            x = self.snapshots[self.layer].x
        else:
            self.snapshots = {}
            x = self.model.embed(step.tokens)
        for layer in range(start, len(self.model.layers)):
            self._before_layer(layer, x)
            x = self.model.layers[layer](x, self.cache.layers[layer], step)
            self.store.save_layer_cache(layer, self.cache.layers[layer].tensors())
        self.layer = len(self.model.layers)
        self.logits = self.model.head(self.model.last_rows(x, step))
        self.cache.advance(step)
        self.layer, self.complete = -1, True

    def _before_layer(self, layer: int, x: Tensor) -> None:
        self.layer = layer
        self.snapshots[layer] = take(x, self.cache, layer)
        self.store.save_layer_input(layer, self.forward, self.span, self.tokens, x)
        self.store.append_readings(self._fresh_readings)
        self._fresh_readings = []

    def _restore(self, layer: int) -> None:
        """Undo this forward pass down to `layer`: caches in memory and on disk, position."""
        for index, snapshot in self.snapshots.items():
            if index >= layer:
                self.cache.layers[index].restore(snapshot.cache)
                self.store.save_layer_cache(index, snapshot.cache)
        self.cache.lengths = [self.span[0]]
        self.layer, self.complete = layer, False
        self.held = None
        first = self._at_layer(layer)
        self.index = first - 1
        for path in self.order[first:]:
            self.records[path].state = "pending"

    def _at_layer(self, layer: int) -> int:
        """Index in `order` of the first op of `layer` (-1: of the forward pass)."""
        if layer < 0:
            return 0
        return next(i for i, path in enumerate(self.order) if path.startswith(f"L{layer}/"))

    # -- one op

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        """Run one op, observe it, and stop there if the goal or a breakpoint says so."""
        self.index = self._at[site.path]
        self.emit({"event": "enter", "site": site.path})
        held = self._run_op(site, args)
        readings = self.observe(held)
        why = self._why_stop(site, readings)
        self._emit_site(site)
        if why:
            self.stop(why, held)
        return held.result

    def _run_op(self, site: Site, args: tuple[Any, ...]) -> Held:
        """Execute on the route; an exception of the op stops there and can be retried."""
        call = Call(site, site.spec.bind(args, site.params), {}, self.forward)
        for name in site.spec.mutates:
            call.before[name] = call.inputs[name].clone()
        held = Held(call, args, None)
        while True:
            try:
                self.execute(held)
                return held
            except Exception as error:  # whatever a kernel raises: try another route
                self.put_back(call)
                self.records[site.path].alarm = str(error).splitlines()[0][:200]
                self.state = "failed"
                self._emit_site(site)
                text = f"{type(error).__name__}: {error}"
                self.stop(
                    f"{site.path} ({site.stamp.implementation}) raised {text}", held, "failed"
                )
                if call.outputs:  # a route switch has run it meanwhile
                    return held

    def execute(self, held: Held) -> None:
        """Run the op of `held` on its present route and keep outputs and time."""
        site, call = held.call.site, held.call
        seconds, held.result = self._timed(lambda: site.run(held.args))
        call.outputs = site.spec.name_outputs(held.result)
        call.outputs.update({name: call.inputs[name] for name in site.spec.mutates})
        record = self.records[site.path]
        record.seconds[site.stamp.implementation] = seconds

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = run()
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, result

    def put_back(self, call: Call) -> None:
        """Undo in-place writes, so that the op can run again on its own inputs."""
        for name, tensor in call.before.items():
            call.inputs[name].copy_(tensor)

    def rerun_held(self) -> None:
        """Run the held op again, after a route change; its new outputs are what flows on."""
        held = self.held
        assert held is not None
        call, old = held.call, held.call.outputs
        old = {name: t.clone() if name in call.before else t for name, t in old.items()}
        self.put_back(call)
        self.execute(held)
        same = bool(old) and all(compare(n, call.outputs[n], old[n], 0).bits_equal for n in old)
        held.effect = "NO EFFECT: same output bits" if same else ""
        self.observe(held)
        self.state = "stopped"
        self._emit_site(call.site)

    # -- looking

    def observe(self, held: Held) -> list[Reading]:
        call, path = held.call, held.call.site.path
        record = self.records[path]
        readings = [r for p in self.probes if p.wants(call.site) for r in p.observe(call)]
        record.own_error = None
        if self.shadow and matches(path, self.shadow):
            record.own_error = self.shadow_error(held)
            if record.own_error is not None:
                readings.append(self._own_error_reading(call, record.own_error))
        alarms = [r for r in readings if r.verdict == "alarm"]
        record.alarm = "; ".join(dict.fromkeys(_alarm_text(r) for r in alarms[:2]))
        record.state = "done"
        for reading in readings:
            self._keep(reading)
            self._fresh_readings.append(reading.to_dict())
        return readings

    def _keep(self, reading: Reading) -> None:
        self.readings[(reading.site, reading.probe, reading.name, reading.output)] = reading

    @staticmethod
    def _own_error_reading(call: Call, error: Comparison) -> Reading:
        verdict = "ok" if error.verdict == "ok" else "alarm"
        return call.reading(
            "shadow", "own_error", error.relative_l2, "relative L2", error.limit, verdict,
            f"{error.output}{error.coordinate}: {error.ours:.6g}, reference {error.theirs:.6g}",
        )  # fmt: skip

    def other_implementation(self, site: Site) -> Implementation | None:
        """What the shadow compares with: the reference, or if that runs, the best kernel."""
        name = "kernel" if site.stamp.implementation == "reference" else "reference"
        impl, _ = choose(site.op, name, self.model.context)
        return None if impl.name == site.stamp.implementation else impl

    def shadow_error(self, held: Held) -> Comparison | None:
        """Run the other route on the same inputs; the worst output's comparison, or None."""
        call, site = held.call, held.call.site
        other = self.other_implementation(site)
        if other is None:
            return None
        inputs = {**call.inputs, **{name: t.clone() for name, t in call.before.items()}}
        args = tuple(inputs[name] for name in site.spec.parameters[: len(held.args)])
        seconds, result = self._timed(lambda: other.function(*args, **site.params))
        self.records[site.path].seconds[other.name] = seconds
        outputs = site.spec.name_outputs(result)
        outputs.update({name: inputs[name] for name in call.before})
        ours, theirs = call.outputs, outputs
        if site.stamp.implementation == "reference":
            ours, theirs = theirs, ours
        limit = limit_for(self.model.dtype)
        found = [
            compare(name, ours[name], theirs[name], limit, name in site.spec.discrete)
            for name in theirs
        ]
        return max(found, key=lambda c: (c.verdict == "over", c.relative_l2), default=None)

    # -- stopping

    def _why_stop(self, site: Site, readings: list[Reading]) -> str | None:
        assert self.goal is not None
        why = self.goal.reached(self.order, self.index)
        if not self.goal.exact:
            for point in self.breaks:
                hit = point.hit(site.path, readings)
                if hit:
                    point.hits += 1
                    why = hit
                    break
        if self.pause:
            why = why or "pause"
        return why

    def stop(self, why: str, held: Held, state: str = "stopped") -> None:
        """Stand at `held` and handle commands until one says to go on."""
        self.state, self.why, self.held = state, why, held
        self.records[held.call.site.path].state = "current"
        self.talk()
        self.records[held.call.site.path].state = "done"
        self.state, self.held = "running", None

    def talk(self) -> None:
        """Handle commands until a goal is set. Rewind and Quit pass through."""
        self.goal, self.pause = None, False
        self.on_stop()
        while self.goal is None:
            request = self.requests.get()
            if request is None:
                raise Quit
            self.handle(request)

    def _emit_site(self, site: Site) -> None:
        record = self.records[site.path]
        error = record.own_error
        self.emit(
            {
                "event": "site",
                "site": site.path,
                "seconds": record.seconds.get(site.stamp.implementation),
                "alarm": record.alarm,
                "own_error": None if error is None else error.relative_l2,
                "route": site.stamp.implementation,
            }
        )


def _alarm_text(reading: Reading) -> str:
    if reading.name in ("nan", "inf"):
        return f"{reading.value} {'NaN' if reading.name == 'nan' else 'Inf'} in {reading.output}"
    if isinstance(reading.value, (int, float)):
        return f"{reading.name} {reading.value:.3g}"
    return f"{reading.name}: {reading.detail}"
