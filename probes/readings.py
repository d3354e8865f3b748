"""What a probe returns, and what it is given."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from dsv4_bench.engine.registry import Site

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
        return asdict(self)


@dataclass
class Call:
    """One op as it ran: the arguments by name, and the outputs, written-in-place arguments included."""

    site: Site
    inputs: dict[str, Any]
    outputs: dict[str, Tensor]
    forward: int = 0
    before: dict[str, Tensor] = field(default_factory=dict)  # mutated arguments, as they were

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
