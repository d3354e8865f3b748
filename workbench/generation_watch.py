"""Probes on `generate`: on the prefill op by op, on decode steps in their CUDA graph or op by op"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.generate import can_use_graph
from dsv4_bench.engine.model import Transformer
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.graph_watch import GraphWatch, split
from dsv4_bench.probes.observation import Watch
from dsv4_bench.probes.readings import Reading
from dsv4_bench.probes.tap import set_taps

_KEPT = 1000  # alarms


class GenerationWatch:
    """Watches a generation: pass 0 is the prefill, pass n the step after the n-th new token.

    Give `observer` to `generate`, and call `token` when it has yielded one, and when it is over. With
    `graph`, decode steps that can come from a CUDA graph are watched in it, by the probes that work
    there; `say` hears of the others.
    """

    def __init__(
        self,
        model: Transformer,
        probes: Sequence[Probe],
        graph: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model = model
        self.taken = 0  # readings
        self.alarms: list[Reading] = []  # the first of them
        self.say = say
        self._eager = Watch(probes)
        self._graph: GraphWatch | None = None
        captured, others = split(probes)
        if graph and captured and can_use_graph(model):
            try:
                self._graph = GraphWatch(captured, len(model.sites), model.device, first=1)
            except CannotAnswer as error:
                say(f"decoding without a CUDA graph, for the probes: {error}")
            if others and self._graph is not None:
                names = ", ".join(probe.name for probe in others)
                say(f"probes on the prefill only, not in a CUDA graph: {names}")
        self._passes = 0
        self._missed = 0  # decode steps that nobody watched
        set_taps(model.sites.values(), self._eager)

    @property
    def observer(self) -> GraphWatch | None:
        """The observer for the decode graph; None without one."""
        return self._graph

    def token(self) -> list[Reading]:
        """A token is there, so a pass is over: its alarms."""
        self._eager.flush()
        readings, self._eager.readings = self._eager.readings, []
        if self._graph is not None:
            readings += self._graph.readings()
            self._hand_over(self._graph)
        self._passes += 1
        self._eager.forward = self._passes
        self.taken += len(readings)
        alarms = [reading for reading in readings if reading.verdict == "alarm"]
        self.alarms += alarms[: max(_KEPT - len(self.alarms), 0)]
        return alarms

    def _hand_over(self, graph: GraphWatch) -> None:
        """From the prefill's taps to the graph, and back if the step could not be captured."""
        if self._passes == 0:  # a capture takes no taps
            set_taps(self.model.sites.values(), None)
        elif not graph.captured:
            set_taps(self.model.sites.values(), self._eager)
            self._graph, self._missed = None, 1

    def summary(self) -> dict[str, Any]:
        """For --json: how many readings there were, and the first alarms."""
        missed = self._missed + (0 if self._graph is None else self._graph.missed)
        alarms = [alarm.to_dict() for alarm in self.alarms]
        return {"readings": self.taken, "missed_steps": missed, "alarms": alarms}
