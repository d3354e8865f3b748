"""Probes on a GPU: the fused statistics against the CPU's, and nobody waits before the pass is over."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, with_ratios
from torch import Tensor

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site, parse_route, spec_of
from dsv4_bench.probes.base import Probe, make_probes
from dsv4_bench.probes.honesty import measure
from dsv4_bench.probes.observation import Observation, Watch
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.stats import (
    Stats,
    Sums,
    empty_counts,
    exponent_counts,
    reduced,
    reduced_sums,
    tensor_stats,
)
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.session import DEFAULT_PROBES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
fused = pytest.mark.skipif(
    cuda.library._device_reason() is not None, reason=str(cuda.library._device_reason())
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ------------------------------------------------------------------------------ the fused reduction


def launched(views: list[cuda.stats.View], exponents: bool = False) -> tuple[Tensor, Tensor | None]:
    """Rows of `views` on the host, over memory that was NaN, and their exponent counts."""
    values = torch.full((1, len(views), 9), torch.nan, dtype=torch.float64, device="cuda")
    bins = None
    if exponents:
        bins = torch.full((1, len(views), 256), -1, dtype=torch.int32, device="cuda")
    cuda.stats.launch(views, values, exponents=bins)
    return values[0].cpu(), None if bins is None else bins[0].cpu()


def fused_stats(tensor: Tensor, index: Tensor | None = None) -> Stats:
    view = cuda.stats.moments_view(tensor, index)
    assert view is not None
    return Stats.of_row(launched([view])[0][0].tolist())


def check(found: Stats, tensor: Tensor, what: str) -> None:
    """Counts and magnitude must be the CPU's, moments those of float64 arithmetic."""
    tensor = tensor.cpu()
    expected = tensor_stats(tensor)
    assert expected is not None
    assert found[:7] == expected[:7], f"{what}: {found} instead of {expected}"
    values = tensor.double().flatten()
    values = values[values.isfinite()]
    if len(values):
        rms, mean = float(values.square().mean().sqrt()), float(values.mean())
        assert found.rms == pytest.approx(rms, rel=1e-12), what
        assert found.mean == pytest.approx(mean, abs=1e-13 * float(values.abs().mean())), what
    else:
        assert (found.rms, found.mean) == (0, 0), what


def hostile(count: int, dtype: torch.dtype) -> Tensor:
    """Random values with NaN, infinities, zeros of both signs, subnormal and clamped ones among them."""
    torch.manual_seed(count)
    top = min(torch.finfo(dtype).max, 3e38)
    values = torch.randn(count, device="cuda")
    odd = [0.0, -0.0, top, -top, math.nan, math.inf, -math.inf, -math.inf]
    odd += [torch.finfo(dtype).smallest_normal / 4] * 2 + [-3.0, 7.0, 7.0, -7.0]
    places = torch.randperm(count)[: len(odd)].cuda()
    values[places] = torch.tensor(odd, device="cuda")[: len(places)]
    return values.to(dtype)


@fused
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "count",
    [0, 1, 2, 7, 8, 9, 31, 255, 2048, 4095, 4096, 8191, 8192, 8193, 32769, 100_000, (1 << 20) + 3],
)
def test_hostile_values(count: int, dtype: torch.dtype) -> None:
    tensor = hostile(count, dtype)
    check(fused_stats(tensor), tensor, f"{count} of {dtype}")


@fused
def test_more_elements_than_chunks_of_the_usual_size() -> None:
    tensor = torch.randn((1 << 25) + 5, device="cuda").bfloat16()
    view = cuda.stats.moments_view(tensor)
    assert view is not None and view.cols > 8192
    check(fused_stats(tensor), tensor, "2^25 + 5")


@fused
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf, -math.inf, 2.0, -3e4])
def test_all_equal(fill: float, dtype: torch.dtype) -> None:
    tensor = torch.full((3, 5001), fill, device="cuda", dtype=dtype)
    check(fused_stats(tensor), tensor, f"all {fill} of {dtype}")


@fused
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: torch.dtype) -> None:
    base = hostile(40 * 1000, dtype).view(40, 1000)
    deep = hostile(7 * 6 * 500, dtype).view(7, 6, 500)
    views = {
        "rows": base[3:20],
        "every other row": base[::2],
        "columns": base[:, 100:612],
        "odd columns": base[:, 3:-2],
        "few columns": base[:, :3],
        "one column": base[:, 17:18],
        "every other column": base[:, ::2],
        "transposed": base.T,
        "offset": base.flatten()[1:],
        "offset by 3": base.flatten()[3:-1],
        "a stream": deep[:, 2],
        "part of streams": deep[:, 1:3, 5:300],
        "swapped": deep.transpose(0, 1),
        "expanded": base[0].expand(9, 1000),
        "no rows": base[:0],
        "no columns": base[:, :0],
        "a scalar": base[0, 0],
    }
    taken = [cuda.stats.moments_view(view) for view in views.values()]
    rows, _ = launched([view for view in taken if view is not None])
    assert len(rows) == len(views)
    for (name, view), row in zip(views.items(), rows.tolist(), strict=True):
        check(Stats.of_row(row), view, f"{name} of {dtype}")
    in_place = {"rows", "columns", "odd columns", "a stream", "offset", "every other row"}
    for (name, view), seen in zip(views.items(), taken, strict=True):
        assert seen is not None and (name not in in_place or seen.tensor is view), name


@fused
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_that_an_index_names(dtype: torch.dtype) -> None:
    pool = hostile(300 * 512, torch.bfloat16).view(300, 512)
    for rows in ([5], [-1], [], [7, -1, 7, 299, 0], list(range(0, 300, 3)) * 4):
        index = torch.tensor(rows, device="cuda", dtype=dtype)
        wanted = pool[[row for row in rows if row >= 0]]
        check(fused_stats(pool, index), wanted, f"rows {rows[:8]}")
        by_torch = Stats.of_row(reduced(pool, index.long()).tolist())
        check(by_torch, wanted, f"rows {rows[:8]} by torch")
    strided = torch.randn(300, 1024, device="cuda")[:, 512:]
    index = torch.tensor([3, 1, -1], device="cuda", dtype=dtype)
    check(fused_stats(strided, index), strided[[3, 1]], "rows of a view")


@fused
def test_many_tensors_in_a_launch_do_not_mix() -> None:
    torch.manual_seed(2)
    sizes = [1, 0, 4096, 50_000, 8192, 3, 262_144, 129, 16, 9000] * 25  # three launches
    tensors = [hostile(size, DTYPES[i % 3]) for i, size in enumerate(sizes)]
    views = [cuda.stats.moments_view(tensor) for tensor in tensors]
    rows, _ = launched([view for view in views if view is not None])
    for number, (tensor, row) in enumerate(zip(tensors, rows, strict=True)):
        alone = launched([cuda.stats.moments_view(tensor)])[0][0]  # type: ignore[list-item]
        assert torch.equal(row, alone), f"tensor {number} of {sizes[number]}"


@fused
def test_a_hundred_repeats_are_identical() -> None:
    tensors = [hostile(size, torch.bfloat16) for size in (1, 4096, 300_000, (1 << 20) + 3)]
    views = [view for tensor in tensors if (view := cuda.stats.moments_view(tensor)) is not None]
    first, _ = launched(views)
    for _ in range(100):
        again, _ = launched(views)
        assert torch.equal(again, first)
    shifted = torch.empty(300_001, device="cuda", dtype=torch.bfloat16)[1:]
    shifted.copy_(tensors[2])
    assert torch.equal(launched([cuda.stats.moments_view(shifted)])[0][0], first[2])  # type: ignore[list-item]


@fused
@pytest.mark.parametrize("dtype", DTYPES)
def test_exponents(dtype: torch.dtype) -> None:
    tensors = [hostile(size, dtype) for size in (0, 1, 5000, 100_003)]
    views = [view for tensor in tensors if (view := cuda.stats.moments_view(tensor)) is not None]
    _, bins = launched(views, exponents=True)
    assert bins is not None
    for tensor, counts in zip(tensors, bins, strict=True):
        assert torch.equal(counts.long(), exponent_counts(tensor.cpu())), len(tensor)
        _, powers = torch.frexp(tensor.cpu().float().abs())
        normal = tensor.cpu().float().abs() >= 2.0**-126
        normal &= tensor.cpu().isfinite()
        assert counts[1:255].sum() == normal.sum()
        for power in powers[normal].unique().tolist():
            assert counts[power + 126] == (powers[normal] == power).sum()


@fused
def test_sums() -> None:
    torch.manual_seed(4)
    comb, post = torch.rand(700, 4, 4, device="cuda"), torch.rand(700, 4, device="cuda") * 2
    spoilt, nothing = post.clone(), torch.full((3, 4), torch.nan, device="cuda")
    spoilt[5, 1], spoilt[6, 2] = torch.nan, torch.inf
    cases = [(comb, 1), (comb, 2), (comb, 0), (post, 1), (post, None), (spoilt, 1), (nothing, 1)]
    cases += [(comb[:1], 1), (comb[:, 1:3, ::2], 2), (post[:0], 1), (comb.bfloat16(), 1)]
    views = [cuda.stats.sums_view(tensor, axis) for tensor, axis in cases]
    rows, _ = launched([view for view in views if view is not None])
    for (tensor, axis), row in zip(cases, rows.tolist(), strict=True):
        found, expected = (
            Sums.of_row(row),
            Sums.of_row(reduced_sums(tensor.cpu(), axis).tolist()),
        )
        assert found == pytest.approx(expected, rel=1e-12), (list(tensor.shape), axis)


@fused
def test_empty_values_of_rows() -> None:
    torch.manual_seed(5)
    state = torch.randn(3, 128, 600, device="cuda")
    state[torch.rand_like(state) < 0.3] = -torch.inf
    state[0, 0], state[1, 1], state[2, 2, 5] = -torch.inf, torch.inf, torch.nan
    index = torch.randint(-3, 9, (130, 77), device="cuda")
    tensors = [
        state,
        state.bfloat16(),
        state.half(),
        index,
        index.int(),
        state[:, ::2, 1:],
        state[:0],
    ]
    ring = cuda.stats.Ring(torch.device("cuda"), 8, width=4000)
    views, places = [], []
    for tensor in tensors:
        places.append(places[-1] + views[-1].rows if views else 3)
        view = cuda.stats.empty_view(tensor, places[-1])
        assert view is not None
        views.append(view)
    ring.begin()
    ring.launch(views)
    (row,) = ring.fetch()
    for tensor, place in zip(tensors, places, strict=True):
        expected = empty_counts(tensor.cpu()).flatten()
        assert torch.equal(row.copies[place : place + len(expected)], expected)
    assert row.copies[:3].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------ graphs


@fused
def test_replays_write_the_ring_row_after_row() -> None:
    device = torch.device("cuda")
    inputs = [torch.zeros(size, device=device) for size in (1, 4096, 300_000)]
    ids = torch.zeros(2, 3, dtype=torch.int32, device=device)
    ring = cuda.stats.Ring(device, slots=6, steps=4, exponents=True, width=8)
    made: list[Tensor] = []

    def body() -> None:
        ring.begin()
        made[:] = [x * 2 for x in inputs]
        views = [cuda.stats.moments_view(tensor) for tensor in made]
        ring.launch([*views[:2], cuda.stats.values_view(ids, 1)])  # type: ignore[list-item]
        ring.launch([views[2]], 3)  # type: ignore[list-item]

    body()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    assert [row.number for row in ring.fetch()] == [0]
    truth = {}
    for number in range(1, 11):
        for x in inputs:
            x.copy_(hostile(len(x), torch.float32) * number)
        ids.fill_(number)
        graph.replay()
        truth[number] = [(2 * x).cpu() for x in inputs]
        if number % 3 == 0 or number == 10:
            rows = ring.fetch(used=4)
            assert [row.number for row in rows] == list(range(number - len(rows) + 1, number + 1))
            for row in rows:
                for slot, tensor in zip((0, 1, 3), truth[row.number], strict=True):
                    check(Stats.of_row(row.values[slot].tolist()), tensor, f"step {row.number}")
                    assert row.exponents is not None
                    assert torch.equal(row.exponents[slot].long(), exponent_counts(tensor))
                assert row.copies.tolist() == [0, *[row.number] * 6, 0]
    for _ in range(7):
        graph.replay()
    assert [row.number for row in ring.fetch()] == [14, 15, 16, 17]  # 11 to 13 are lost


@fused
def test_stamps_are_in_order_and_tell_a_long_kernel_from_a_short_one() -> None:
    stamps = cuda.stats.Stamps(torch.device("cuda"), slots=3, steps=8)
    x = torch.randn(6000, 6000, device="cuda")
    small = torch.ones(1, device="cuda")
    x @ x
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stamps.stamp(0, begin=True)
        y = x @ x
        stamps.stamp(1)
        small.add_(1)
        stamps.stamp(2)
    for _ in range(20):
        graph.replay()
    times = stamps.fetch()
    assert times.shape == (8, 3) and bool((times.diff(dim=1) >= 0).all())
    assert bool((times[1:, 0] >= times[:-1, 2]).all())
    long, short = times.diff(dim=1).double().median(0).values.tolist()
    print(f"{long} ns and {short} ns")
    assert long > 100e3 > 20e3 > short and y.isfinite().all()


# ------------------------------------------------------------------------------ observing


class Impatient(Observation):
    """Looks with torch's own alarm for anything that waits for the device."""

    def look(self, call: Call) -> list[Reading]:
        return self._without_waiting(lambda: super(Impatient, self).look(call))

    def end_layer(self) -> None:
        self._without_waiting(super().end_layer)

    def _without_waiting(self, run: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def readings_on(folder: Any, device: str, pieces: list[list[int]]) -> dict[Any, Reading]:
    model, watch = Transformer(Checkpoint(folder), torch.float32, device), Watch(())
    heard: list[str] = []

    def complain(probe: Any, call: Call, text: str) -> None:
        heard.append(f"{probe.name} at {call.site.path}: {text}")

    kind = Impatient if device == "cuda" else Observation
    watch.observation = kind(make_probes([*DEFAULT_PROBES, "exponents"]), complain)
    set_taps(model.sites.values(), watch)
    cache = model.new_cache()
    for watch.forward, piece in enumerate(pieces):
        model.forward(cache.step([piece]), cache)
        watch.flush()
    assert heard == []
    return {(r.forward, r.site, r.probe, r.name, r.output): r for r in watch.readings}


CONFIG = with_ratios(SMALL, 0, 4, 128)
PIECES = [[(31 * i + 7) % 300 for i in range(150)], [3], [4]]


def test_the_same_readings_as_on_the_cpu_without_waiting(make_checkpoint: MakeCheckpoint) -> None:
    cuda.stats.available(torch.device("cuda", 0))  # builds and loads the kernel
    folder = make_checkpoint("nvfp4", CONFIG)
    here, there = (readings_on(folder, device, PIECES) for device in ("cpu", "cuda"))
    seldom = ("zero", "peaks")  # rounding decides whether there are any
    missing = [key for key in here if key not in there and key[3] not in seldom]
    assert not missing, missing[:5]
    assert [r for r in there.values() if r.verdict == "alarm"] == []
    close = ("rms", "norm", "entropy", "sink_mass", "load", "entries_used", "growth", "post_max")
    for key, reading in here.items():
        if reading.name in close:
            assert there[key].value == pytest.approx(reading.value, rel=2e-3), key


@pytest.mark.parametrize("route", ["reference", "kernel"])
def test_bits_on_the_gpu(make_checkpoint: MakeCheckpoint, route: str) -> None:
    model = Transformer(Checkpoint(make_checkpoint("nvfp4", CONFIG)), torch.bfloat16, "cuda")
    model.set_route(parse_route([route]))
    found = measure(model, PIECES, make_probes(["all"]))
    assert found.changed == ()
    assert found.observed == found.ops


@fused
def test_launches_and_transfers_of_a_pass(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch a layer (and for what is outside of them), one transfer a pass."""
    launches: list[int] = []
    original = cuda.stats.launch
    monkeypatch.setattr(
        cuda.stats, "launch", lambda *a, **k: (launches.append(len(a[0])), original(*a, **k))[1]
    )
    model = Transformer(Checkpoint(make_checkpoint("nvfp4", CONFIG)), torch.bfloat16, "cuda")
    model.set_route(parse_route(["kernel"]))
    watch = Watch([p for p in make_probes(DEFAULT_PROBES) if p.captures])
    set_taps(model.sites.values(), watch)
    cache = model.new_cache()
    model.forward(cache.step([PIECES[0]]), cache)
    assert watch.readings == [] and len(launches) == 1 + len(model.layers)
    watch.flush()
    assert len(launches) == 2 + len(model.layers) and max(launches) < 96
    assert {r.probe for r in watch.readings} == {
        "stats",
        "residual",
        "hyper",
        "load",
        "softmax",
        "cache",
    }


class Scale:
    """Multiplies a buffer in place, as an op of two sites that share one output buffer would."""

    def __init__(self) -> None:
        self.buffer = torch.ones(5000, device="cuda")

    def call(self, path: str, factor: float) -> Call:
        self.buffer.mul_(factor)
        return Call(Site(path, spec_of("moe_sum"), {}, 0), {}, {"y": self.buffer})


def test_a_buffer_that_is_used_again_is_detected() -> None:
    heard: list[str] = []

    def complain(probe: Probe, call: Call, text: str) -> None:
        heard.append(f"{call.site.path}: {text}")

    observation, op = Observation(make_probes(["stats"]), complain), Scale()
    observation.look(op.call("L0/first", 2))
    observation.look(op.call("L0/second", 3))
    readings = observation.flush()
    found = {r.site: r for r in readings if r.name in ("abs_max", "error")}
    assert found["L0/second"].value == 6
    assert found["L0/first"].verdict == "alarm"
    assert "y was overwritten by L0/second" in str(found["L0/first"].detail)
    assert heard and heard[0].startswith("L0/first")


def test_an_op_that_says_it_writes_in_place_is_waited_for() -> None:
    """The earlier output is reduced before the op that overwrites it runs."""
    observation, op = Observation(make_probes(["stats"])), Scale()
    observation.look(op.call("L0/first", 2))
    rows = op.buffer.view(50, 100)
    slots = torch.arange(50, device="cuda")
    site = Site("L0/attn/window_write", spec_of("cache_write"), {}, 0)
    inputs = {"rows": rows * 5, "slots": slots, "cache": rows}
    call = Call(site, inputs, {})
    observation.before(call)
    rows.mul_(5)
    call.ran({"cache": rows})
    observation.look(call)
    found = {r.site: r.value for r in observation.flush() if r.name == "abs_max"}
    assert found == {"L0/first": 2, "L0/attn/window_write": 10}
