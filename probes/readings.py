"""What a probe returns, and what it is given.

On an accelerator nobody waits for a value while the model runs: a reading may hold a tensor there,
and a rule instead of a verdict, until `fetch` brings the values of many readings in one transfer. What
a call is asked for (`Call.ask`) is reduced there for a whole layer at once, and comes along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.stats import (
    Stats,
    Sums,
    empty_counts,
    exponent_counts,
    tensor_stats,
    tensor_sums,
)

Value = float | int | str | Sequence[float] | Tensor
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


class Request(NamedTuple):
    """Something to know of a tensor: `stats` of it (or of part `at` along its second axis), its `sums`
    along axis `at` (None: its values one by one), its `exponents`, all its `values`, or how many values
    of each row are `empty`.
    """

    kind: str
    output: str
    at: int | None = None


# An argument that a call reads nothing of, and writes some rows of: op -> argument, rows written.
WRITTEN_ROWS = {"cache_write": ("cache", "slots")}


@dataclass
class Call:
    """One op as it ran: the arguments by name, and the outputs, written-in-place arguments included.

    What a probe wants to know of an output, it asks for in `observe` and reads in `explain`: on the CPU
    it is computed when it is read; on an accelerator it is there once the layer has been fetched.
    """

    site: Site
    inputs: dict[str, Any]
    outputs: dict[str, Tensor]
    forward: int = 0
    before: dict[str, Tensor] = field(default_factory=dict)  # mutated arguments, as they were
    pending: bool = False  # whether a reading or an answer is still on a device
    answers: dict[Request, Any] = field(default_factory=dict, repr=False)
    made: dict[str, Tensor] = field(default_factory=dict, repr=False)  # by probes, in `observe`
    overwritten: dict[str, str] = field(default_factory=dict)  # output -> the site that did it

    def ran(self, outputs: dict[str, Tensor]) -> None:
        """Keep what the op has returned or written; called again after it was re-run."""
        self.outputs, self.pending = outputs, False
        self.answers.clear()
        self.made.clear()

    # -- what is asked of outputs

    def tensor(self, name: str) -> Tensor:
        """An output, what a probe has `made`, an input, or what an input has: ``step.positions``."""
        for tensors in (self.outputs, self.made):
            if name in tensors:
                return tensors[name]
        owner, _, rest = name.partition(".")
        value: Tensor = getattr(self.inputs[owner], rest) if rest else self.inputs[owner]
        return value

    def make(self, name: str, tensor: Tensor) -> None:
        """Have the `values` of a small tensor, made of the call's in `observe`, ready for `explain`."""
        self.made[name] = tensor
        self.answers.pop(Request("values", name), None)
        self.ask("values", name)

    def ask(self, kind: str, output: str, at: int | None = None) -> None:
        """Have `stats`, `sums`, `exponents`, `values` or `empty` of a tensor ready for `explain`."""
        tensor = self.tensor(output)
        if not tensor.is_cpu and (tensor.is_floating_point() or kind in ("values", "empty")):
            self.answers.setdefault(Request(kind, output, at), None)
            self.pending = True

    def stats(self, output: str, part: int | None = None) -> Stats | None:
        """Statistics of an output, or of its part `part` along the second axis; None if not of floats.

        Of a cache, those of the rows that the call has written. Computed once for all probes.
        """
        found: Stats | None = self.answers.get(("stats", output, part))  # type: ignore[call-overload]
        if found is None and self.outputs[output].is_floating_point():
            found = self._answer(Request("stats", output, part))
        return found

    def sums(self, output: str, axis: int | None = None) -> Sums:
        """The sums of an output along `axis`, its values themselves if None."""
        found: Sums = self._answer(Request("sums", output, axis))
        return found

    def exponents(self, output: str) -> list[int]:
        """[256] values with each exponent of float32: 0 zero and subnormal, 255 infinite and NaN."""
        found: list[int] = self._answer(Request("exponents", output))
        return found

    def values(self, output: str) -> Any:
        """All values of a small tensor, as `tolist` gives them."""
        return self._answer(Request("values", output))

    def empty(self, output: str) -> Any:
        """How many values of each row of [..., n] are -infinity, or below 0 of integers: [...]."""
        return self._answer(Request("empty", output))

    def _answer(self, request: Request) -> Any:
        if request.output in self.overwritten:
            raise RuntimeError(
                f"{request.output} was overwritten by {self.overwritten[request.output]} "
                "before the layer was read"
            )
        found = self.answers.get(request)
        if found is None:
            tensor, index = self.looked_at(request)
            if not tensor.is_cpu:
                raise RuntimeError(
                    f"{request.kind} of {request.output} are on a device: ask for them in `observe`, "
                    "read them in `explain`"
                )
            tensor = tensor if index is None else tensor[index[index >= 0].long()]
            found = self.answers[request] = _computed(request, tensor)
        return found

    def looked_at(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """The tensor that a request is about, and the rows of it, -1 for none; None: all rows."""
        tensor = self.tensor(request.output)
        if request.kind == "stats" and request.at is not None:
            return tensor.select(1, request.at), None
        written = WRITTEN_ROWS.get(self.site.spec.name)
        if written is not None and request.output == written[0]:
            return tensor, self.inputs.get(written[1])
        return tensor, None

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
        if isinstance(value, Tensor) and value.is_cpu:
            value = value.tolist()
        if isinstance(value, Tensor):
            self.pending = True
        elif not isinstance(verdict, str):
            verdict = verdict(value)
        if sampled:
            detail = f"{detail}; {sampled}" if detail else sampled
        site, at = self.site, self.forward
        return Reading(
            site.path, probe, name, value, unit, limit, verdict, site.layer, at, detail, output, sampled
        )  # fmt: skip


def _computed(request: Request, tensor: Tensor) -> Any:
    """The answer for a tensor on the CPU."""
    if request.kind == "stats":
        return tensor_stats(tensor)
    if request.kind == "sums":
        return tensor_sums(tensor, request.at)
    if request.kind == "exponents":
        return exponent_counts(tensor).tolist()
    return (empty_counts(tensor) if request.kind == "empty" else tensor).tolist()


def fetch(readings: Sequence[Reading], answers: Sequence[Tensor] = ()) -> Fetched:
    """The readings with their values on the host and judged, and the values of `answers` with them.

    One transfer a device.
    """
    found = [r.value for r in readings if isinstance(r.value, Tensor)]
    values = _to_host([*found, *answers])
    arrived = iter(values[: len(found)])
    settled = [r._replace(value=next(arrived)) if r.pending else r for r in readings]
    judged = [
        r if isinstance(r.verdict, str) else r._replace(verdict=r.verdict(r.value)) for r in settled
    ]
    return Fetched(judged, values[len(found) :])


class Fetched(NamedTuple):
    """Readings with values, and what came along: each as nested lists."""

    readings: list[Reading]
    answers: list[Any]


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
