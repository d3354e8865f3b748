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
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench import goals
from dsv4_bench.workbench.asking import Plan, Quit, Request, Restart, Rewind
from dsv4_bench.workbench.breakpoints import Breakpoint
from dsv4_bench.workbench.looking import Emit, Looking
from dsv4_bench.workbench.records import Held, Record, first_line, named_outputs
from dsv4_bench.workbench.shadow import Shadow
from dsv4_bench.workbench.snapshots import LayerSnapshot, Resume, SnapshotStore, take


class Debugger(Looking):
    """One session's engine side. `emit` sends an event; `handle(request)` is set by the worker."""

    def __init__(self, model: Transformer, plan: Plan, emit: Emit, store: SnapshotStore) -> None:
        super().__init__()
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
        self.index = self.first_of(resume.layer) - 1
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
        why = f"after {self.site}: {type(error).__name__}: {first_line(error)}"
        if self.site is not None:
            self.records[self.site].alarm = first_line(error)
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
        first = self.first_of(layer)
        self.index = first - 1
        for path in self.order[first:]:
            self.records[path].state = "pending"

    def sites_of(self, layer: int) -> list[Site]:
        """The sites of a layer; -1 is embed, the number of layers the head."""
        group = f"L{layer}/" if layer < len(self.model.layers) else "head/"
        group = "embed" if layer < 0 else group
        return [site for path, site in self.model.sites.items() if path.startswith(group)]

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
                record.alarm, record.anomaly = first_line(error), "failed"
                self._emit_site(site)
                what = f"{site.path} ({site.stamp.implementation}) raised"
                self.stop(f"{what} {type(error).__name__}: {first_line(error)}", held, "failed")
        return held

    def execute(self, held: Held) -> None:
        """Run the op of `held` on its present route and keep outputs and time.

        Raises what the op raises, and TypeError if it does not return what its contract says.
        """
        site, call = held.call.site, held.call
        assert self.step is not None
        nvtx.begin(self.step)  # a reference run may have been elsewhere meanwhile
        seconds, result = self._timed(lambda: site.run(held.args))
        outputs = named_outputs(site, result)
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
