"""What a probe returns, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.stats import Stats, tensor_stats

Value = float | int | str | list[float]


@dataclass(frozen=True)
class Reading:
    """One number (or small array) taken at a site.

    `verdict` is ``alarm``, ``ok`` (judged and fine) or ``info`` (not judged).
    """

    site: str
    probe: str
    name: str
    value: Value
    unit: str = ""
    limit: float | None = None
    verdict: str = "info"
    layer: int | None = None
    forward: int = 0
    detail: str = ""
    output: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Call:
    """One op as it ran: the arguments by name, and the outputs, written-in-place arguments included."""

    site: Site
    inputs: dict[str, Any]
    outputs: dict[str, Tensor]
    forward: int = 0
    before: dict[str, Tensor] = field(default_factory=dict)  # mutated arguments, as they were
    _stats: dict[str, Stats | None] = field(default_factory=dict, repr=False)

    def ran(self, outputs: dict[str, Tensor]) -> None:
        """Keep what the op has returned or written; called again after it was re-run."""
        self.outputs = outputs
        self._stats.clear()

    def stats(self, output: str) -> Stats | None:
        """Statistics of one output, computed once for all probes; None if it is not of floats."""
        if output not in self._stats:
            self._stats[output] = tensor_stats(self.outputs[output])
        return self._stats[output]

    def reading(
        self,
        probe: str,
        name: str,
        value: Value,
        unit: str = "",
        limit: float | None = None,
        verdict: str = "info",
        detail: str = "",
        output: str = "",
    ) -> Reading:
        """A reading at this call's site."""
        site, at = self.site, self.forward
        return Reading(
            site.path, probe, name, value, unit, limit, verdict, site.layer, at, detail, output
        )
