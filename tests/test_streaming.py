"""Streamed weights: budgets, the order of copies and uses, and the same bits as with all weights there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dsv4_bench.engine.cpu
import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import streaming
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.generate import teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.engine.streaming import (
    ALIGNMENT,
    HostLayer,
    StreamedLayer,
    Streamer,
    layer_bytes,
    parse_size,
    place,
    plan_layers,
)
from dsv4_bench.workbench.cli import main

# ------------------------------------------------------------------------------ sizes and plans


@pytest.mark.parametrize(
    "text, size",
    [
        ("123456", 123456),
        ("80GB", 80 * 10**9),
        ("80g", 80 * 10**9),
        ("1.5 G", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("2TiB", 2 << 40),
        ("64kb", 64_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "80QB", "-1GB", "0", "nan", "1e9", "80 G B", "12iB", "9e"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(DSV4Error, match="size"):
        parse_size(text)
    with pytest.raises(DSV4Error, match="makes no sense"):
        parse_size("9999999999TB")


def test_plan_keeps_everything_that_fits() -> None:
    plan = plan_layers(5, [10, 20, 30], 65)
    assert (plan.streamed, plan.total) == ((), 65)


def test_plan_streams_as_few_as_possible_and_spreads_them() -> None:
    layers = [10] * 10
    assert plan_layers(0, layers, 99).streamed == (1, 5, 8)  # 7 stay, 2 buffers
    assert plan_layers(0, layers, 89).streamed == (1, 3, 6, 8)
    assert plan_layers(0, layers, 20).streamed == tuple(range(10))
    assert plan_layers(7, layers, 27).total == 27


@pytest.mark.parametrize("budget", range(130, 420, 7))
def test_plan_stays_within_its_budget(budget: int) -> None:
    layers = [10, 60, 25, 40, 33, 60, 8, 41, 52, 17]
    plan = plan_layers(9, layers, budget)
    kept = [size for i, size in enumerate(layers) if i not in plan.streamed]
    assert plan.resident == 9 + sum(kept)
    assert plan.buffer == max((layers[i] for i in plan.streamed), default=0)
    assert plan.resident + 2 * plan.buffer == plan.total <= budget
    assert sorted(set(plan.streamed)) == list(plan.streamed)


def test_plan_that_cannot_be() -> None:
    with pytest.raises(CannotAnswer, match="too few: this checkpoint needs 129"):
        plan_layers(9, [60, 60, 60], 128)
    with pytest.raises(CannotAnswer, match="needs 104"):
        plan_layers(9, [10, 60, 25], 103)


# ------------------------------------------------------------------------------ order of copies


class LateCopies:
    """Copies as late as the order allows: when a buffer is waited for. Between its uses a buffer is
    garbage, and so is what it gets once its source has been `spoilt`."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.pair: list[Tensor] = []
        self.pending: list[Callable[[], None] | None] = [None, None]
        self.used = [False, False]
        self.log: list[str] = []

    def buffers(self, size: int) -> list[Tensor]:
        self.pair = [torch.full((size,), 0xFF, dtype=torch.uint8) for _ in range(2)]
        return self.pair

    def fill(self, slot: int, copy: Callable[[], None]) -> None:
        assert not self.used[slot], "filled while in use"
        self.pair[slot].fill_(0xFF)
        self.pending[slot] = copy
        self.log.append(f"fill {slot}")

    def wait(self, slot: int) -> None:
        if (copy := self.pending[slot]) is not None:
            copy()
        self.pending[slot], self.used[slot] = None, True
        self.log.append(f"use {slot}")

    def release(self, slot: int) -> None:
        assert self.used[slot]
        self.used[slot] = False
        self.log.append(f"done {slot}")


def streamer_of(count: int) -> tuple[Streamer, LateCopies]:
    """`count` layers of 8 bytes, each full of its number."""
    copies = LateCopies()
    buffers = copies.buffers(ALIGNMENT)
    layers = []
    for number in range(count):
        layer = HostLayer()
        layer.put(buffers[number % 2])(torch.full((8,), number, dtype=torch.uint8))
        layers.append(layer)
    return Streamer(layers, buffers, copies), copies


@pytest.mark.parametrize("count", [3, 4, 5])
def test_each_layer_finds_its_bytes_and_the_next_is_fetched_meanwhile(count: int) -> None:
    streamer, copies = streamer_of(count)
    for _ in range(3):
        for number in range(count):
            with streamer.loaded(number):
                assert (copies.pair[number % 2][:8] == number).all()
    first = ["fill 0", "use 0", "done 0", "fill 1", "use 1", "done 1", "fill 0", "use 0", "done 0"]
    assert copies.log[:9] == first
    fills = copies.log.count("fill 0"), copies.log.count("fill 1")
    # One more than uses, for the pass to come; with three layers the second has a buffer of its own.
    assert fills == {3: (7, 1), 4: (7, 6), 5: (10, 6)}[count]


def test_out_of_order_and_repeated() -> None:
    streamer, copies = streamer_of(5)
    for number in (3, 3, 0, 4, 2, 1, 2, 2, 0):
        with streamer.loaded(number):
            assert (copies.pair[number % 2][:8] == number).all()


def test_a_layer_that_fails_leaves_order_behind() -> None:
    streamer, copies = streamer_of(4)
    with pytest.raises(ZeroDivisionError), streamer.loaded(1):
        raise ZeroDivisionError
    assert copies.used == [False, False]
    for number in (1, 2, 3, 0):
        with streamer.loaded(number):
            assert (copies.pair[number % 2][:8] == number).all()


def test_a_copy_that_fails_is_made_again() -> None:
    streamer, copies = streamer_of(4)
    with streamer.loaded(0):
        pass

    class Refuses(LateCopies):
        def fill(self, slot: int, copy: Callable[[], None]) -> None:
            raise RuntimeError("no")

    streamer.copies = Refuses()
    with pytest.raises(RuntimeError, match="no"), streamer.loaded(2):
        pass
    streamer.copies = copies
    with streamer.loaded(2):
        assert (copies.pair[0][:8] == 2).all()


# ------------------------------------------------------------------------------ a model, on the CPU


def plain_memory(size: int) -> Tensor:
    return torch.full((size,), 0xEE, dtype=torch.uint8)


def ids_for(model: Transformer, count: int) -> list[int]:
    return [(13 * i + 5) % model.config.vocab_size for i in range(count)]


def streamed(
    checkpoint: Checkpoint,
    budget: int | None,
    allocate: Callable[[int], Tensor | None] = plain_memory,
) -> tuple[Transformer, LateCopies]:
    """A model whose weights pass through buffers; a budget of None is the smallest possible."""
    model = Transformer(checkpoint)
    sizes = [layer_bytes(model, layer) for layer in range(len(model.layers))]
    rest = layer_bytes(model, None)
    plan = plan_layers(rest, sizes, rest + 2 * max(sizes) if budget is None else budget)
    copies = LateCopies()
    place(model, plan, copies, allocate)
    assert [i for i, x in enumerate(model.layers) if isinstance(x, StreamedLayer)] == list(
        plan.streamed
    )
    return model, copies


@pytest.mark.parametrize("layout", ["nvfp4", "deepseek", "bf16"])
@pytest.mark.parametrize("route", ["reference", "kernel"])
def test_the_same_bits_as_resident(
    make_checkpoint: Callable[..., Path], layout: str, route: str
) -> None:
    checkpoint = Checkpoint(make_checkpoint(layout))
    resident = Transformer(checkpoint)
    ids = ids_for(resident, 46)
    resident.set_route(parse_route([route]))
    want = teacher_forced_logits(resident, ids, (40, 1))
    for allocate in (plain_memory, lambda size: None):
        model, copies = streamed(checkpoint, None, allocate)
        model.set_route(parse_route([route]))
        assert torch.equal(teacher_forced_logits(model, ids, (40, 1)), want)
        assert copies.log.count("use 0") == copies.log.count("use 1") == 7 * 2


def test_a_route_may_change_between_passes(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    model, _ = streamed(checkpoint, None)
    resident = Transformer(checkpoint)
    for route in ("kernel", "reference", "kernel"):
        for one in (model, resident):
            one.set_route(parse_route([route]))
        got, want = (teacher_forced_logits(one, ids_for(one, 40)) for one in (model, resident))
        assert torch.equal(got, want)


def test_every_tensor_of_a_streamed_layer_lies_in_its_buffer(
    make_checkpoint: Callable[..., Path],
) -> None:
    model, copies = streamed(Checkpoint(make_checkpoint()), None)
    spans = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in copies.pair]
    for index in range(len(model.layers)):
        found: list[tuple[int, int]] = []

        def look(tensor: Tensor, found: list[tuple[int, int]] = found) -> Tensor:
            found.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
            return tensor

        for site in streaming.sites_of(model, index):
            for value in site.params.values():
                streaming.placed(value, look)
        low, high = spans[index % 2]
        found.sort()
        assert found and low == found[0][0] and found[-1][1] <= high
        assert all(start % 64 == 0 for start, _ in found)
        assert all(a[1] <= b[0] for a, b in pairwise(found))


def test_sites_compute_with_what_is_in_the_buffer(make_checkpoint: Callable[..., Path]) -> None:
    model, copies = streamed(Checkpoint(make_checkpoint()), None)
    cache = model.new_cache()
    step = cache.step([ids_for(model, 20)])
    x = model.embed(step.tokens)
    layer = model.layers[1]
    assert isinstance(layer, StreamedLayer)
    assert layer(x, cache.layers[1], step).isfinite().all()
    for buffer in copies.pair:
        buffer.fill_(0xFF)
    assert layer.layer(x, cache.layers[1], step).isnan().all()


def test_progress_and_budgets(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = Checkpoint(make_checkpoint())
    model = Transformer(checkpoint)
    sizes = [layer_bytes(model, layer) for layer in range(len(model.layers))]
    told: list[tuple[int, int]] = []
    plan = plan_layers(layer_bytes(model, None), sizes, sum(sizes) * 2)
    assert place(model, plan, LateCopies(), plain_memory, lambda *x: told.append(x)) == 0
    assert told == [(i + 1, len(sizes)) for i in range(len(sizes))] and not plan.streamed
    with pytest.raises(CannotAnswer, match="too few"):
        streamed(checkpoint, max(sizes))


# ------------------------------------------------------------------------------ commands


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpu-memory", "80GB"], "--gpu-memory 80GB, but the model runs on the CPU"),
        (["--gpu-memory", "lots"], "'lots' is no size in bytes"),
        (["--gpu-memory", ""], "'' is no size in bytes"),
        (["--kv", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--device", "cpu", "--prompt", "note", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_generate_with_packed_kv(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo answers from a packed cache too."""
    prompt = "note maria 42 . note hugo 17 . what is the code of hugo ?"
    arguments = ["generate", "--device", "cpu", "--prompt", prompt, "--max-new-tokens", "2"]
    assert main([*arguments, "--kv", "fp8"]) == 0
    out = capsys.readouterr()
    assert out.out.split() == ["17."] and "attention: cpu: takes no packed KV entries" in out.err
