"""Looking at the op that has just run: probes, the shadow on the other route, the run on the reference"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation, Site
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.compare import Comparison
from dsv4_bench.probes.observation import Observation
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.signatures import Signature
from dsv4_bench.workbench.asking import Paused
from dsv4_bench.workbench.records import ANOMALIES, Held, Record, first_line
from dsv4_bench.workbench.shadow import Shadow

Emit = Callable[[dict[str, Any]], None]


class Looking:
    """The part of a debugger that observes ops and keeps what was read.

    `emit` sends an event; where the session stands (`order`, `index`, `span`, `forward`, `tokens`) is
    the debugger's to say.
    """

    model: Transformer
    emit: Emit
    shadow: Shadow
    probes: list[Probe]
    records: dict[str, Record]
    readings: dict[tuple[str, ...], Reading]
    order: list[str]
    index: int
    span: tuple[int, int]
    forward: int
    tokens: list[int]
    pause: bool

    def __init__(self) -> None:
        self._complained: set[str] = set()  # probes whose exception was logged
        self._fresh_readings: list[Reading] = []

    def layer_at(self, index: int) -> int:
        """The layer that op `index` of `order` belongs to: -1 is embed, the number of layers the head."""
        site = self.model.sites[self.order[index]]
        if site.layer is not None:
            return site.layer
        return -1 if site.path == "embed" else len(self.model.layers)

    def first_of(self, layer: int) -> int:
        """Index in `order` of the first op of `layer` (-1: of the forward pass)."""
        if layer < 0:
            return 0
        group = f"L{layer}/" if layer < len(self.model.layers) else "head/"
        return next(i for i, path in enumerate(self.order) if path.startswith(group))

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
            text = f"{other.name} raised {type(raised).__name__}: {first_line(raised)}"
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
        site = self.order[self.first_of(layer)]
        self.emit({"event": "running", "site": site, "route": "reference", "shadow": True})

    def _keep(self, reading: Reading) -> None:
        self.readings[(reading.site, reading.probe, reading.name, reading.output)] = reading

    def tell_running(self, site: Site, impl: Implementation, shadow: bool = False) -> None:
        """What runs outside the usual order, for the client to name if the worker dies of it."""
        event = {"event": "running", "site": site.path, "route": impl.name, "shadow": shadow}
        self.emit(event)


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
