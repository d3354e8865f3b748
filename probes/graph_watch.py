"""Probes inside a CUDA graph: recorded with the decode step, answered at every replay"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine import cuda
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.base import Probe
from dsv4_bench.probes.device import Memory, Question, unanswered, view_of
from dsv4_bench.probes.observation import Observation
from dsv4_bench.probes.readings import Call, Reading, fetch

_SLOTS_A_SITE = 8  # answers about one call, more than any probe here asks for
_VALUES_A_SITE = 64, 8  # integers that a call has in the ring, and more for each sequence
_STEPS = 4
# Behind which op to look at all since the last time. Of few tokens attention: the products that follow leave
# room on the processors, the experts do not. Of many the router: the experts then take so long that they hide
# all of it, and what follows attention waits for places.
_FEW_TOKENS = 8
_OWN_LAUNCHES = ("attention",)  # ops for which probes launch kernels of their own


def split(probes: Sequence[Probe]) -> tuple[list[Probe], list[Probe]]:
    """Those that work in a CUDA graph, and the others."""
    return [p for p in probes if p.captures], [p for p in probes if not p.captures]


class GraphWatch:
    """The observer of a decode graph of `batch` sequences: `probes` look at `sites` at every replay.

    One launch a layer and those of the softmax probe, on a branch beside the sites, leave every answer
    in a ring on the device; `readings` fetches it, once a step; the first step is forward pass `first`.
    Raises CannotAnswer for probes that cannot be in a graph, and where the fused kernel does not run.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        sites: int,
        device: torch.device,
        batch: int = 1,
        steps: int = _STEPS,
        first: int = 0,
    ) -> None:
        others = split(probes)[1]
        if others:
            names = ", ".join(probe.name for probe in others)
            raise CannotAnswer(
                f"these probes do not work in a CUDA graph: {names}", "leave them out, or the graph"
            )
        if not cuda.stats.available(device):
            raise CannotAnswer(
                f"probes in a CUDA graph need the sm_90a kernel, which does not run on {device}",
                "run without a graph",
            )
        self.observation = Observation(probes)
        exponents = any(probe.name == "exponents" for probe in probes)
        width = (_VALUES_A_SITE[0] + _VALUES_A_SITE[1] * batch) * sites
        self.ring = cuda.stats.Ring(device, _SLOTS_A_SITE * sites, steps, exponents, width)
        x = torch.ones(2, 8, 8, device=device)
        x @ x  # a capture cannot make a cuBLAS handle, and some probe may want one
        self._look_behind = "attention" if batch <= _FEW_TOKENS else "gate"
        self.first = first
        self.missed = 0  # steps that the ring lost before they were fetched
        self._fetched = 0
        self._forget()

    def _forget(self) -> None:
        """Nothing has been captured."""
        self._calls: list[Call] = []
        self._fresh: list[Call] = []
        self._later: list[Call] = []  # to ask about behind the launch for the others
        self._memory = Memory()
        self._said: list[Reading] = []  # in `observe`
        self._slots: list[Question] = []  # by slot
        self._places: list[_Place] = []  # in a row of copies
        self._copied = 0
        self._copying: list[cuda.stats.View] = []
        self._settled = 0  # of what was said
        self.ring.forget()

    # -- while a graph is captured

    def step_begins(self) -> None:
        """A new capture: what the last one held is gone."""
        self._forget()
        self.ring.begin()

    def due(self, site: Site) -> bool:
        """Whether to be told of `site` and those before it at once."""
        return site.op == self._look_behind

    def after(self, site: Site, args: tuple[Any, ...], result: Any) -> None:
        """Ask the probes about a site that has run."""
        inputs = site.spec.bind(args, site.params)
        outputs = site.spec.name_outputs(result) | {n: inputs[n] for n in site.spec.mutates}
        call = Call(site, inputs, outputs)
        if site.op in _OWN_LAUNCHES:
            self._later.append(call)
        else:
            self._ask(call)

    def _ask(self, call: Call) -> None:
        self._said += self.observation.ask(call)
        if call.answers:
            self._memory.add(call)
            self._calls.append(call)
            self._fresh.append(call)

    def step_done(self) -> None:
        """The step is over."""
        self._launch()

    def look(self) -> None:
        """Record one launch for everything asked since the last; then those of probes that make some."""
        self._launch()
        for call in self._later:
            self._ask(call)
        self._later = []

    def _launch(self) -> None:
        """One launch for what was asked and is not on its way yet."""
        first, views = len(self._slots), []
        for question in unanswered(self._fresh):
            if question.request.kind == "values":
                self._copy(question, question.tensor)
                continue
            if question.request.kind == "empty":
                self._count_empty(question)
                continue
            view = view_of(question)
            if view is None:
                raise _not_fused(question)
            self._slots.append(question)
            views.append(view)
        for number in range(self._settled, len(self._said)):
            value = self._said[number].value
            if isinstance(value, Tensor):
                self._copy(number, value)
        self._settled = len(self._said)
        views += self._copying
        if len(self._slots) > self.ring.values.shape[1] or self._copied > self.ring.copies.shape[1]:
            raise CannotAnswer(
                f"{len(self._slots)} answers and {self._copied} values do not fit into the ring",
                "watch fewer sites",
            )
        if views:
            self.ring.launch(views, first)
        self._fresh, self._memory, self._copying = [], Memory(), []

    def _copy(self, owner: Question | int, value: Tensor) -> None:
        """Have the bits of `value` copied: an answer, or the value of what was said."""
        view = cuda.stats.values_view(bits_of(value), self._copied)
        if view is None:
            raise CannotAnswer(f"a probe's value is {value.dtype}", "run without a graph")
        self._place(_Place(owner, self._copied, value.dtype, value.shape), view)

    def _count_empty(self, question: Question) -> None:
        view = cuda.stats.empty_view(question.tensor, self._copied)
        if view is None:
            raise _not_fused(question)
        shape = question.tensor.shape[:-1]
        self._place(_Place(question, self._copied, torch.int64, shape), view)

    def _place(self, place: _Place, view: cuda.stats.View) -> None:
        self._places.append(place)
        self._copying.append(view)
        self._copied += place.shape.numel()

    @property
    def captured(self) -> bool:
        """Whether there is a graph that this watches."""
        return bool(self._calls)

    # -- after replays

    def readings(self) -> list[Reading]:
        """What the probes make of the steps since the last time; waits.

        What takes a closer look at tensors sees those of the last step.
        """
        found: list[Reading] = []
        for row in self.ring.fetch(len(self._slots), self._copied):
            self.missed += row.number - self._fetched
            self._fetched = row.number + 1
            found += self._settle(row)
            for call in self._calls:
                call.forward = self.first + row.number
                found += self.observation.explain(call)
        return found

    def _settle(self, row: cuda.stats.Row) -> list[Reading]:
        """Give the calls their answers; what was said in `observe`, with this step's values."""
        values, said = row.values.tolist(), list(self._said)
        for slot, question in enumerate(self._slots):
            if question.request.kind == "exponents" and row.exponents is not None:
                question.settle(row.exponents[slot].tolist())
            else:
                question.settle(values[slot])
        for place in self._places:
            value = place.value(row.copies)
            if isinstance(place.owner, int):
                said[place.owner] = said[place.owner]._replace(value=value)
            else:
                place.owner.settle(value)
        forward = self.first + row.number
        said = [reading._replace(forward=forward) for reading in said]
        return fetch(said).readings


def bits_of(value: Tensor) -> Tensor:
    """int32 or int64 of the same shape, from which `_Place.value` makes the values again."""
    if value.dtype == torch.float64:
        return value.contiguous().view(torch.int64)
    if value.is_floating_point():
        return value.float().contiguous().view(torch.int32)
    return value if value.dtype in (torch.int32, torch.int64) else value.int()


class _Place(NamedTuple):
    """Where the values of an answer, or of something said, begin in a row of copies."""

    owner: Question | int
    first: int
    dtype: torch.dtype
    shape: torch.Size

    def value(self, copies: Tensor) -> Any:
        """As `tolist` gives it."""
        bits = copies[self.first : self.first + self.shape.numel()]
        if self.dtype == torch.float64:
            bits = bits.view(torch.float64)
        elif self.dtype.is_floating_point:
            bits = bits.int().view(torch.float32)
        elif self.dtype == torch.bool:
            bits = bits.bool()
        return bits.view(self.shape).tolist()


def _not_fused(question: Question) -> CannotAnswer:
    tensor, request = question.tensor, question.request
    return CannotAnswer(
        f"{question.call.site.path}: {request.kind} of {request.output} ({tensor.dtype}, "
        f"{list(tensor.shape)}) cannot be taken in a CUDA graph",
        "run without a graph",
    )
