"""What probes ask of tensors on a device: one launch for the calls of a layer, one transfer for a step"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine import cuda
from dsv4_bench.probes.readings import Call, Request
from dsv4_bench.probes.stats import (
    Stats,
    Sums,
    empty_counts,
    exponent_counts,
    reduced,
    reduced_sums,
)

_MADE_OF_ROW = {"stats": Stats.of_row, "sums": Sums.of_row}


class Question:
    """A call, and something it was asked."""

    __slots__ = ("call", "request")

    def __init__(self, call: Call, request: Request) -> None:
        self.call, self.request = call, request

    @property
    def tensor(self) -> Tensor:
        return self.call.tensor(self.request.output)

    def looked_at(self) -> tuple[Tensor, Tensor | None]:
        """The tensor it is about, and the rows of it if not all."""
        return self.call.looked_at(self.request)

    def settle(self, value: Any) -> None:
        """Give the call its answer, of a row of numbers on the host."""
        made = _MADE_OF_ROW.get(self.request.kind)
        self.call.answers[self.request] = value if made is None else made(value)


class Batch:
    """Answers to everything that some calls were asked, on their device, on the way.

    Statistics and sums take one launch of the fused kernel where there is one, torch's reductions
    elsewhere. Until `settle`, the calls' tensors must stay as they are.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self.calls = [call for call in calls if call.pending]
        self.tensors: list[Tensor] = []  # to bring to the host
        self._alone: list[Question] = []  # one tensor each, in their order
        self._fused: list[Question] = []  # a row of the next tensor each
        self._exponents = False  # whether there are rows of exponents behind
        views: list[cuda.stats.View] = []
        for question in unanswered(self.calls):
            view = view_of(question)
            if view is None:
                self._alone.append(question)
                self.tensors.append(_by_torch(question))
            else:
                self._fused.append(question)
                views.append(view)
        if views:
            self._launch(views)

    def _launch(self, views: list[cuda.stats.View]) -> None:
        """All of `views` with the kernel."""
        count, device = len(views), views[0].tensor.device
        values = torch.empty(1, count, cuda.stats.FIELDS, dtype=torch.float64, device=device)
        self.tensors.append(values[0])
        bins = None
        self._exponents = any(q.request.kind == "exponents" for q in self._fused)
        if self._exponents:
            bins = torch.empty(1, count, cuda.stats.BINS, dtype=torch.int32, device=device)
            self.tensors.append(bins[0])
        cuda.stats.launch(views, values, exponents=bins)

    def settle(self, values: list[Any]) -> None:
        """Give every call its answers: the values of `tensors` on the host."""
        alone = len(self._alone)
        for question, value in zip(self._alone, values[:alone], strict=True):
            question.settle(value)
        if self._fused:
            rows = values[alone]
            bins = values[alone + 1] if self._exponents else rows
            for question, row, counts in zip(self._fused, rows, bins, strict=True):
                question.settle(counts if question.request.kind == "exponents" else row)
        for call in self.calls:
            call.pending = False


class Memory:
    """The memory of outputs that were asked about and are not reduced yet: who else writes there?"""

    def __init__(self) -> None:
        # by storage: whose outputs lie there
        self._held: dict[int, list[tuple[Tensor, Call, str]]] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in memory of an output that is not reduced yet."""
        return not tensor.is_cpu and next(self._overlapping(tensor), None) is not None

    def add(self, call: Call) -> None:
        """Keep the outputs of `call`; mark those of earlier calls that lie where these do."""
        asked = {request.output for request in call.answers}
        for name, tensor in call.outputs.items():
            if tensor.is_cpu:
                continue
            for earlier, output in self._overlapping(tensor):
                if earlier is not call:
                    earlier.overwritten[output] = call.site.path
            if name in asked:
                key = tensor.untyped_storage().data_ptr()
                self._held.setdefault(key, []).append((tensor, call, name))

    def _overlapping(self, tensor: Tensor) -> Iterator[tuple[Call, str]]:
        held = self._held.get(tensor.untyped_storage().data_ptr())
        if held:
            start, stop = _extent(tensor)
            for other, call, name in held:
                first, last = _extent(other)
                if start < last and first < stop:
                    yield call, name


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses [first, last) that `tensor` can lie in."""
    if tensor.is_contiguous():
        start = tensor.data_ptr()
        return start, start + tensor.nbytes
    if not tensor.numel():
        return (0, 0)
    span = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (span + 1) * tensor.element_size()


def unanswered(calls: Iterable[Call]) -> Iterator[Question]:
    """What was asked and is still on a device, without outputs that no longer are what they were."""
    for call in calls:
        for request, found in call.answers.items():
            if found is None and request.output not in call.overwritten:
                yield Question(call, request)


def view_of(question: Question) -> cuda.stats.View | None:
    """What the fused kernel reads for `question` to fill a row; None if it does not answer it."""
    tensor, index = question.looked_at()
    kind = question.request.kind
    if not tensor.is_cuda or kind in ("values", "empty") or not cuda.stats.available(tensor.device):
        return None
    if kind == "sums":
        return cuda.stats.sums_view(tensor, question.request.at)
    return cuda.stats.moments_view(tensor, index)


def _by_torch(question: Question) -> Tensor:
    """The answer with torch's own reductions, on the tensor's device; nobody waits."""
    tensor, index = question.looked_at()
    kind = question.request.kind
    if kind == "values":
        return tensor
    if kind == "empty":
        return empty_counts(tensor)
    if kind == "sums":
        return reduced_sums(tensor, question.request.at)
    return (reduced if kind == "stats" else exponent_counts)(tensor, index)
