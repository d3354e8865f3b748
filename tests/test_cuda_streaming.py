"""Streamed weights on a GPU: the same bits as resident ones, within the budget; copies and graphs."""

from __future__ import annotations

import pytest
import torch
from test_streaming import ids_for
from torch import Tensor

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import streaming
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo import resolve_checkpoint
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.generate import generate, teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.engine.streaming import HostLayer, Streamer, layer_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return Checkpoint(resolve_checkpoint(None))


def sizes_of(checkpoint: Checkpoint) -> tuple[int, list[int]]:
    """Bytes outside the layers, and of each layer."""
    probe = Transformer(checkpoint, torch.bfloat16)
    return layer_bytes(probe, None), [layer_bytes(probe, i) for i in range(len(probe.layers))]


def least(checkpoint: Checkpoint) -> int:
    """The smallest budget there is: two layers."""
    rest, sizes = sizes_of(checkpoint)
    return rest + 2 * max(sizes)


@pytest.mark.parametrize("share", [None, 0.5, 0.8])
def test_same_bits_within_the_budget(
    gpu: torch.device, demo: Checkpoint, share: float | None
) -> None:
    """Logits as with resident weights; memory for weights never above the budget."""
    rest, sizes = sizes_of(demo)
    budget = least(demo) if share is None else int(share * (rest + sum(sizes)))
    ids, chunks = ids_for(Transformer(demo), 200), (150, 1, 1, 1, 30)

    def run(limit: int) -> tuple[Tensor, int, int, list[str]]:
        """Logits, bytes after loading, the most bytes on top of them, notes."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model, notes = streaming.open_model(demo, torch.bfloat16, gpu, budget=limit)
        loaded = torch.cuda.max_memory_allocated() - before
        model.set_route(parse_route(["kernel"]))
        teacher_forced_logits(model, ids, chunks)  # builds, loads libraries
        torch.cuda.reset_peak_memory_stats()
        logits = teacher_forced_logits(model, ids, chunks)
        assert torch.equal(teacher_forced_logits(model, ids, chunks), logits)
        return logits, loaded, torch.cuda.max_memory_allocated() - before - loaded, notes

    want, all_weights, work, notes = run(1 << 40)
    assert not notes and abs(all_weights - (rest + sum(sizes))) <= 1 << 20
    got, loaded, more, notes = run(budget)
    print(
        f"weights {all_weights}, budget {budget}: {loaded} loaded, {more} on top, resident {work}"
    )
    assert torch.equal(got, want)
    assert loaded <= budget < all_weights
    assert more <= work + (1 << 20)
    assert len(notes) == 1 and "are streamed from host memory" in notes[0], notes


def test_generates_the_same(gpu: torch.device, demo: Checkpoint) -> None:
    texts = []
    for budget in (1 << 40, least(demo)):
        model, _ = streaming.open_model(demo, torch.bfloat16, gpu, budget=budget)
        model.set_route(parse_route(["kernel"]))
        texts.append(list(generate(model, ids_for(model, 50), 24, graph=False)))
    assert texts[0] == texts[1]


def test_unpinned_memory_works_and_is_named(
    gpu: torch.device, demo: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert streaming.pinned(0) is None  # the driver refuses; what follows must not see its error
    assert float(torch.ones(1, device=gpu) + 1) == 2
    memory = streaming.pinned(1 << 20)
    assert memory is not None and memory.is_pinned()
    monkeypatch.setattr(streaming, "pinned", lambda size: None)
    logits = []
    for limit in (least(demo), 1 << 40):
        model, notes = streaming.open_model(demo, torch.bfloat16, gpu, budget=limit)
        model.set_route(parse_route(["kernel"]))
        logits.append(teacher_forced_logits(model, ids_for(model, 60), (50, 1)))
        if limit < 1 << 40:
            assert "16 streamed layers are not in pinned memory" in notes[1]
    assert torch.equal(*logits)


def test_a_graph_with_a_streamed_layer_is_refused(gpu: torch.device) -> None:
    copies = streaming.CudaCopies(gpu)
    layers = []
    buffers = copies.buffers(1024)
    for number in range(3):
        layer = HostLayer()
        layer.put(buffers[number % 2])(torch.full((8,), number, dtype=torch.uint8))
        layers.append(layer)
    streamer = Streamer(layers, buffers, copies)
    with streamer.loaded(0):
        pass
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(CannotAnswer, match="cannot be part of a CUDA graph"),
        torch.cuda.graph(graph),
        streamer.loaded(0),
    ):
        pass
    with streamer.loaded(1):
        assert buffers[1][:8].tolist() == [1] * 8
