"""The debugger: runs the model op by op in the worker's engine thread, and stops where it is told.

It is the tap's observer. After an op has run, `around` asks the probes, then the goal and the
breakpoints; to stop it calls `talk`, which handles commands until one of them says to go on. So a
stop *is* a call stack inside the forward pass, with the op's inputs and outputs in hand. Going back
raises `Rewind` through that stack and restarts from a layer's snapshot.
"""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.generate import split
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation, Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.compare import Comparison, bits_equal
from dsv4_bench.probes.observation import Observation
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.signatures import Signature
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench import goals
from dsv4_bench.workbench.breakpoints import Breakpoint
from dsv4_bench.workbench.shadow import Shadow
from dsv4_bench.workbench.snapshots import LayerSnapshot, Resume, SnapshotStore, take

Emit = Callable[[dict[str, Any]], None]

# What an alarm is about, worst first: the op raised, its own error is over the limit, it has NaN or
# infinities, a probe saw a promise broken.
ANOMALIES = ("failed", "over", "nonfinite", "broken")


class Rewind(Exception):
    """Leave the forward pass; it starts again at `layer`'s snapshot.

    -1 is embed, the number of layers is the head.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer


class Restart(Exception):
    """Leave the forward pass and begin again at the first token."""


class Paused(Exception):
    """A reference run was paused before it had caught up; the text says where."""


class Quit(BaseException):
    """Leave the forward pass for good."""


@dataclass(frozen=True)
class Plan:
    """What a session feeds: prompt ids in chunks, then greedy tokens.

    `chunks` are piece sizes, the last one repeats; empty means one prefill.
    """

    tokens: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    max_new_tokens: int = 0

    def spans(self) -> list[tuple[int, int]]:
        """The token range [start, stop) of every forward pass; generated tokens go one by one."""
        count = len(self.tokens)
        new = range(count, count + self.max_new_tokens - 1)
        return split(count, self.chunks) + [(position, position + 1) for position in new]


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
    signature: Signature | None = None  # of an own error over its limit
    carried_error: float | None = None
    alarm: str = ""
    anomaly: str = ""  # the worst of ANOMALIES that was read here


@dataclass
class Held:
    """The op the session stands at."""

    call: Call
    args: tuple[Any, ...]
    result: Any = None
    others: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by implementation
    effect: str = ""
    resolved: bool = (
        False  # it had failed, and a route switch has run it while the session stood here
    )


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
        self._complained: set[str] = set()  # probes whose exception was logged
        self.spans = plan.spans()
        self.shadow = Shadow(model, self.spans, self._timed, self._between_reference_layers)
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
        self.step: Step | None = None  # over `span`
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
        self._fresh_readings: list[Reading] = []
        self.ran = 0  # ops since the last stop
        self.shadow.reference.clear()
        for probe in self.probes:
            probe.reset()

    def resume(self, resume: Resume) -> None:
        """Go on where a worker before this one had started a layer; the cache is restored."""
        self.tokens = resume.tokens
        self.forward, self.span, self.layer = resume.forward, resume.span, resume.layer
        self.snapshots = {resume.layer: take(resume.x, self.cache, resume.layer)}
        self._plan_forward()
        self.index = self._first_of(resume.layer) - 1
        for path in self.order[: self.index + 1]:
            self.records[path].state = "done"
        where = f"layer {resume.layer}" if resume.layer < len(self.model.layers) else "the head"
        self.state, self.why = "stopped", f"resumed before {where}"
        for reading in self.store.load_readings():
            self._keep(reading)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.plan.tokens) :]

    @property
    def site(self) -> str | None:
        """The op that ran last."""
        return self.order[self.index] if 0 <= self.index < len(self.order) else None

    def forwards(self) -> int:
        """Forward passes in the whole plan."""
        return len(self.spans)

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
                self.store.clear()
            except Quit:
                return
            except BrokenPipeError:
                raise
            except Exception as error:  # an output that does not fit the code between two ops
                self._give_up_layer(error)

    def _give_up_layer(self, error: Exception) -> None:
        """Stand before the layer that could not be finished; another route may get through it."""
        traceback.print_exc()
        why = f"after {self.site}: {type(error).__name__}: {_first_line(error)}"
        if self.site is not None:
            self.records[self.site].alarm = _first_line(error)
            self._restore(self.layer)
        self.goal, self.state, self.why = None, "failed", why

    def _run_plan(self) -> None:
        if self.goal is None:
            self.talk()
        for number, span in enumerate(self.spans):
            if number < self.forward or (number == self.forward and self.complete):
                continue
            start = span[0]
            if start >= len(self.plan.tokens) and self.tokens[start] == self._end_token:
                break
            self._run_forward(number, span)

    @property
    def _end_token(self) -> int:
        return self.model.config.eos_token_id

    def _plan_forward(self) -> Step:
        """The step over `span`, and the order of its ops."""
        step = self.step = self.cache.step([self.tokens[self.span[0] : self.span[1]]])
        self.order = self.model.schedule(step)
        self._at = {path: i for i, path in enumerate(self.order)}
        return step

    def _begin(self, number: int, span: tuple[int, int]) -> Step:
        if self.span != span or not self.order:
            self.records = {path: Record() for path in self.model.sites}
        self.forward, self.span, self.complete = number, span, False
        self.state = "running"
        return self._plan_forward()

    def _run_forward(self, number: int, span: tuple[int, int]) -> None:
        step, layers = self._begin(number, span), self.model.layers
        if self.layer >= 0:
            x = self.snapshots[self.layer].x
        else:
            self.snapshots = {}
            x = self.model.embed(step.tokens)
        for layer in range(max(self.layer, 0), len(layers)):
            self._before_layer(layer, x)
            x = layers[layer](x, self.cache.layers[layer], step)
            self.store.save_layer_cache(layer, self.cache.layers[layer].tensors())
        self._before_layer(len(layers), x)
        self.logits = self.model.head(self.model.last_rows(x, step))
        self.cache.advance(step)
        self.layer, self.complete = -1, True
        if span[1] >= len(self.plan.tokens) and len(self.generated) < self.plan.max_new_tokens:
            self.tokens.append(int(self.logits[-1].argmax()))

    def _before_layer(self, layer: int, x: Tensor) -> None:
        self.layer = layer
        self.snapshots[layer] = take(x, self.cache, layer)
        self.store.save_position(layer, self.forward, self.span, self.tokens, x)
        self.store.append_readings(self._fresh_readings)
        self._fresh_readings = []

    def _restore(self, layer: int) -> None:
        """Undo this forward pass down to `layer`: caches in memory and on disk, position, tokens."""
        for index in [i for i in self.snapshots if i >= layer]:
            cache = self.snapshots[index].cache
            if cache:
                self.cache.layers[index].restore(cache)
                self.store.save_layer_cache(index, cache)
            if index > layer:
                del self.snapshots[index]
        self.cache.lengths = [self.span[0]]
        self.tokens = self.tokens[: max(self.span[1], len(self.plan.tokens))]
        self.layer, self.complete, self.held = layer, False, None
        first = self._first_of(layer)
        self.index = first - 1
        for path in self.order[first:]:
            self.records[path].state = "pending"

    def _first_of(self, layer: int) -> int:
        """Index in `order` of the first op of `layer` (-1: of the forward pass)."""
        if layer < 0:
            return 0
        group = f"L{layer}/" if layer < len(self.model.layers) else "head/"
        return next(i for i, path in enumerate(self.order) if path.startswith(group))

    def sites_of(self, layer: int) -> list[Site]:
        """The sites of a layer; -1 is embed, the number of layers the head."""
        group = f"L{layer}/" if layer < len(self.model.layers) else "head/"
        group = "embed" if layer < 0 else group
        return [site for path, site in self.model.sites.items() if path.startswith(group)]

    def layer_at(self, index: int) -> int:
        """The layer that op `index` of `order` belongs to, as `Rewind` counts them."""
        site = self.model.sites[self.order[index]]
        if site.layer is not None:
            return site.layer
        return -1 if site.path == "embed" else len(self.model.layers)

    # -- one op

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        """Run one op, observe it, and stop there if the goal or a breakpoint says so."""
        self.index = self._at[site.path]
        self.ran += 1
        self.emit({"event": "enter", "site": site.path, "route": site.stamp.implementation})
        held = self._run_op(site, args)
        if not held.resolved:
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
        held = Held(call, args)
        while not held.resolved:
            try:
                self.execute(held)
                break
            except (Exception, SystemExit) as error:  # whatever a kernel raises
                self.put_back(call)
                record = self.records[site.path]
                record.alarm, record.anomaly = _first_line(error), "failed"
                self._emit_site(site)
                what = f"{site.path} ({site.stamp.implementation}) raised"
                self.stop(f"{what} {type(error).__name__}: {_first_line(error)}", held, "failed")
        return held

    def execute(self, held: Held) -> None:
        """Run the op of `held` on its present route and keep outputs and time.

        Raises what the op raises, and TypeError if it does not return what its contract says.
        """
        site, call = held.call.site, held.call
        assert self.step is not None
        nvtx.begin(self.step)  # a reference run may have been elsewhere meanwhile
        seconds, result = self._timed(lambda: site.run(held.args))
        outputs = _named_outputs(site, result)
        held.result = result
        call.ran(outputs | {name: call.inputs[name] for name in site.spec.mutates})
        self.records[site.path].seconds[site.stamp.implementation] = seconds

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
        """Run the held op again, after a route change; its new outputs are what flows on.

        If it raises, the op stands as it stood before.
        """
        held = self.held
        assert held is not None
        call, outputs, result = held.call, held.call.outputs, held.result
        written = {name: call.inputs[name].clone() for name in call.before}
        self.put_back(call)
        self.tell_running(call.site, call.site.impl)
        try:
            self.execute(held)
        except (Exception, SystemExit):
            for name, tensor in written.items():
                call.inputs[name].copy_(tensor)
            call.ran(outputs)
            held.result = result
            self._emit_site(call.site)
            raise
        old = outputs | {name: written[name] for name in written if name in outputs}
        same = bool(old) and all(
            name in call.outputs and bits_equal(call.outputs[name], tensor)
            for name, tensor in old.items()
        )
        held.effect = "NO EFFECT: same output bits" if same else ""
        held.resolved = held.resolved or self.state == "failed"
        self.look_again()
        self.state = "stopped"

    def look_again(self) -> None:
        """Observe the held op once more: its route, the probes or the shadow have changed."""
        if self.held is not None and self.held.call.outputs:
            site = self.held.call.site
            self.observe(self.held)
            self.records[site.path].state = "current"
            self._emit_site(site)

    # -- looking

    def observe(self, held: Held) -> list[Reading]:
        """Readings of every probe and the shadow, kept and judged."""
        call, path = held.call, held.call.site.path
        record = self.records[path]
        observation = Observation(self.probes, self._complain)
        readings = observation.look(call) + observation.flush()
        record.own_error = record.signature = record.carried_error = None
        if self.shadow.covers(path):
            readings += self._shadow_readings(held)
        if self.shadow.carried:
            readings += self._carried_readings(call)
        alarms = [r for r in readings if r.verdict == "alarm"]
        record.alarm = "; ".join(dict.fromkeys(_alarm_text(r, record) for r in alarms[:2]))
        kinds = {_anomaly(reading) for reading in alarms}
        record.anomaly = next((kind for kind in ANOMALIES if kind in kinds), "")
        record.state = "done"
        for reading in readings:
            self._keep(reading)
        self._fresh_readings += readings
        return readings

    def _complain(self, probe: Probe, call: Call, text: str) -> None:
        """Say once in the log that a probe raises; its alarm stands at every site."""
        if probe.name not in self._complained:
            self._complained.add(probe.name)
            note = f"probe {probe.name} raised {text} at {call.site.path}\n"
            self.emit({"event": "log", "stream": "worker", "text": note})

    def _shadow_readings(self, held: Held) -> list[Reading]:
        call, site = held.call, held.call.site
        other = self.shadow.other(site)
        if other is None:
            return []
        self.tell_running(site, other, shadow=True)
        record = self.records[site.path]
        try:
            record.seconds[other.name], outputs = self.shadow.rerun(call, held.args, other)
            held.others[other.name] = outputs
            positions = torch.arange(*self.span, device=self.model.device)
            found = self.shadow.judged(call, held.args, outputs, positions)
        except (Exception, SystemExit) as raised:
            text = f"{other.name} raised {type(raised).__name__}: {_first_line(raised)}"
            return [call.reading("shadow", "error", text, verdict="alarm", detail=text)]
        if found is None:
            return []
        record.own_error, record.signature = found.comparison, found.signature
        return [self._own_error_reading(call, found.comparison, found.signature)]

    @staticmethod
    def _own_error_reading(call: Call, error: Comparison, signature: Signature | None) -> Reading:
        detail = f"{error.output}{error.coordinate}: {error.ours:.6g}, "
        detail += f"{error.against} {error.theirs:.6g}"
        if signature is not None:
            detail += f"; {signature.detail}"
        verdict = "ok" if error.verdict == "ok" else "alarm"
        value, limit = error.worst
        return call.reading("shadow", "own_error", value, "relative L2", limit, verdict, detail)

    def _carried_readings(self, call: Call) -> list[Reading]:
        """How far the outputs are from those of a whole run on the reference."""
        layer = self.layer_at(self.index)
        try:
            self.shadow.reference.hold(self.forward, layer, self.tokens)
        except Paused as paused:
            self.shadow.carried = False
            note = f"carried error is off: paused {paused}; `carried on` goes on from there\n"
            self.emit({"event": "log", "stream": "worker", "text": note})
            return []
        error = self.shadow.reference.error(call.site, call.outputs)
        self.records[call.site.path].carried_error = error
        if error is None:
            return []
        return [call.reading("shadow", "carried_error", error, "relative L2")]

    def _between_reference_layers(self, forward: int, layer: int) -> None:
        """Say what runs, and let `pause` end a reference run that has far to go."""
        where = f"in layer {layer} of forward pass {forward + 1} of the reference run"
        if self.pause:
            raise Paused(where)
        site = self.order[self._first_of(layer)]
        self.emit({"event": "running", "site": site, "route": "reference", "shadow": True})

    def _keep(self, reading: Reading) -> None:
        self.readings[(reading.site, reading.probe, reading.name, reading.output)] = reading

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
        record = self.records[site.path]
        if record.anomaly and isinstance(self.goal, goals.Anomaly):
            why = why or f"anomaly: {record.alarm}"
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
        self.goal = None
        self.on_stop()
        self.ran = 0
        while self.goal is None:
            request = self.requests.get()
            if request is None:
                raise Quit
            self.handle(request)

    def tell_running(self, site: Site, impl: Implementation, shadow: bool = False) -> None:
        """What runs outside the usual order, for the client to name if the worker dies of it."""
        event = {"event": "running", "site": site.path, "route": impl.name, "shadow": shadow}
        self.emit(event)

    def _emit_site(self, site: Site) -> None:
        record = self.records[site.path]
        error = record.own_error
        self.emit(
            {
                "event": "site",
                "site": site.path,
                "seconds": record.seconds.get(site.stamp.implementation),
                "alarm": record.alarm,
                "anomaly": record.anomaly,
                "own_error": None if error is None else error.relative_l2,
                "times": None if error is None else error.times,
                "carried_error": record.carried_error,
                "route": site.stamp.implementation,
            }
        )


def _named_outputs(site: Site, result: Any) -> dict[str, Tensor]:
    """Outputs by name. Raises TypeError if there are not as many tensors as the contract says."""
    spec = site.spec
    values = result if isinstance(result, tuple) else () if result is None else (result,)
    if len(values) != len(spec.outputs) or not all(isinstance(v, Tensor | None) for v in values):
        found = ", ".join(type(v).__name__ for v in values) or "None"
        wanted = ", ".join(spec.outputs) or "None"
        raise TypeError(f"{site.op} returned ({found}), its contract says ({wanted})")
    return spec.name_outputs(result)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _anomaly(reading: Reading) -> str:
    if reading.probe == "shadow":
        return "over" if reading.name == "own_error" else "failed"
    return "nonfinite" if reading.name in ("nan", "inf", "first_nonfinite") else "broken"


def _alarm_text(reading: Reading, record: Record) -> str:
    if reading.name == "own_error" and record.signature and isinstance(reading.value, float):
        return f"{record.signature.kind}, own error {reading.value:.3g}"
    if reading.name in ("nan", "inf"):
        return f"{reading.value} {'NaN' if reading.name == 'nan' else 'Inf'} in {reading.output}"
    if isinstance(reading.value, (int, float)):
        return f"{reading.name} {reading.value:.3g}"
    return f"{reading.name}: {reading.detail}"
