"""Probes and clocks inside the decode step's CUDA graph. Skipped where there is no H100 or H200."""

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
from dsv4_bench.engine import cuda
from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.cuda import fusion
from dsv4_bench.engine.cuda.fused import streams
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.graph import DecodeGraph, fixed_step
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site, parse_route
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes.base import make_probes
from dsv4_bench.probes.graph_clock import SiteClock, stamp_cost
from dsv4_bench.probes.graph_watch import GraphWatch, split
from dsv4_bench.probes.observation import Watch
from dsv4_bench.probes.readings import Reading
from dsv4_bench.probes.stats import tensor_stats
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.session import DEFAULT_PROBES

reason = cuda.library._device_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]

CONFIG = replace(TINY, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4))
LENGTHS = (125, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder: Path = tmp_path_factory.mktemp("graph") / "ckpt"
    checkpoint = Checkpoint(write_checkpoint(folder, CONFIG, "nvfp4", seed=3))
    model = Transformer(checkpoint, torch.bfloat16, "cuda")
    model.set_route(parse_route(["kernel"]))
    return model


texts = partial(ragged.texts, lengths=LENGTHS)
prefilled = partial(ragged.prefilled, lengths=LENGTHS)
token_of = partial(ragged.token_of, lengths=LENGTHS)


def watch_of(model: Transformer, names: Any = DEFAULT_PROBES, steps: int = 4) -> GraphWatch:
    return GraphWatch(
        split(make_probes(names))[0], len(model.sites), model.device, len(LENGTHS), steps
    )


def by_key(readings: list[Reading]) -> dict[Any, Reading]:
    return {(r.forward, r.site, r.probe, r.name, r.output): r for r in readings}


def test_readings_in_a_graph_are_those_of_the_same_steps_op_by_op(model: Transformer) -> None:
    """To the last bit, where compressors close windows too; and the same logits with and without."""
    ids = texts(5)
    plain, watched = prefilled(model, ids), prefilled(model, ids)
    without, watch = DecodeGraph(model, plain), watch_of(model, [*DEFAULT_PROBES, "exponents"])
    graph = DecodeGraph(model, watched, observer=watch)
    readings: list[Reading] = []
    for number in range(5):
        tokens = token_of(ids, number)
        assert torch.equal(without.forward(tokens), graph.forward(tokens))
        readings += watch.readings()
    wanted = op_by_op(model, prefilled(model, ids), graph, [token_of(ids, i) for i in range(5)])
    assert watch.missed == 0 and len(readings) > 3000
    same_readings(readings, wanted)
    assert not [r for r in readings if r.verdict == "alarm"]


def op_by_op(
    model: Transformer, cache: Cache, graph: DecodeGraph, tokens: list[list[int]]
) -> list[Reading]:
    """Readings of the default probes and `exponents` of the same steps, launched one by one."""
    observer = Watch(split(make_probes([*DEFAULT_PROBES, "exponents"]))[0])
    step = fixed_step(model, cache, graph.step.limit, torch.zeros_like(graph.step.tokens))
    set_taps(model.sites.values(), observer)
    try:
        for observer.forward, given in enumerate(tokens):
            step.tokens.copy_(torch.tensor(given))
            run_step(model, cache, step)
            observer.flush()
    finally:
        set_taps(model.sites.values(), None)
    return observer.readings


def same_readings(some: list[Reading], others: list[Reading]) -> None:
    found, expected = by_key(some), by_key(others)
    assert found.keys() == expected.keys()
    different = [(found[key], expected[key]) for key in found if found[key] != expected[key]]
    assert not different, different[:3]


@pytest.mark.parametrize("batch", [1, 3])
def test_readings_of_layers_of_real_sizes_are_those_op_by_op(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: what launches of several sites leave for whoever looks is what the sites return."""
    config = replace(layers_of((4, 128)), n_routed_experts=16)
    flash = Transformer(RandomCheckpoint(config), torch.bfloat16, "cuda")  # type: ignore[arg-type]
    flash.set_route(parse_route(["kernel"]))
    monkeypatch.setattr(fusion, "JOINS", ())  # these and the streams' norm round otherwise
    monkeypatch.setattr(fusion, "KINDS", [k for k in fusion.KINDS if k.launch is not streams])
    probes = split(make_probes([*DEFAULT_PROBES, "exponents"]))[0]
    watch = GraphWatch(probes, len(flash.sites), flash.device, batch)
    tokens = [
        [100 * number + b for b in range(batch)] for number in range(4)
    ]  # over a window's end
    readings: list[Reading] = []
    torch.manual_seed(5)
    graph = DecodeGraph(flash, filled_cache(flash, batch, 509, 256), observer=watch)
    for given in tokens:
        graph.forward(given)
        readings += watch.readings()
    torch.manual_seed(5)
    wanted = op_by_op(flash, filled_cache(flash, batch, 509, 256), graph, tokens)
    without = {path for path, _, nodes in graph.sites() if nodes == 0}
    inner = {"attn/core", "attn/q_head_norm", "attn/kv_rope", "attn/compressor/pool"}
    assert {f"L{i}/{leaf}" for i in range(2) for leaf in inner} | {"L0/attn/index/rope"} <= without
    assert len(readings) > 1500
    same_readings(readings, wanted)


def test_the_ring_holds_what_the_tensors_held_when_the_site_had_run(model: Transformer) -> None:
    """Every number in the ring is that of the output itself, copied right behind its site."""
    ids = texts(3)
    watch, copies = watch_of(model, ["stats", "load"]), dict[Any, Tensor]()

    class Copying:
        """Copies every output right behind its site, and passes everything on."""

        def due(self, site: Site) -> bool:
            return True

        def after(self, site: Site, args: tuple[Any, ...], result: Any) -> None:
            for name, tensor in site.spec.name_outputs(result).items():
                copies[site.path, name] = tensor.clone()
            watch.after(site, args, result)

        step_begins = staticmethod(watch.step_begins)
        look = staticmethod(watch.look)
        step_done = staticmethod(watch.step_done)

    graph = DecodeGraph(model, prefilled(model, ids), observer=Copying())
    for number in range(3):
        graph.forward(token_of(ids, number))
    readings = by_key(watch.readings())
    for (path, name), tensor in copies.items():
        stats = tensor_stats(tensor.cpu())
        if stats is None:
            continue
        for field in ("abs_max", "rms", "mean"):
            value = readings[2, path, "stats", field, name].value
            assert value == pytest.approx(getattr(stats, field), rel=1e-9, abs=1e-12), (path, field)
        if name == "scores":
            load = readings[2, path, "load", "load", ""].value
            chosen = copies[path, "experts"].flatten().cpu().long()
            assert load == chosen.bincount(minlength=tensor.shape[1]).tolist()
    assert len(copies) > 100


def test_a_nan_is_said_where_it_is_made(model: Transformer) -> None:
    ids = texts(3)
    watch = watch_of(model)
    graph = DecodeGraph(model, prefilled(model, ids), observer=watch)
    graph.forward(token_of(ids, 0))
    assert not [r for r in watch.readings() if r.verdict == "alarm"]
    weight: Tensor = model.sites["L2/attn/norm"].params["weight"]
    before = weight[7].clone()
    weight[7] = torch.nan
    graph.forward(token_of(ids, 1))
    weight[7] = before
    alarms = [r for r in watch.readings() if r.verdict == "alarm"]
    first = next(r for r in alarms if r.name == "first_nonfinite")
    assert first.site == "L2/attn/norm" and first.value == [0.0, 7.0]
    assert {r.site for r in alarms if r.name == "nan"} > {"L2/attn/norm", "head/logits"}


def test_steps_that_were_not_fetched_are_counted(model: Transformer) -> None:
    ids = texts(12)
    watch = watch_of(model, ["stats"], steps=2)
    graph = DecodeGraph(model, prefilled(model, ids), observer=watch)
    for number in range(7):
        graph.forward(token_of(ids, number))
    assert {r.forward for r in watch.readings()} == {5, 6} and watch.missed == 5
    graph.forward(token_of(ids, 7))
    assert {r.forward for r in watch.readings()} == {7} and watch.missed == 5


def test_a_new_capture_goes_on_in_the_same_ring(model: Transformer) -> None:
    ids = texts(300)
    watch = watch_of(model, ["stats"])
    graph = DecodeGraph(model, prefilled(model, ids), observer=watch)
    sites: dict[int, set[Any]] = {}
    for number in range(300):
        graph.forward(token_of(ids, number))
        if number < 2 or graph.captures == 2:
            readings = watch.readings()
            assert readings[-1].forward == number
            sites[graph.captures] = {(r.site, r.output) for r in readings if r.name == "rms"}
        if len(sites) == 2:
            break
    assert 250 < number < 299 and watch.missed > 240
    assert sites[1] == sites[2]


def test_probes_that_look_at_tensors_are_refused(model: Transformer) -> None:
    with pytest.raises(CannotAnswer, match="do not work in a CUDA graph: index"):
        GraphWatch(make_probes(DEFAULT_PROBES), 4, model.device)


@pytest.mark.parametrize("branches", [False, True])
def test_the_clock_times_every_site(model: Transformer, branches: bool) -> None:
    ids = texts(3)
    clock = SiteClock(len(model.sites), model.device, steps=16)
    graph = DecodeGraph(model, prefilled(model, ids), clock=clock, branches=branches)
    for number in range(3):
        graph.forward(token_of(ids, number))
    times = clock.times(graph)
    assert [time.path for time in times] == [path for path, _, _ in graph.sites()]
    total, cost = sum(time.microseconds for time in times), stamp_cost(model.device)
    print(f"a stamp {cost:.2f} us, {len(times)} sites {total:.0f} us, slowest:")
    for time in sorted(times, key=lambda time: -time.microseconds)[:8]:
        print(f"  {time.path} {time.microseconds:.2f} ({time.low:.2f} to {time.high:.2f})")
    assert 0.2 < cost < 10 and all(time.microseconds > -cost for time in times)
    named = {time.path: " ".join(time.kernels) for time in times}
    for path, word in (("L1/attn/core", "attention"), ("L1/ffn/gate", "gate")):
        assert word in named[path] and "stamp" not in named[path]
    assert clock.times() == []
