"""Decoding from a CUDA graph: the same numbers as op by op. Skipped where there is no H100 or H200."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ragged
import torch
from gpu_weights import RandomCheckpoint, filled_cache, layers_of
from ragged import run_step
from torch import Tensor

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda, demo
from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.cuda import fusion
from dsv4_bench.engine.cuda.fused import KINDS, Chain, norm_rope, streams
from dsv4_bench.engine.cuda.hyper import hc_post_pre_norm, joins_sum
from dsv4_bench.engine.cuda.step import CudaStep
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.generate import generate, teacher_forced_logits
from dsv4_bench.engine.graph import DecodeGraph, fixed_step
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS, Site, parse_route
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes.tap import set_taps

reason = cuda.library._device_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]

CONFIG = replace(TINY, num_hidden_layers=6, compress_ratios=(0, 4, 128, 4, 128, 4))
# By launches of their own, where a graph has V4-Flash's widths.
PUT_OFF = """L0/attn/compressor/pool L0/attn/q_head_norm L0/attn/core L0/attn/index/rope
             L1/attn/kv_rope"""
LENGTHS = (125, 3, 60)  # before the window's end, an end of a CSA window, neither


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("graph") / "ckpt"
    return Checkpoint(write_checkpoint(folder, CONFIG, "nvfp4", seed=3))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Transformer:
    model = Transformer(checkpoint, torch.bfloat16, "cuda")
    model.set_route(parse_route(["kernel"]))
    return model


texts = partial(ragged.texts, lengths=LENGTHS)
prefilled = partial(ragged.prefilled, lengths=LENGTHS)
token_of = partial(ragged.token_of, lengths=LENGTHS)


def relative_l2(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def test_graph_is_as_close_to_the_truth_as_the_eager_route(
    checkpoint: Checkpoint, model: Transformer
) -> None:
    """320 tokens of a ragged batch, over the window's end, both kinds of windows and a new capture."""
    ids = texts(320)
    exact = Transformer(checkpoint, torch.float32, "cuda")
    truth = [teacher_forced_logits(exact, text) for text in ids]
    eager, graphed = prefilled(model, ids), prefilled(model, ids)
    graph = DecodeGraph(model, graphed)
    ours, theirs = [], []
    for number in range(320):
        tokens = token_of(ids, number)
        theirs.append(model.forward(eager.step([[t] for t in tokens]), eager).cpu())
        ours.append(graph.forward(tokens).cpu())
    assert graph.captures == 2 and graphed.lengths == eager.lengths
    for b, (length, wanted) in enumerate(zip(LENGTHS, truth, strict=True)):
        wanted = wanted[length : length + 320]
        ours_b, theirs_b = (torch.stack(x)[:, b] for x in (ours, theirs))
        honest = relative_l2(theirs_b, wanted)
        error = relative_l2(ours_b, wanted)
        print(
            f"sequence {b}: graph {error:.2e}, eager {honest:.2e}, "
            f"between them {relative_l2(ours_b, theirs_b):.2e}"
        )
        assert error <= 1.2 * honest
        same = (ours_b.argmax(-1) == theirs_b.argmax(-1)).float().mean()
        assert same > 0.9


@pytest.mark.parametrize("branches, fuse", [(False, False), (True, False), (True, True)])
def test_graph_has_the_bits_of_the_same_step_op_by_op(
    model: Transformer, branches: bool, fuse: bool
) -> None:
    ids = texts(12)
    eager, graphed = prefilled(model, ids), prefilled(model, ids)
    graph = DecodeGraph(model, graphed, branches=branches, fuse=fuse)
    tokens = torch.zeros(len(ids), dtype=torch.int64, device="cuda")
    step = fixed_step(model, eager, graph.step.limit, tokens)
    for number in range(12):
        tokens.copy_(torch.tensor(token_of(ids, number)))
        wanted = run_step(model, eager, step)
        found = graph.forward(token_of(ids, number))
        assert torch.equal(found, wanted), number
    for ours, theirs in zip(graphed.layers, eager.layers, strict=True):
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor), name


@pytest.fixture(scope="module")
def flash() -> Transformer:
    """Three layers of V4-Flash's widths with few experts: what launches for several sites take."""
    config = replace(layers_of((4, 128, 0)), n_routed_experts=16)
    model = Transformer(RandomCheckpoint(config), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    model.set_route(parse_route(["kernel"]))
    return model


def filled_alike(model: Transformer, batch: int) -> Cache:
    torch.manual_seed(5)
    return filled_cache(model, batch, 509, 256)


OTHER_GROUPS = (
    ("attn/compressor/wkv", "attn/compressor/wgate", "attn/wkv", "attn/wq_a"),
    ("attn/wq_b", "attn/index/wq_b"),
    ("ffn/gate", "ffn/shared"),
)
# Launches that add in another order than the sites one by one: the streams of few tokens do.
ROUNDS = [kind for kind in KINDS if kind.launch is streams]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("other_order", [False, True])
def test_layers_of_real_sizes_have_the_bits_of_the_same_step_op_by_op(
    flash: Transformer, batch: int, other_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "JOINS", ())  # they round otherwise
    monkeypatch.setattr(fusion, "KINDS", [kind for kind in KINDS if kind not in ROUNDS])
    if other_order:
        monkeypatch.setattr(fusion, "GROUPS", OTHER_GROUPS)
    ours, theirs = (filled_alike(flash, batch) for _ in range(2))
    graph = DecodeGraph(flash, ours)
    tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
    step = fixed_step(flash, theirs, graph.step.limit, tokens)
    for number in range(5):  # over the end of a window of 4, and of 128
        ids = [100 * number + b for b in range(batch)]
        tokens.copy_(torch.tensor(ids))
        wanted = run_step(flash, theirs, step)
        found = graph.forward(ids)
        assert wanted.isfinite().all() and torch.equal(found, wanted), number
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        for name, tensor in other.tensors().items():
            assert torch.equal(layer.tensors()[name], tensor), name
    without = {path for path, _, nodes in graph.sites() if nodes == 0}
    assert set(PUT_OFF.split()) <= without, without


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("branches", [False, True])
def test_streams_in_one_launch_agree_within_rounding(
    flash: Transformer, batch: int, branches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "JOINS", ())
    ours, theirs = (filled_alike(flash, batch) for _ in range(2))
    graph = DecodeGraph(flash, ours, branches=branches)
    without = {path for path, _, nodes in graph.sites() if nodes == 0}
    assert {"L0/attn/hc_post", "L0/ffn/sum", "L0/ffn/hc_post", "L1/attn/hc_pre"} <= without
    step = fixed_step(flash, theirs, graph.step.limit, torch.zeros_like(graph.step.tokens))
    assert relative_l2(graph.forward([0] * batch), run_step(flash, theirs, step)) < 0.02


def test_the_norm_behind_the_streams_has_the_bits_of_the_norm_alone(flash: Transformer) -> None:
    """Of a hundred rows, as two orders of additions agree on most."""
    pre, norm = (flash.sites[f"L0/ffn/{name}"] for name in ("hc_pre", "norm"))
    for n in (1, 4, 16):
        for _ in range(5):
            y, x = (
                torch.randn(n, *shape, device="cuda").bfloat16() for shape in ((4096,), (4, 4096))
            )
            gates = torch.rand(n, 4, device="cuda"), torch.rand(n, 4, 4, device="cuda")
            by = {"weight": norm.params["weight"], "weight_eps": norm.params["eps"]}
            *_, u, _, _, normed = hc_post_pre_norm(y, x, *gates, **by, **pre.params)
            assert torch.equal(normed, norm.run((u,)))


@pytest.mark.parametrize("n", [1, 3, 8])
def test_streams_that_add_up_the_experts_have_the_bits_of_the_sum_alone(
    flash: Transformer, n: int
) -> None:
    pre, norm = (flash.sites[f"L0/attn/{name}"] for name in ("hc_pre", "norm"))
    total = flash.sites["L0/ffn/sum"]
    parts = torch.randn(n, 4096, device="cuda"), torch.randn(n, 4096, device="cuda")
    x = torch.randn(n, 4, 4096, device="cuda").bfloat16()
    gates = torch.rand(n, 4, device="cuda"), torch.rand(n, 4, 4, device="cuda")
    by = {"weight": norm.params["weight"], "weight_eps": norm.params["eps"], **pre.params}
    assert joins_sum(*parts, **total.params)
    wanted = total.run(parts)
    y = torch.full_like(wanted, torch.nan)
    found = hc_post_pre_norm(y, x, *gates, parts=parts, **by)
    assert torch.equal(y, wanted)
    for ours, theirs in zip(found, hc_post_pre_norm(wanted, x, *gates, **by), strict=True):
        assert torch.equal(ours, theirs)


def test_linears_of_one_input_are_joined_within_rounding(flash: Transformer) -> None:
    graph = DecodeGraph(flash, filled_alike(flash, 1), range(1))
    without = {path for path, _, nodes in graph.sites() if nodes == 0}
    assert {"L0/attn/wkv", "L0/attn/index/weights_proj", "L0/attn/compressor/wgate"} <= without
    x = torch.randn(1, 4, 4096, device="cuda").bfloat16()
    cache = filled_alike(flash, 1)
    step = fixed_step(flash, cache, graph.step.limit, graph.step.tokens)
    step.advance()
    with torch.inference_mode():
        wanted = flash.layers[0](x, cache.layers[0], step)
    assert relative_l2(graph.run(x), wanted) < 0.02


def test_replays_are_bit_identical(model: Transformer) -> None:
    ids = texts(2)
    cache = prefilled(model, ids)
    graph = DecodeGraph(model, cache)
    before = [{k: v.clone() for k, v in layer.tensors().items()} for layer in cache.layers]
    first: Tensor | None = None
    for _ in range(100):
        for layer, saved in zip(cache.layers, before, strict=True):
            for name, tensor in layer.tensors().items():
                tensor.copy_(saved[name])
        cache.lengths = list(LENGTHS)  # set back: the positions on the device have to follow
        logits = graph.forward(token_of(ids, 0)).clone()
        first = logits if first is None else first
        assert torch.equal(logits, first)
    assert graph.captures == 1


def test_ranges_of_layers_make_the_whole(model: Transformer) -> None:
    ids = texts(6)
    one, other = prefilled(model, ids), prefilled(model, ids)
    whole = DecodeGraph(model, one)
    parts = [DecodeGraph(model, other, layers) for layers in (range(2), range(2, 6))]
    for number in range(6):
        tokens = token_of(ids, number)
        wanted = whole.forward(tokens)
        with torch.inference_mode():
            x = model.embed(torch.tensor(tokens, device="cuda"))
            for part in parts:
                x = part.run(x, tokens)
            assert torch.equal(model.head(x), wanted)
        other.lengths = [length + 1 for length in other.lengths]
    with pytest.raises(DSV4Error, match="some layers only"):
        parts[0].forward([1, 2, 3])
    with pytest.raises(DSV4Error, match="starts from token ids"):
        whole.run(x)
    with pytest.raises(DSV4Error, match="2 tokens given, the cache holds 3"):
        whole.forward([1, 2])


def test_greedy_choice_feeds_the_next_replay(model: Transformer) -> None:
    ids = texts(1)
    fed, free = (DecodeGraph(model, prefilled(model, ids)) for _ in range(2))
    tokens = token_of(ids, 0)
    free.forward(tokens)
    for _ in range(5):
        logits = fed.forward(tokens)
        assert torch.equal(fed.choice, logits.argmax(-1))
        tokens = fed.choice.tolist()
        assert free.choice.tolist() == tokens
        free.forward()


def test_a_switched_route_is_captured_anew(model: Transformer) -> None:
    ids = texts(2)
    eager = prefilled(model, ids)
    graph = DecodeGraph(model, prefilled(model, ids))
    model.forward(eager.step([[t] for t in token_of(ids, 0)]), eager)
    graph.forward(token_of(ids, 0))
    try:
        model.set_route(parse_route(["kernel", "*/hc_post=reference"]))
        found = graph.forward(token_of(ids, 1))
        assert graph.captures == 2
        wanted = model.forward(eager.step([[t] for t in token_of(ids, 1)]), eager)
        assert relative_l2(found, wanted) < 0.05
    finally:
        model.set_route(parse_route(["kernel"]))


@pytest.mark.parametrize("site", ["L1/attn/compressor/pool", "L1/ffn/experts"])
def test_a_site_that_waits_for_the_device_is_named(model: Transformer, site: str) -> None:
    model.set_route(parse_route(["kernel", f"{site}=reference"]))
    try:
        with pytest.raises(CannotAnswer, match=f"^{site}: reference cannot be captured"):
            DecodeGraph(model, prefilled(model, texts(1)))
        notes: list[str] = []
        assert len(list(generate(model, [5, 6, 7], 3, note=notes.append))) == 3
        assert len(notes) == 1 and site in notes[0]
    finally:
        model.set_route(parse_route(["kernel"]))
    assert DecodeGraph(model, prefilled(model, texts(1))).captures == 1  # the device is as before


@pytest.mark.parametrize("ratios", [(), (4,), (4, 128)])
@pytest.mark.parametrize("batch, steps", [(400, 2), (3, 20), (1, 20)])
def test_the_step_kernel_makes_what_torch_makes(
    ratios: tuple[int, ...], batch: int, steps: int
) -> None:
    """Positions 0 to 401, a sequence each, and far ones; then steps of few, each at another position."""
    capacities = {r: {4: 70_000, 128: 2_100}[r] for r in ratios}
    apart = 1 if batch == 400 else 37
    for first in (0, 100, 261_900):
        before = torch.arange(batch, device="cuda") * apart + first - 1
        tokens = torch.zeros_like(before)
        given = (128, 262_400, capacities)
        wanted = FixedStep(tokens, before.clone(), *given)
        step = CudaStep(tokens, before.clone(), *given)
        for _ in range(steps):
            wanted.advance()
            step.advance()
            for mine, other in zip(step.tensors(), wanted.tensors(), strict=True):
                assert mine.dtype == other.dtype and torch.equal(mine, other)
    index = torch.randint(-1, 500, (batch, 77), device="cuda", dtype=torch.int32)
    assert torch.equal(step.pool_rows(index, 1000), wanted.pool_rows(index, 1000))


# ------------------------------------------------------------------------------ sites and observers


@pytest.mark.parametrize(
    "n, heads, d, cached",
    [(1, 64, 512, False), (3, 4, 512, False), (3, 1, 512, True), (5, 1, 128, True)],
)
def test_fused_norm_rope_and_write_have_the_bits_of_the_three(
    n: int, heads: int, d: int, cached: bool
) -> None:
    shape = (n, d) if cached else (n, heads, d)
    weight = None if not cached else torch.randn(d, device="cuda").bfloat16()
    norm = Site("L0/attn/kv_norm", OPS["rms_norm"], {"weight": weight, "eps": 1e-6}, 0)
    freqs = torch.rand(32, device="cuda")
    rope = Site("L0/attn/kv_rope", OPS["rope"], {"freqs": freqs, "inverse": False}, 0)
    write = Site("L0/attn/window_write", OPS["cache_write"], {}, 0)
    for site in (norm, rope, write):
        site.use(IMPLEMENTATIONS[site.op]["sm90"])
    for scale in (1.0, 1e-3, 1e3):
        x = torch.randn(shape, device="cuda").bfloat16() * scale
        positions = torch.tensor([0, 5, 4095, 65536, 900_000][:n], device="cuda")
        slots = torch.tensor([7, -1, 2, 0, 19][:n], device="cuda")
        y = rope(norm(x), positions)
        if not cached:
            args = [(x,), (x, positions)]
            for observed in (False, True):
                inner = [torch.full_like(x, torch.nan)]
                chain = Chain(KINDS[0], [], [norm, rope], args, inner, observed)
                assert torch.equal(norm_rope(chain), y)
                assert torch.equal(inner[0], norm(x)) == observed
            continue
        wanted = torch.full((20, d), torch.nan, device="cuda", dtype=torch.bfloat16)
        found = wanted.clone()
        write(y, slots, wanted)
        args = [(x,), (x, positions), (x, slots, found)]
        for observed in (False, True):
            found.fill_(torch.nan)
            inner = [torch.full_like(x, torch.nan) for _ in range(2)]
            norm_rope(Chain(KINDS[1], [], [norm, rope, write], args, inner, observed))
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))
            assert [torch.equal(*pair) for pair in zip(inner, (norm(x), y), strict=True)] == [
                observed,
                observed,
            ]


def test_every_site_has_its_nodes(model: Transformer) -> None:
    graph = DecodeGraph(model, prefilled(model, texts(1)), fuse=False)
    names, sites = graph.nodes(), graph.sites()
    ran = [path for path, site in model.sites.items() if site.op != "gather_swa"]
    assert sorted(path for path, _, _ in sites) == sorted(ran)
    taken = [n for _, first, count in sites for n in range(first, first + count)]
    assert len(taken) == len(set(taken)) and max(taken) < len(names)
    for path, word in {
        "L3/attn/core": "attention",
        "L3/attn/index/topk": "topk",
        "L0/ffn/hc_post": "post",
        "L2/ffn/experts": "expert",
        "embed": "embed",
    }.items():
        ((_, first, count),) = [row for row in sites if row[0] == path]
        assert count >= 1 and any(word in name for name in names[first : first + count]), (
            path,
            names[first : first + count],
        )


class Peaks:
    """A tap's observer and a graph's: the largest absolute value of every site's first output."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.looks = 0
        self.steps: list[str] = []
        self.values = torch.zeros(1024, device="cuda")

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        result = site.run(args)
        self.after(site, args, result)
        return result

    def after(self, site: Site, args: tuple[Any, ...], result: Any) -> None:
        outputs = site.spec.name_outputs(result)
        if outputs:
            value = next(iter(outputs.values()))
            self.values[len(self.paths)].copy_(value.float().abs().max())
        self.paths.append(site.path)

    def due(self, site: Site) -> bool:
        return site.op == "gate"

    def look(self) -> None:
        self.looks += 1

    def step_begins(self) -> None:
        self.steps.append("begins")

    def step_done(self) -> None:
        self.steps.append("done")


class Ticks:
    """A graph's clock: counts the starts and the stops of every site, each in a place of its own."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2048, dtype=torch.int64, device="cuda")
        self.places: list[str] = []

    def start(self, site: Site) -> None:
        self.counts[len(self.places)] += 1
        self.places.append(site.path)

    stop = start


@pytest.mark.parametrize("clocked", [False, True])
def test_observer_and_clock_see_every_site_and_change_nothing(
    model: Transformer, clocked: bool
) -> None:
    ids = texts(3)
    plain, eager = DecodeGraph(model, prefilled(model, ids)), prefilled(model, ids)
    peaks, ticks = Peaks(), Ticks() if clocked else None
    seen = DecodeGraph(model, prefilled(model, ids), observer=peaks, clock=ticks)
    step = fixed_step(model, eager, seen.step.limit, torch.zeros_like(seen.step.tokens))
    for number in range(3):
        tokens = token_of(ids, number)
        assert torch.equal(plain.forward(tokens), seen.forward(tokens))
        step.tokens.copy_(torch.tensor(tokens))
        expected = Peaks()
        set_taps(model.sites.values(), expected)
        try:
            run_step(model, eager, step)
        finally:
            set_taps(model.sites.values(), None)
        assert expected.paths == peaks.paths
        assert torch.equal(expected.values, peaks.values)
    assert (peaks.looks, peaks.steps) == (6 + 1, ["begins", "done"])  # behind gates, and at the end
    assert peaks.paths == [path for path, _, _ in seen.sites()]
    if ticks is None:
        return
    assert ticks.places == [path for path in peaks.paths for _ in range(2)]
    assert bool((ticks.counts[: len(ticks.places)] == 3).all())


# ------------------------------------------------------------------------------ generate


def test_the_demo_says_the_same_from_a_graph() -> None:
    shipped = Transformer(Checkpoint(demo.demo_checkpoint()), torch.bfloat16, "cuda")
    shipped.set_route(parse_route(["kernel"]))
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, shipped.config.vocab_size, (150,), generator=rng).tolist()
    notes: list[str] = []
    eager = list(generate(shipped, prompt, 48, graph=False, note=notes.append))
    assert not notes
    graphed = list(generate(shipped, prompt, 48, note=notes.append))
    print(len(eager), "tokens")
    assert graphed == eager and notes == ["decoding from a CUDA graph"]
    warm = [list(generate(shipped, prompt, 12, 0.8, 7, graph=g)) for g in (False, True)]
    assert warm[0] == warm[1]


def test_teacher_forced_logits_of_a_graph(model: Transformer) -> None:
    """Pieces of many tokens, of one, and of many again on the cache that the graph has filled."""
    text, notes = texts(0)[0] + texts(60)[1], []
    sizes = (130, *(1,) * 40, 5, 1)
    eager = teacher_forced_logits(model, text, sizes)
    logits = teacher_forced_logits(model, text, sizes, graph=True, note=notes.append)
    assert notes == ["decoding from a CUDA graph"]
    assert relative_l2(logits, eager) < 0.02
