"""What probes ask of tensors on a device: one launch for the calls of a layer, one transfer for a step"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine import cuda_stats
from dsv4_bench.probes.readings import Call, Request
from dsv4_bench.probes.stats import Stats, Sums, exponent_counts, reduced, reduced_sums

Question = tuple[Call, Request]


class Batch:
    """Answers to everything that some calls were asked, on their device, on the way.

    Statistics and sums take one launch of the fused kernel where there is one, torch's reductions
    elsewhere. Until `settle`, the calls' tensors must stay as they are.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        self.calls = [call for call in calls if call.pending]
        self._questions: list[Question] = []
        self.tensors: list[Tensor] = []  # to bring to the host
        fused: list[Question] = []
        for question in unanswered(self.calls):
            (fused if is_fused(*question) else self._questions).append(question)
        self.tensors = [_by_torch(*question) for question in self._questions]
        if fused:
            self._launch(fused)

    def _launch(self, questions: list[Question]) -> None:
        """All of `questions` with the kernel; what it cannot read in place goes through a copy."""
        views = [view_of(*question) for question in questions]
        device = views[0].tensor.device
        values = torch.empty(1, len(views), cuda_stats.FIELDS, dtype=torch.float64, device=device)
        bins = None
        if any(request.kind == "exponents" for _, request in questions):
            bins = torch.empty(1, len(views), cuda_stats.BINS, dtype=torch.int32, device=device)
        cuda_stats.launch(views, values, exponents=bins)
        for number, (call, request) in enumerate(questions):
            self._questions.append((call, request))
            row = values if request.kind != "exponents" or bins is None else bins
            self.tensors.append(row[0, number])

    def settle(self, values: list[Any]) -> None:
        """Give every call its answers: the values of `tensors` on the host."""
        for (call, request), value in zip(self._questions, values, strict=True):
            call.answers[request] = answer(request, value)
        for call in self.calls:
            call.pending = False


class Memory:
    """The memory of outputs that were asked about and are not reduced yet: who else writes there?"""

    def __init__(self) -> None:
        # storage -> first byte, one past the last, whose it is
        self._held: dict[int, list[tuple[int, int, Call, str]]] = {}

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
                start, stop = _extent(tensor)
                key = tensor.untyped_storage().data_ptr()
                self._held.setdefault(key, []).append((start, stop, call, name))

    def _overlapping(self, tensor: Tensor) -> Iterator[tuple[Call, str]]:
        start, stop = _extent(tensor)
        for first, last, call, name in self._held.get(tensor.untyped_storage().data_ptr(), ()):
            if start < last and first < stop:
                yield call, name


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses [first, last) that `tensor` can lie in."""
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
                yield call, request


def is_fused(call: Call, request: Request) -> bool:
    """Whether the fused kernel answers `request`."""
    tensor = call.outputs[request.output]
    if not tensor.is_cuda or request.kind == "values" or not cuda_stats.available(tensor.device):
        return False
    if request.kind == "sums":
        return cuda_stats.sums_view(tensor, request.at) is not None
    return tensor.dtype in cuda_stats.DTYPES


def view_of(call: Call, request: Request) -> cuda_stats.View:
    """What the kernel reads for `request`, which it answers."""
    tensor, index = call.looked_at(request)
    if request.kind == "sums":
        view = cuda_stats.sums_view(tensor, request.at)
    else:
        view = cuda_stats.moments_view(tensor, index)
    assert view is not None
    return view


def answer(request: Request, value: Any) -> Any:
    """The answer to `request`, of a row of numbers on the host."""
    if request.kind == "stats":
        return Stats.of_row(value)
    if request.kind == "sums":
        return Sums.of_row(value)
    return value


def _by_torch(call: Call, request: Request) -> Tensor:
    """The answer with torch's own reductions, on the tensor's device; nobody waits."""
    tensor, index = call.looked_at(request)
    if request.kind == "values":
        return tensor
    if request.kind == "sums":
        return reduced_sums(tensor, request.at)
    return (reduced if request.kind == "stats" else exponent_counts)(tensor, index)
