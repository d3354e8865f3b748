"""FixedStep: the tensors of a captured decode step are those of Step, and a model on it computes the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.graph import DecodeGraph, fixed_step, limit_for
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.step import Step
from dsv4_bench.engine.streaming import StreamedLayer
from dsv4_bench.engine.synthetic import write_checkpoint

WINDOW, LIMIT, CAPACITIES = 8, 256, {4: 70, 128: 3}


def fixed(*positions: int) -> FixedStep:
    """One step behind `positions`, then advanced."""
    before = torch.tensor(positions) - 1
    step = FixedStep(torch.zeros_like(before), before, WINDOW, LIMIT, CAPACITIES)
    step.advance()
    return step


def planned(*positions: int) -> Step:
    tokens = torch.zeros(len(positions), dtype=torch.int64)
    return Step(tokens, positions, (1,) * len(positions), WINDOW)


PLACES = [(0,), (3, 0, 7, 8), (126, 127, 128, 4), (255, 9, 131)]


@pytest.mark.parametrize("positions", PLACES)
def test_tensors_are_those_of_a_step(positions: tuple[int, ...]) -> None:
    ours, theirs = fixed(*positions), planned(*positions)
    assert ours.starts == positions and ours.is_decode and ours.lengths == theirs.lengths
    for name in ("positions", "sequence", "ring_slots", "ring_rows"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype and torch.equal(mine, other), name
    for ratio in CAPACITIES:
        assert torch.equal(ours.visible(ratio), theirs.visible(ratio))


@pytest.mark.parametrize("positions", PLACES)
@pytest.mark.parametrize("ratio", CAPACITIES)
def test_rows_beyond_what_is_visible_are_minus_one(positions: tuple[int, ...], ratio: int) -> None:
    capacity = CAPACITIES[ratio]
    if ratio != 4:  # whose layers select
        rows, exact = (step(*positions).all_rows(ratio, capacity) for step in (fixed, planned))
        assert rows.shape == (len(positions), LIMIT // ratio) and rows.dtype == exact.dtype
        assert torch.equal(rows[:, : exact.shape[1]], exact)
        assert bool((rows[:, exact.shape[1] :] == -1).all())
    local = torch.tensor([[0, -1, 2]], dtype=torch.int32).expand(len(positions), -1)
    for step in (fixed(*positions), planned(*positions)):
        first = torch.arange(len(positions)) * capacity
        expected = torch.stack((first, torch.full_like(first, -1), first + 2), dim=1)
        assert torch.equal(step.pool_rows(local, capacity), expected.int())


@pytest.mark.parametrize("positions", PLACES)
@pytest.mark.parametrize("ratio", CAPACITIES)
def test_every_sequence_has_a_row_of_new_entries(positions: tuple[int, ...], ratio: int) -> None:
    """Of those that close, the ones of Step in its order; the others go to slot -1."""
    places, slots = fixed(*positions).new_entries(ratio, CAPACITIES[ratio])
    exact_places, exact_slots = planned(*positions).new_entries(ratio, CAPACITIES[ratio])
    closes = torch.tensor([(p + 1) % ratio == 0 for p in positions])
    assert torch.equal(slots[closes], exact_slots) and torch.equal(places[closes], exact_places)
    assert bool((slots[~closes] == -1).all())


def test_table_of_sequences_has_a_row_of_the_output_for_each() -> None:
    step = fixed(126, 127)
    assert step.closed(128) == [1, 1]
    assert step.sequence_table(128).tolist() == [[126, 1, 0, 0], [127, 1, 1, 1]]
    assert planned(126, 127).sequence_table(128).tolist() == [[126, 1, 0, -1], [127, 1, 1, 0]]


def test_advancing_is_the_step_of_the_next_position() -> None:
    step = fixed(125, 3)
    buffers = step.tokens.data_ptr(), step.positions.data_ptr()
    for later in range(1, 6):
        step.advance()
        wanted = fixed(125 + later, 3 + later)
        for mine, other in zip(step.tensors(), wanted.tensors(), strict=True):
            assert torch.equal(mine, other)
    assert buffers == (step.tokens.data_ptr(), step.positions.data_ptr())


def test_nothing_but_starts_needs_the_positions_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait(step: FixedStep) -> None:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(FixedStep, "starts", property(wait))
    step = fixed(126, 127)
    step.advance()
    assert step.is_decode and step.padded and step.rows() == [slice(0, 1), slice(1, 2)]
    assert [step.entries(ratio) for ratio in CAPACITIES] == [64, 2]
    assert step.closed(4) == [1, 1] and len(step.sequence_table(4)) == 2
    assert (
        len(step.visible(4)) == len(step.new_entries(4, 70)[0]) == len(step.all_rows(128, 3)) == 2
    )
    assert len(step.pool_rows(torch.zeros(2, 5, dtype=torch.int32), 70)) == 2


@pytest.mark.parametrize("length", [0, 1, 127, 128, 2048, 4000, 65536])
def test_limit_leaves_room(length: int) -> None:
    limit = limit_for(length)
    assert limit % 128 == 0 and length + 256 <= limit <= length + max(256, length // 8) + 128


# ------------------------------------------------------------------------------ a whole model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    config = replace(TINY, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
    folder: Path = tmp_path_factory.mktemp("fixed") / "ckpt"
    return Transformer(Checkpoint(write_checkpoint(folder, config, "bf16", seed=5)))


def prefilled(model: Transformer, lengths: tuple[int, ...]) -> Cache:
    cache = model.new_cache(len(lengths))
    rng = torch.Generator().manual_seed(1)
    pieces = [torch.randint(2, 512, (length,), generator=rng).tolist() for length in lengths]
    model.forward(cache.step(pieces), cache)
    return cache


@torch.inference_mode()
def run_fixed(model: Transformer, cache: Cache, step: FixedStep, tokens: list[int]) -> Tensor:
    """A decode step on `step`, as a graph does it, with the reference."""
    step.tokens.copy_(torch.tensor(tokens))
    step.advance()
    x = model.embed(step.tokens)
    for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
        x = layer(x, layer_cache, step)
    return model.head(x)


def test_decoding_on_a_fixed_step_is_decoding(model: Transformer) -> None:
    """A ragged batch over the window's end and the ends of both kinds of windows."""
    lengths = (125, 3, 60)
    exact, other = prefilled(model, lengths), prefilled(model, lengths)
    step = fixed_step(model, other, limit_for(140), torch.zeros(3, dtype=torch.int64))
    for number in range(8):
        tokens = [10 + number, 300 - number, 7 * number + 2]
        truth = model.forward(exact.step([[t] for t in tokens]), exact)
        logits = run_fixed(model, other, step, tokens)
        assert torch.allclose(logits, truth, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(other.layers, exact.layers, strict=True):
        for name, tensor in theirs.tensors().items():
            mine = ours.tensors()[name]
            if "entries" in name:
                rows = max(exact.lengths) // theirs.ratio
                mine, tensor = mine[:, :rows], tensor[:, :rows]
            assert torch.allclose(mine, tensor, rtol=1e-4, atol=1e-5), name


def test_a_cache_says_when_its_tensors_are_others(model: Transformer) -> None:
    cache = prefilled(model, (5,))
    before = cache.version
    model.forward(cache.step([[3]]), cache)
    assert cache.version == before
    cache.reserve(1000)
    grown = cache.version
    assert grown > before
    cache.restore(cache.snapshot())
    assert cache.version > grown


def test_without_a_gpu_there_is_no_graph(model: Transformer) -> None:
    with pytest.raises(CannotAnswer, match="needs a GPU, the model is on cpu"):
        DecodeGraph(model, model.new_cache())


def test_a_streamed_layer_is_no_part_of_a_graph(model: Transformer) -> None:
    """As `streaming.place` leaves a model: the layer is one that is fetched when it is called."""
    streamed = copy.copy(model)
    streamed.device = torch.device("cuda")
    streamed.layers = [*model.layers[:2], StreamedLayer(model.layers[2], None, 0)]  # type: ignore
    with pytest.raises(CannotAnswer, match=r"^L2: a layer whose weights are streamed"):
        DecodeGraph(streamed, model.new_cache())
