"""Memory faults: uninitialised outputs, reads of unused rows and past the end, writes out of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.registry import Site, reference, spec_of
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.probes.limits import Limits
from dsv4_bench.probes.poison import GUARD, PoisonedMemory, guard, poisoned_run
from dsv4_bench.probes.verdicts import Verdict, attempt, judge_memory

GENERATOR = torch.Generator().manual_seed(0)


def captured(op: str, args: tuple[Any, ...], **params: Any) -> Captured:
    """One op as it ran on its reference."""
    site = Site("L0/x", spec_of(op), params, 0)
    capture = Capture()
    capture.around(site, args)
    return capture.calls[0]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.fixture
def norm() -> Captured:
    return captured("rms_norm", (random(6, 8),), weight=random(8), eps=1e-6)


@pytest.fixture
def attention() -> Captured:
    """Queries that see the first three of eight rows only; entries likewise."""
    index = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 1, 2], [2, 1, -1]], dtype=torch.int32)
    args = (random(4, 2, 16), random(8, 16), index, random(5, 16), index[:, :1])
    return captured("attention", args, sink=random(2), scale=0.25)


def memory_verdict(call: Captured, function: Callable[..., Any], repeats: int = 2) -> list[str]:
    """Kinds and sentences of what `judge_memory` finds."""
    outputs, problem = attempt(call, function)
    assert problem is None
    verdict = Verdict(outputs)
    judge_memory(call, function, verdict, Limits(torch.float32), repeats, poison=True)
    found = [broken.signature for broken in verdict.broken]
    return [f"{signature.kind}: {signature.detail}" for signature in found if signature]


def test_recycled_memory_is_nan() -> None:
    with PoisonedMemory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, 2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(1).new_empty(4).isnan().all()
        assert torch.equal(torch.empty(2, dtype=torch.int32), torch.tensor([-1, -1]).int())
        assert torch.empty(2, dtype=torch.bool).shape == (2,)
        assert torch.equal(torch.zeros(2), torch.tensor([0.0, 0.0]))


def test_guards_lie_around_every_argument() -> None:
    whole = random(6, 10)
    strided = whole[:, 2:6]
    guarded = guard({"a": strided, "b": torch.arange(5)})
    copy = guarded.tensors["a"]
    assert torch.equal(copy, strided) and copy.stride() == strided.stride()
    before = torch.as_strided(copy, (GUARD // 4,), (1,), 0)
    assert before.isnan().all()
    assert torch.as_strided(copy, (6, 6), (10, 1), copy.storage_offset() + 4)[:5].isnan().all()
    assert guarded.touched(()) == []
    copy[0, 0] = 1.0
    assert guarded.touched(()) == ["a"] and guarded.touched(("a",)) == []
    torch.as_strided(copy, (1,), (1,), copy.storage_offset() - 1).fill_(2.0)
    assert guarded.touched(("a",)) == ["a"]


def test_sound_implementations_do_not_notice(norm: Captured, attention: Captured) -> None:
    for call in (norm, attention):
        assert memory_verdict(call, call.site.spec.reference) == []


def test_an_unwritten_row_is_uninitialised_memory(norm: Captured) -> None:
    def unwritten(x: Tensor, **params: Any) -> Tensor:
        right = reference("rms_norm")(x, **params)
        y = torch.empty_like(right)
        y[:-1] = right[:-1]
        if not y[-1].isnan().any():  # recycled memory happens to hold the right answer
            y[-1] = right[-1]
        return y

    found = memory_verdict(norm, unwritten)
    assert found == ["nondeterministic: y holds uninitialised memory in 1 of 6 rows, first row 5"]


def test_a_race_differs_between_runs(norm: Captured) -> None:
    calls = []

    def racing(x: Tensor, **params: Any) -> Tensor:
        calls.append(x)
        return reference("rms_norm")(x, **params) * (1 + 0.01 * (len(calls) % 2))

    assert memory_verdict(norm, racing)[0].startswith("nondeterministic: y differs by 0.0099")


def test_rows_that_no_index_names_are_not_read(attention: Captured) -> None:
    def reads_all(q: Tensor, window: Tensor, *rest: Any, **params: Any) -> Any:
        o, lse = reference("attention")(q, window, *rest, **params)
        return o + 0 * window[7, 0], lse  # 0 x NaN

    found = memory_verdict(attention, reads_all)
    assert found == ["padding: o depends on rows that no index names, in 4 of 4 rows, first row 0"]


def test_reads_past_the_end_are_seen(norm: Captured) -> None:
    def past_the_end(x: Tensor, **params: Any) -> Tensor:
        y = reference("rms_norm")(x, **params)
        if x.storage_offset():  # a plain copy ends with its storage
            y[-1, 0] += torch.as_strided(x, (1,), (1,), x.storage_offset() + x.numel())[0]
        return y

    found = memory_verdict(norm, past_the_end)
    assert found == [
        "padding: y depends on memory outside its arguments in 1 of 6 rows, first row 5"
    ]


def test_a_write_into_an_argument_is_found(norm: Captured) -> None:
    def writes(x: Tensor, **params: Any) -> Tensor:
        y = reference("rms_norm")(x, **params)
        x[2, 2] = 0.0
        return y

    before = norm.inputs["x"].clone()
    assert memory_verdict(norm, writes) == ["padding: writes into its argument x"]
    assert torch.equal(norm.inputs["x"], before)


def test_a_write_past_an_in_place_argument_is_found() -> None:
    call = captured("cache_write", (random(2, 4), torch.tensor([0, 2]), random(5, 4)))

    def too_far(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
        reference("cache_write")(rows, slots, cache)
        if cache.storage_offset():
            torch.as_strided(cache, (1,), (1,), cache.storage_offset() + cache.numel()).fill_(0.0)

    assert memory_verdict(call, call.site.spec.reference) == []
    assert memory_verdict(call, too_far) == ["padding: writes past the end of cache"]


def test_a_crash_on_poison_is_a_finding(norm: Captured) -> None:
    def refuses(x: Tensor, **params: Any) -> Tensor:
        if torch.empty(1).isnan():
            raise RuntimeError("bad workspace")
        return reference("rms_norm")(x, **params)

    found = memory_verdict(norm, refuses)
    assert found == ["padding: on poisoned memory it raises RuntimeError: bad workspace"]


def test_poison_can_be_taken_apart(attention: Captured) -> None:
    """Each poison alone leaves a sound implementation's bits as they are."""
    plain = attention.run(attention.site.spec.reference)
    for memory, rows in ((True, False), (False, True), (False, False)):
        run = poisoned_run(attention, attention.site.spec.reference, memory=memory, rows=rows)
        assert run.touched == []
        assert all(torch.equal(run.outputs[name], plain[name]) for name in plain)
