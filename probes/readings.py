"""What a probe returns, and what it is given.

On an accelerator nobody waits for a value while the model runs: a reading may hold a tensor there,
and a rule instead of a verdict, until `fetch` brings the values of many readings in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.stats import Stats, device_stats, tensor_stats

Value = float | int | str | list[float] | Tensor
Rule = Callable[[Any], str]  # value -> verdict


class Reading(NamedTuple):
    """One number (or small array) taken at a site.

    `verdict` is ``alarm``, ``ok`` (judged and fine) or ``info`` (not judged). `limit` is the bound
    that was judged against; `detail` says what the value cannot. `sampled` is empty, or what part was
    looked at ("8 of 160 queries"); it is in `detail` too.
    """

    site: str
    probe: str
    name: str
    value: Value
    unit: str = ""
    limit: float | None = None
    verdict: str | Rule = "info"
    layer: int | None = None
    forward: int = 0
    detail: str = ""
    output: str = ""
    sampled: str = ""

    def to_dict(self) -> dict[str, Any]:
        return self._asdict()

    @property
    def pending(self) -> bool:
        """Whether the value is still on a device."""
        return isinstance(self.value, Tensor)


def at_most(limit: float) -> Rule:
    """ok up to `limit`; NaN is an alarm."""
    return lambda value: "ok" if value <= limit else "alarm"


def at_least(limit: float) -> Rule:
    """ok from `limit` on; NaN is an alarm."""
    return lambda value: "ok" if value >= limit else "alarm"


def near(target: float, tolerance: float) -> Rule:
    """ok within `tolerance` of `target`; NaN is an alarm."""
    return lambda value: "ok" if abs(value - target) <= tolerance else "alarm"


@dataclass
class Call:
    """One op as it ran: the arguments by name, and the outputs, written-in-place arguments included."""

    site: Site
    inputs: dict[str, Any]
    outputs: dict[str, Tensor]
    forward: int = 0
    before: dict[str, Tensor] = field(default_factory=dict)  # mutated arguments, as they were
    pending: bool = False  # whether a reading or statistics are still on a device
    _stats: dict[str, Stats | None] = field(default_factory=dict, repr=False)

    def ran(self, outputs: dict[str, Tensor]) -> None:
        """Keep what the op has returned or written; called again after it was re-run."""
        self.outputs, self.pending = outputs, False
        self._stats.clear()

    def stats(self, output: str) -> Stats | None:
        """Statistics of one output, computed once for all probes; None if it is not of floats."""
        if output not in self._stats:
            tensor = self.outputs[output]
            if tensor.is_cpu:
                self._stats[output] = tensor_stats(tensor)
            else:
                self._stats[output], self.pending = device_stats(tensor), True
        return self._stats[output]

    def reading(
        self,
        probe: str,
        name: str,
        value: Value,
        unit: str = "",
        limit: float | None = None,
        verdict: str | Rule = "info",
        detail: str = "",
        output: str = "",
        sampled: str = "",
    ) -> Reading:
        """A reading at this call's site; a tensor as value is fetched, now on the CPU, later elsewhere."""
        if isinstance(value, Tensor):
            if value.is_cpu:
                value = value.tolist()
            else:
                self.pending = True
        if not isinstance(verdict, str) and not isinstance(value, Tensor):
            verdict = verdict(value)
        if sampled:
            detail = f"{detail}; {sampled}" if detail else sampled
        site, at = self.site, self.forward
        return Reading(
            site.path, probe, name, value, unit, limit, verdict, site.layer, at, detail, output, sampled
        )  # fmt: skip


def fetch(readings: Sequence[Reading], calls: Sequence[Call] = ()) -> list[Reading]:
    """The readings with their values on the host and judged, in one transfer a device.

    Statistics of `calls` that are still on a device come along, and replace those in the calls.
    """
    found = [r.value for r in readings if isinstance(r.value, Tensor)]
    waiting = [
        (call, output, stats)
        for call in calls
        for output, stats in call._stats.items()
        if stats is not None and isinstance(stats.nan, Tensor)
    ]
    for _, _, stats in waiting:
        found += [value for value in stats if isinstance(value, Tensor)]
    values = iter(_to_host(found))
    settled = [r._replace(value=next(values)) if r.pending else r for r in readings]
    for call, output, stats in waiting:
        call._stats[output] = Stats(*(next(values) if isinstance(v, Tensor) else v for v in stats))
        call.pending = False
    return [
        r if isinstance(r.verdict, str) else r._replace(verdict=r.verdict(r.value)) for r in settled
    ]


def _to_host(tensors: list[Tensor]) -> list[Any]:
    """Values of small tensors, as `tolist` gives them; counts below 2^53 stay exact."""
    if not tensors:
        return []
    flat = torch.cat([t.detach().reshape(-1).double() for t in tensors]).cpu()
    values = []
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        part = part if tensor.is_floating_point() else part.long()
        values.append(part.view(tensor.shape).tolist())
    return values
