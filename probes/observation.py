"""Asking probes about ops as they run: readings now on the CPU, once a layer on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.readings import Call, Reading, fetch


class Observation:
    """Looks at calls with `probes`. `complain(probe, call, text)` hears of a probe that raised.

    The caller takes what `look` returns, and calls `flush` at the end of a layer and of a pass. Calls
    with values still on a device are kept until then.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        complain: Callable[[Probe, Call, str], None] = lambda probe, call, text: None,
    ) -> None:
        self.probes = probes
        self.complain = complain
        self._asked: dict[Site, tuple[list[Probe], list[Probe]]] = {}
        self._calls: list[Call] = []
        self._readings: list[Reading] = []

    def look(self, call: Call) -> list[Reading]:
        """The readings that are known now: all of them on the CPU, none on an accelerator."""
        readings = [r for p in self._asks(call)[0] for r in self._ask(p, call, p.observe)]
        if call.pending:
            self._calls.append(call)
            self._readings += readings
            return []
        return readings + self._explain(call)

    def flush(self) -> list[Reading]:
        """What was still on the device, in one transfer; then the closer look at every call."""
        if not self._calls:
            return []
        readings = fetch(self._readings, self._calls)
        for call in self._calls:
            readings += self._explain(call)
        self._calls, self._readings = [], []
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

    def _explain(self, call: Call) -> list[Reading]:
        found = [r for p in self._asks(call)[1] for r in self._ask(p, call, p.explain)]
        return fetch(found) if found else found

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
    counts the ops that some probe looked at.
    """

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
            self.flush()
            self._layer = site.layer
        call = Call(site, site.spec.bind(args, site.params), {}, self.forward)
        for name in site.spec.mutates:
            call.before[name] = call.inputs[name].clone()
        result = site.run(args)
        call.ran(site.spec.name_outputs(result) | {n: call.inputs[n] for n in site.spec.mutates})
        self.readings += self.observation.look(call)
        self.observed += 1
        return result

    def flush(self) -> None:
        """Take in what is still on a device."""
        self.readings += self.observation.flush()
