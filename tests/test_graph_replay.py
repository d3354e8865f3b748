"""When a decode graph is captured anew, where it stands and what it is given: with a pretended CUDA, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_launches import pretend
from torch import Tensor

from dsv4_bench.engine import generate, graph, graph_branches
from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.cuda import fusion
from dsv4_bench.engine.cuda.fused import Join
from dsv4_bench.engine.cuda.fusion import Fusions
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.graph import DecodeGraph
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.engine.synthetic import write_checkpoint


class Stream:
    """A stream, an event and the nodes of a capture, none of which does anything."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def forget(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def record(self, stream: Any) -> None: ...
    def count(self) -> int:
        return 0

    def names(self) -> list[str]:
        return []


class Graph:
    """Replays by running the captured step again."""

    def __init__(self) -> None:
        self.body: Any = None

    def replay(self) -> None:
        self.body()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA that runs everything on the CPU, at once. What a capture runs leaves no trace."""
    body = DecodeGraph._body

    def record(self: DecodeGraph, step: Any, branches: Any) -> None:
        self._graph.body = lambda: body(self, step, branches)
        tensors = [step.positions, step.tokens]
        tensors += [t for layer in self.cache.layers for t in layer.tensors().values()]
        before = [tensor.clone() for tensor in tensors]
        body(self, step, branches)
        for tensor, saved in zip(tensors, before, strict=True):
            tensor.copy_(saved)

    @contextmanager
    def quiet() -> Iterator[None]:
        yield

    monkeypatch.setattr(DecodeGraph, "_body", record)
    monkeypatch.setattr(graph, "_check_place", lambda model, layers: None)
    monkeypatch.setattr(graph, "_waiting_is_an_error", quiet)
    monkeypatch.setattr(graph_branches, "CapturedNodes", Stream)
    one = Stream()
    for name, value in {
        "CUDAGraph": Graph,
        "graph": lambda *_, **__: nullcontext(),
        "synchronize": lambda: None,
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda: one,
        "set_stream": lambda stream: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    config = replace(TINY, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
    folder: Path = tmp_path_factory.mktemp("replay") / "ckpt"
    return Transformer(Checkpoint(write_checkpoint(folder, config, "bf16", seed=5)))


LENGTHS = (125, 3)


def prefilled(model: Transformer) -> Cache:
    cache = model.new_cache(len(LENGTHS))
    model.forward(cache.step([[7] * length for length in LENGTHS]), cache)
    return cache


def eager(model: Transformer, cache: Cache, tokens: list[int]) -> Tensor:
    return model.forward(cache.step([[t] for t in tokens]), cache)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("pretended")
def test_a_graph_decodes_as_op_by_op_and_grows(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "limit_for", lambda length: -(-length // 128) * 128)
    plain, cache = prefilled(model), prefilled(model)
    decode = DecodeGraph(model, cache)
    assert decode.step.limit == 128 and cache.lengths == list(LENGTHS)
    captures = []
    for number in range(6):
        tokens = [number + 5, 400 - number]
        assert close(decode.forward(tokens), eager(model, plain, tokens))
        assert cache.lengths == plain.lengths
        captures.append(decode.captures)
    assert captures == [1, 1, 1, 2, 2, 2]  # the token at position 128 is the first without room
    assert decode.step.limit == 256


@pytest.mark.usefixtures("pretended")
def test_sites_that_are_put_off_make_the_same(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all were kernels; where norm, rope and write are launched, they run one by one."""
    plain, cache = prefilled(model), prefilled(model)
    ran = pretend(model, monkeypatch)
    decode = DecodeGraph(model, cache)
    assert ran == {"streams": 5, "core": 3, "scores": 1, "linears": 5}
    for tokens in ([9, 8], [7, 6], [5, 4], [3, 2]):
        assert close(decode.forward(tokens), eager(model, plain, tokens))
    norm, rope, write = (
        model.sites[f"L1/attn/{name}"] for name in ("kv_norm", "kv_rope", "window_write")
    )
    fusions = Fusions(model.sites)
    x, positions = torch.randn(2, 512), torch.tensor([4, 5])
    later = fusions.take(norm, (x,))
    assert later.run is None
    again = fusions.take(rope, (later.result, positions))
    with pytest.raises(RuntimeError, match=r"^L0/attn/wkv reads what a later launch computes"):
        fusions.take(model.sites["L0/attn/wkv"], (again.result,))
    fusions = Fusions(model.sites, wanted=False)
    assert all(
        fusions.take(site, (x, positions, x)).run is not None for site in (norm, rope, write)
    )


def test_a_join_is_of_one_input_and_of_kernels(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = pretend(model, monkeypatch)
    names = "attn/wkv", "attn/compressor/wkv", "attn/compressor/wgate"
    monkeypatch.setattr(fusion, "JOINS", (Join("attn/wq_a", names),))
    wq_a, wkv, wgate = (model.sites[f"L2/attn/{n}"] for n in ("wq_a", "wkv", "compressor/wgate"))
    x, other = torch.randn(2, 1, model.config.hidden_size)
    fusions = Fusions(model.sites)
    call = fusions.take(wq_a, (x,))
    assert call.run is not None and close(call.run(), wq_a.run((x,)))
    assert len(call.made) == 3 and ran["linears"] == 1
    known = fusions.take(wkv, (x,))
    assert known.run is None and close(known.result, wkv.run((x,)))
    again = fusions.take(wgate, (other,))  # not what was joined
    assert again.run is not None and close(again.run(), wgate.run((other,)))
    monkeypatch.setattr(wkv.stamp, "implementation", "reference")
    call = Fusions(model.sites).take(wq_a, (x,))
    assert call.run is not None and close(call.run(), wq_a.run((x,))) and not call.made
    assert ran["linears"] == 1


@pytest.mark.usefixtures("pretended")
def test_a_cache_that_was_set_back_is_followed(model: Transformer) -> None:
    plain, cache = prefilled(model), prefilled(model)
    decode = DecodeGraph(model, cache)
    first = eager(model, plain, [9, 8])
    before = cache.snapshot()
    assert close(decode.forward([9, 8]), first)
    decode.forward([1, 2])
    cache.restore(before)  # other tensors
    assert close(decode.forward([9, 8]), first) and decode.captures == 2
    for layer, saved in zip(cache.layers, before["layers"], strict=True):  # the same tensors
        for name, tensor in layer.tensors().items():
            tensor.copy_(saved[name])
    cache.lengths = list(LENGTHS)
    assert close(decode.forward([9, 8]), first) and decode.captures == 2
    assert close(decode.forward([3, 4]), eager(model, plain, [3, 4]))


@pytest.mark.usefixtures("pretended")
def test_choices_are_greedy_and_feed_the_next_step(model: Transformer) -> None:
    fed, free = DecodeGraph(model, prefilled(model)), DecodeGraph(model, prefilled(model))
    tokens = [9, 8]
    free.forward(tokens)
    for _ in range(3):
        assert torch.equal(fed.forward(tokens).argmax(-1), fed.choice)
        tokens = fed.choice.tolist()
        assert free.choice.tolist() == tokens
        free.forward()


@pytest.mark.usefixtures("pretended")
def test_ranges_make_the_whole_and_wrong_calls_are_named(model: Transformer) -> None:
    one, other = prefilled(model), prefilled(model)
    whole = DecodeGraph(model, one)
    parts = [DecodeGraph(model, other, layers) for layers in (range(1), range(1, 3))]
    for tokens in ([5, 6], [7, 8]):
        x = model.embed(torch.tensor(tokens))
        for part in parts:
            x = part.run(x, tokens)
        assert close(model.head(x), whole.forward(tokens))
        other.lengths = [length + 1 for length in other.lengths]
    with pytest.raises(DSV4Error, match="some layers only"):
        parts[0].forward([1, 2])
    with pytest.raises(DSV4Error, match="starts from token ids"):
        whole.run(x)
    with pytest.raises(DSV4Error, match="3 tokens given, the cache holds 2"):
        whole.forward([1, 2, 3])
    with pytest.raises(DSV4Error, match="99999"):
        whole.forward([1, 99999])


@pytest.mark.usefixtures("pretended")
def test_another_route_is_captured_anew(model: Transformer) -> None:
    decode = DecodeGraph(model, prefilled(model))
    decode.forward([5, 6])
    model.set_route(parse_route(["reference"]))  # what it was
    decode.forward([5, 6])
    assert decode.captures == 1
    model.sites["L0/attn/wkv"].use(model.sites["L0/attn/wkv"].impl)
    decode.forward([5, 6])
    assert decode.captures == 2


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generate_takes_the_graph_and_says_so(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(generate, "can_use_graph", lambda model: True)
    notes: list[str] = []
    prompt = list(range(20, 60))
    plain = list(generate.generate(model, prompt, 12, temperature, 3, graph=False))
    found = list(generate.generate(model, prompt, 12, temperature, 3, note=notes.append))
    assert found == plain and notes == ["decoding from a CUDA graph"]
    sizes = (30, 1, 1, 1, 4, 1)
    logits = generate.teacher_forced_logits(model, prompt, sizes, graph=True, note=notes.append)
    assert close(logits, generate.teacher_forced_logits(model, prompt)) and len(notes) == 2


def test_only_kernels_on_a_gpu_make_a_graph(model: Transformer) -> None:
    assert not generate.can_use_graph(model)
    notes: list[str] = []
    assert list(generate.generate(model, [5, 6], 2, note=notes.append)) and not notes
