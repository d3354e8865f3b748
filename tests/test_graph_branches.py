"""Which sites a graph's capture lets run side by side: a race detector over pretended streams, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_launches import pretend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4_bench.engine import graph_branches
from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.cuda import fusion
from dsv4_bench.engine.cuda.fusion import Fusions
from dsv4_bench.engine.graph import fixed_step
from dsv4_bench.engine.graph_branches import Branches
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.synthetic import write_checkpoint


class Stream:
    """A pretended stream: `seen` has a bit for every launch that comes before its next one."""

    current: Stream

    def __init__(self, priority: int = 0) -> None:
        self.seen = 0
        self.cuda_stream = self

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def wait_stream(self, other: Stream) -> None:
        self.seen |= other.seen


class Event:
    def __init__(self) -> None:
        self.seen = 0

    def record(self, stream: Stream) -> None:
        self.seen = stream.seen


class Launches(TorchDispatchMode):
    """Takes every torch operation for a launch on the current stream, and looks for races."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[int] = []
        self.wrote: dict[int, int] = {}
        self.read: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no address is used twice
        self.races: list[str] = []
        self.labels: list[str] = []
        self.where = ""  # the site

    def count(self) -> int:
        return len(self.before)

    def forget(self, stream: Stream) -> None:
        stream.seen = 0

    def names(self) -> list[str]:
        return [""] * len(self.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.kept.append((args, kwargs, result))
        reads = graph_branches.storages(tree_leaves((args, kwargs)))
        outputs = graph_branches.storages(tree_leaves(result))
        written = {
            argument.name
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        writes = graph_branches.storages(given[name] for name in written if name in given)
        if (outputs <= reads and not writes) or func.overloadpacket.__name__.startswith("empty"):
            return result  # a view, or memory that nobody fills
        self.launch(str(func), reads, writes | (outputs - reads))
        return result

    def launch(self, name: str, reads: set[int], writes: set[int]) -> None:
        me, stream = 1 << len(self.before), Stream.current
        needed = 0
        for address in reads | writes:
            needed |= self.wrote.get(address, 0)
        for address in writes:
            needed |= self.read.get(address, 0)
        if needed & ~stream.seen:
            missed = needed & ~stream.seen
            self.races.append(f"{self.where}: {name} beside {self.labels[missed.bit_length() - 1]}")
        self.labels.append(f"{self.where}: {name}")
        self.before.append(stream.seen)
        stream.seen |= me
        for address in writes:
            self.wrote[address] = self.wrote.get(address, 0) | me
        for address in reads:
            self.read[address] = self.read.get(address, 0) | me


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    launches = Launches()
    Stream.current = Stream()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        yield
        Stream.current = before

    def use(stream: Stream) -> None:
        Stream.current = stream

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream.current)
    monkeypatch.setattr(torch.cuda, "set_stream", use)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(graph_branches, "CapturedNodes", lambda stream: launches)
    return launches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    config = replace(TINY, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
    folder: Path = tmp_path_factory.mktemp("branches") / "ckpt"
    return Transformer(Checkpoint(write_checkpoint(folder, config, "bf16", seed=5)))


def prefilled(model: Transformer, lengths: tuple[int, ...]) -> Cache:
    cache = model.new_cache(len(lengths))
    model.forward(cache.step([[7] * length for length in lengths]), cache)
    return cache


class Peaks:
    """An observer that reads every output, and behind some sites and at the end all of them."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.looks, self.paths = 0, list[str]()

    def step_begins(self) -> None:
        torch.zeros(1)

    def after(self, site: Site, args: tuple[Any, ...], result: Any) -> None:
        self.paths.append(site.path)
        self.values += [value.abs().max() for value in site.spec.name_outputs(result).values()]

    def due(self, site: Site) -> bool:  # some of them when other branches run
        return site.op in ("attention", "compressor")

    def look(self) -> None:
        torch.stack([value.float() for value in self.values])
        self.looks += 1

    def step_done(self) -> None:
        pass


@torch.inference_mode()
def capture(
    model: Transformer, cache: Cache, launches: Launches, branches: Branches
) -> dict[str, int]:
    """The model's decode step as DecodeGraph captures it; what each site's first launch came after."""
    first: dict[str, int] = {}

    def around(site: Site, args: tuple[Any, ...]) -> Any:
        launches.where = site.path
        first[site.path] = launches.count()
        return branches.around(site, args)

    tokens = torch.tensor([3] * len(cache.lengths))
    step = fixed_step(model, cache, 256, tokens)
    for site in model.sites.values():
        site.tap = around
    try:
        with launches:
            step.advance()
            with branches.part(step.tensors()):
                x = model.embed(step.tokens)
            for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
                with branches.part([x, *step.tensors(), *layer_cache.tensors().values()]):
                    x = layer(x, layer_cache, step)
            with branches.part([x]):
                x = model.head(x)
            x.argmax(-1)
            branches.finish()
    finally:
        for site in model.sites.values():
            site.tap = None
    return first


@pytest.mark.parametrize("lengths", [(125,), (125, 3, 60)])
@pytest.mark.parametrize(
    "observed, fused", [(False, False), (True, False), (False, True), (True, True)]
)
def test_no_site_runs_beside_one_it_needs(
    model: Transformer,
    launches: Launches,
    lengths: tuple[int, ...],
    observed: bool,
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observer = Peaks() if observed else None
    cache = prefilled(model, lengths)
    ran = pretend(model, monkeypatch)
    for _ in range(2):  # the second replay comes after all of the first
        fusions = Fusions(model.sites, fused, model.dtype, observed=observed)
        branches = Branches(observer, None, fusions=fusions)
        capture(model, cache, launches, branches)
    without = [path for path, _, nodes in branches.sites if nodes == 0]
    later = {"attn/hc_post", "attn/q_head_norm", "attn/kv_rope", "attn/index/rope", "attn/core"}
    later = {f"L1/{leaf}" for leaf in later | {"attn/index/compressor/pool"}}
    assert later & set(without) == (later if fused else set())
    assert ran == ({"linears": 10, "streams": 10, "scores": 2, "core": 6} if fused else {})
    assert "L1/attn/window_write" not in without
    assert not launches.races, launches.races[:5]
    everything = (1 << launches.count()) - 1
    assert branches.origin.seen == everything  # all is joined
    if observer is not None:
        paths = [path for path, _, _ in branches.sites]
        due = sum(path.endswith(("/core", "/pool")) for path in paths)
        told = observer.paths  # of sites that were put off later than of others
        assert sorted(told) == sorted(paths * 2) and (fused or told == paths * 2)
        assert observer.looks == 2 * (due + 1)  # behind these and the last one


def test_independent_sites_do_run_side_by_side(model: Transformer, launches: Launches) -> None:
    first = capture(model, prefilled(model, (125,)), launches, Branches(None, None))

    def after(site: str, other: str) -> bool:
        """Whether the first launch of `site` comes after that of `other`."""
        return bool(launches.before[first[site]] >> first[other] & 1)

    for one, other in [
        ("ffn/shared", "ffn/experts"),
        ("ffn/shared", "ffn/gate"),
        ("attn/wkv", "attn/wq_a"),
        ("attn/compressor/wkv", "attn/wq_b"),
        ("attn/index/compressor/wkv", "attn/compressor/wkv"),
        ("attn/index/wq_b", "attn/wq_b"),
        ("attn/index/compressor/norm", "attn/compressor/pool"),
        ("attn/index/weights_proj", "attn/index/wq_b"),
    ]:
        one, other = f"L1/{one}", f"L1/{other}"
        assert not after(one, other) and not after(other, one), (one, other)
    for later, earlier in [
        ("L1/attn/core", "L1/attn/index/topk"),
        ("L1/attn/core", "L1/attn/window_write"),
        ("L1/attn/index/score", "L1/attn/index/compressor/write"),
        ("L1/ffn/sum", "L1/ffn/shared"),
        ("L2/attn/hc_pre", "L1/ffn/gate"),
    ]:
        assert after(later, earlier), (later, earlier)


def test_a_group_is_captured_in_its_order_at_the_first_call(
    model: Transformer, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its sites are listed, and told of, when they are called."""
    late, early = "attn/compressor/wgate", "attn/index/weights_proj"
    monkeypatch.setattr(fusion, "JOINS", ())
    monkeypatch.setattr(fusion, "GROUPS", ((early, "attn/wq_a", late), ("ffn/shared", "ffn/gate")))
    pretend(model, monkeypatch)
    observer = Peaks()
    branches = Branches(observer, None, fusions=Fusions(model.sites, True, model.dtype, None, True))
    capture(model, prefilled(model, (125,)), launches, branches)
    assert not launches.races, launches.races[:5]
    nodes = {path: (first, count) for path, first, count in branches.sites}
    order = [nodes[f"L1/{name}"][0] for name in (early, "attn/wq_a", late, "attn/q_norm")]
    assert order == sorted(set(order)) and all(nodes[f"L1/{n}"][1] for n in (early, late))
    assert nodes["L1/ffn/shared"][0] < nodes["L1/ffn/gate"][0] < nodes["L1/ffn/experts"][0]
    paths = [path for path, _, _ in branches.sites]
    assert paths == [path for path in model.sites if path in nodes]  # as they are called
    assert sorted(observer.paths) == sorted(paths)
    before = launches.before[nodes["L1/attn/wq_a"][0]]
    assert not before >> nodes[f"L1/{early}"][0] & 1  # side by side


def test_what_torch_launches_behind_a_site_captured_early_comes_after_it(
    model: Transformer, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(model, monkeypatch)
    monkeypatch.setattr(fusion, "KINDS", ())
    sites = [model.sites[f"L1/{name}"] for name in ("attn/wq_a", "ffn/norm", "attn/wkv")]
    x = torch.randn(1, model.config.hidden_size)
    for joins, groups in [((), (("attn/wkv", "attn/wq_a"),)), (fusion.JOINS, ())]:
        monkeypatch.setattr(fusion, "JOINS", joins)
        monkeypatch.setattr(fusion, "GROUPS", groups)
        branches = Branches(None, None, fusions=Fusions(model.sites))
        with launches, branches.part([x]):
            first, _, second = (branches.around(site, (x,)) for site in sites)
            doubled = second * 2
            branches.around(model.sites["L1/attn/q_norm"], (first,))
            branches.around(model.sites["L1/attn/kv_norm"], (doubled,))
        branches.finish()
        assert not launches.races, launches.races
        assert branches.origin.seen == (1 << launches.count()) - 1


def test_what_was_captured_early_for_another_input_is_run_again(
    model: Transformer, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(model, monkeypatch)
    monkeypatch.setattr(fusion, "JOINS", ())
    monkeypatch.setattr(fusion, "GROUPS", (("attn/wkv", "attn/wq_a"),))
    wq_a, wkv = (model.sites[f"L1/attn/{name}"] for name in ("wq_a", "wkv"))
    x, other = torch.randn(2, 1, model.config.hidden_size)
    branches = Branches(None, None, fusions=Fusions(model.sites))
    with launches, branches.part([x, other]):
        branches.around(wq_a, (x,))
        found = branches.around(wkv, (other,))
    branches.finish()
    assert torch.equal(found, wkv.run((other,))) and not launches.races


def test_a_chain_is_in_the_order_of_the_program(model: Transformer, launches: Launches) -> None:
    capture(model, prefilled(model, (125, 2)), launches, Branches(None, None, side_by_side=False))
    assert launches.before == [(1 << number) - 1 for number in range(launches.count())]


def test_a_missing_dependency_would_be_seen(
    model: Transformer, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    capture(model, prefilled(model, (125,)), launches, Branches(None, None))
    assert any("attn/core" in race for race in launches.races)


@torch.inference_mode()
def test_who_overwrites_waits_for_those_who_read_and_all_are_joined(
    model: Transformer, launches: Launches
) -> None:
    """As in a prefill: the ring is gathered, then overwritten; the last site needs neither."""
    ring, kv = torch.randn(128, 512), torch.randn(5, 512)
    slots = torch.arange(5)
    branches = Branches(None, None)
    with launches, branches.part([ring, kv, slots]):
        branches.around(model.sites["L0/attn/kv_norm"], (kv,))
        branches.around(model.sites["L0/attn/gather_swa"], (ring, kv))
        branches.around(model.sites["L0/attn/window_write"], (kv, slots, ring))
        branches.around(model.sites["L0/attn/kv_norm"], (kv,))
    branches.finish()
    assert not launches.races
    assert branches.origin.seen == (1 << launches.count()) - 1
