"""Asking probes about ops as they run: readings now on the CPU, once a pass on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.device import Batch, Memory
from dsv4_bench.probes.readings import WRITTEN_ROWS, Call, Reading, fetch


class Observation:
    """Looks at calls with `probes`. `complain(probe, call, text)` hears of a probe that raised.

    The caller takes what `look` returns, calls `before` for an op that writes into its arguments,
    `end_layer` after a layer (or more often) and `flush` after a pass. What is still on a device is
    reduced there at the end of the layer and fetched by `flush`; the calls are kept until then.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        complain: Callable[[Probe, Call, str], None] = lambda probe, call, text: None,
    ) -> None:
        self.probes = probes
        self.complain = complain
        self.held_bytes = 0  # of outputs that are kept until `flush`
        self._asked: dict[Site, tuple[list[Probe], list[Probe]]] = {}
        self._fresh: list[Call] = []  # of this layer
        self._memory = Memory()
        self._batches: list[Batch] = []
        self._calls: list[Call] = []
        self._readings: list[Reading] = []

    def before(self, call: Call) -> None:
        """The op of `call` is about to write into its arguments: read what lies there."""
        if any(self._memory.holds(call.inputs[name]) for name in call.site.spec.mutates):
            self.end_layer()

    def look(self, call: Call) -> list[Reading]:
        """The readings that are known now: all of them on the CPU, none on an accelerator."""
        readings = self.ask(call)
        if not call.pending:
            return readings + self.explain(call)
        self._memory.add(call)
        self._fresh.append(call)
        self._calls.append(call)
        self._readings += readings
        self.held_bytes += sum(tensor.nbytes for tensor in call.outputs.values())
        return []

    def ask(self, call: Call) -> list[Reading]:
        """What the probes say right after the op; what they ask for stands in `call.answers`."""
        return [r for p in self._asks(call)[0] for r in self._ask(p, call, p.observe)]

    def end_layer(self) -> None:
        """Reduce what was asked of the calls since the last time; nobody waits."""
        if self._fresh:
            self._batches.append(Batch(self._fresh))
            self._fresh, self._memory = [], Memory()

    def flush(self) -> list[Reading]:
        """What was still on the device, in one transfer; then what probes make of it."""
        if not self._calls:
            return []
        self.end_layer()
        answers = [tensor for batch in self._batches for tensor in batch.tensors]
        readings, values = fetch(self._readings, answers)
        for batch in self._batches:
            count = len(batch.tensors)
            batch.settle(values[:count])
            values = values[count:]
        for call in self._calls:
            readings += self.explain(call)
        self._calls, self._readings, self._batches, self.held_bytes = [], [], [], 0
        return readings

    def _asks(self, call: Call) -> tuple[list[Probe], list[Probe]]:
        """The probes that want the call's site, and those of them that may have more to say."""
        if call.site not in self._asked:
            wanted = [probe for probe in self.probes if self._wants(probe, call)]
            more = [probe for probe in wanted if type(probe).explain is not Probe.explain]
            self._asked[call.site] = wanted, more
        return self._asked[call.site]

    def _wants(self, probe: Probe, call: Call) -> bool:
        try:
            return probe.wants(call.site)
        except Exception as error:
            self.complain(probe, call, f"{_text(error)} when asked for sites")
            return False

    def explain(self, call: Call) -> list[Reading]:
        """What the probes make of a call whose answers are known."""
        found = [r for p in self._asks(call)[1] for r in self._ask(p, call, p.explain)]
        return fetch(found).readings if any(isinstance(r.value, Tensor) for r in found) else found

    def _ask(
        self, probe: Probe, call: Call, question: Callable[[Call], Iterable[Reading]]
    ) -> list[Reading]:
        """The answer; a probe's exception becomes an alarm, not the run's end."""
        try:
            return list(question(call))
        except Exception as error:
            text = _text(error)
            self.complain(probe, call, text)
            return [call.reading(probe.name, "error", text, verdict="alarm", detail=text)]


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


class Watch:
    """A tap's observer that runs every op on its route and collects the probes' readings.

    `forward` counts in the readings; set it before each pass, and call `flush` after it. `observed`
    counts the ops that some probe looked at. On an accelerator a pass is fetched in pieces if the
    outputs that must be kept for it are more than `most_bytes`.
    """

    most_bytes = 1 << 30

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.observation = Observation(probes)
        self.forward = 0
        self.observed = 0
        self.readings: list[Reading] = []
        self._layer: int | None = None

    def wants(self, site: Site) -> bool:
        for probe in self.observation.probes:
            try:
                if probe.wants(site):
                    return True
            except Exception as error:
                text = f"probe {probe.name} raised {_text(error)} when asked for {site.path}"
                raise DSV4Error(
                    text, "leave it out with --probes, or correct its `wants`"
                ) from error
        return False

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        if site.layer != self._layer:
            self.observation.end_layer()
            self._layer = site.layer
        if self.observation.held_bytes > self.most_bytes:
            self.flush()
        call = Call(site, site.spec.bind(args, site.params), {}, self.forward)
        self.observation.before(call)
        for name in site.spec.mutates:
            if (
                name != WRITTEN_ROWS.get(site.op, ("", ""))[0]
            ):  # a whole cache, of which nothing is read
                call.before[name] = call.inputs[name].clone()
        result = site.run(args)
        call.ran(site.spec.name_outputs(result) | {n: call.inputs[n] for n in site.spec.mutates})
        self.readings += self.observation.look(call)
        self.observed += 1
        return result

    def flush(self) -> None:
        """Take in what is still on a device."""
        self.readings += self.observation.flush()
