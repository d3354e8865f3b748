"""Timing on a GPU: what a clock says of calls whose time is known, and a profile of a whole layer."""

from __future__ import annotations

import statistics

import pytest
import torch

from dsv4_bench.engine import cuda
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo import demo_checkpoint
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.workbench.timing.capturing import sequences
from dsv4_bench.workbench.timing.ceilings import ceilings
from dsv4_bench.workbench.timing.cuda_clock import CudaClock, events, waits
from dsv4_bench.workbench.timing.kernels import kernels_of
from dsv4_bench.workbench.timing.profile import Request, count, profile
from dsv4_bench.workbench.timing.sites import Effort

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or not cuda.timing.available(), reason="needs sm_90a kernels"
)


@pytest.fixture(scope="module")
def clock() -> CudaClock:
    return CudaClock()


def median(timed, samples: int = 31) -> float:
    return statistics.median(timed.sample() for _ in range(samples))


def test_a_long_call_takes_what_events_say(clock: CudaClock) -> None:
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    timed = clock.prepare(lambda: lambda: a @ a)
    assert (timed.how, timed.problem) == ("graph", "")
    queued = statistics.median(events(lambda: [a @ a for _ in range(20)]) for _ in range(9)) / 20
    assert median(timed) == pytest.approx(queued, rel=0.1)


def test_a_kernel_that_does_nothing_takes_about_a_microsecond(clock: CudaClock) -> None:
    one = torch.zeros(1, device="cuda")
    timed = clock.prepare(lambda: lambda: one.add_(1), [one])
    assert 0.2e-6 < median(timed, 101) < 4e-6


@needs_kernels
def test_weights_come_from_memory_and_activations_from_the_cache(clock: CudaClock) -> None:
    """A pass over 12 MiB, which fits the L2: cold at most at the memory's speed, warm faster."""
    data = torch.randn(3 << 20, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    call = lambda: lambda: cuda.timing.read_pass(data, sink)  # noqa: E731
    cold, warm = median(clock.prepare(call)), median(clock.prepare(call, [data]))
    read = ceilings(torch.device("cuda"), lambda text: None).read
    assert cold > data.nbytes / read and warm < cold
    assert int(sink) == 0


@needs_kernels
def test_ceilings_are_those_of_a_gpu() -> None:
    found = ceilings(torch.device("cuda"), lambda text: None, fresh=True)
    assert 1e12 < found.copy < 1.05 * found.read < 9e12
    assert found.matrix["float8"] > found.matrix["bfloat16"] > found.matrix["float32"] > 1e13
    assert 0.2e-6 < found.launch < 4e-6


def test_calls_that_wait_are_known(clock: CudaClock) -> None:
    one = torch.zeros(1, device="cuda")
    assert waits(lambda: one.item()) and not waits(lambda: one.add_(1))
    timed = clock.prepare(lambda: lambda: one.item())
    assert timed.how == "waits" and timed.problem and timed.sample() > 0


def test_what_cannot_be_captured_is_timed_otherwise_and_harms_nothing(clock: CudaClock) -> None:
    one = torch.zeros(1, device="cuda")

    def refuses() -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        one.add_(1)

    timed = clock.prepare(lambda: refuses)
    assert timed.how == "stream" and timed.problem and timed.sample() > 0
    torch.randn(8, device="cuda")  # as if nothing had happened
    assert clock.prepare(lambda: lambda: one.add_(1)).how == "graph"


def test_graphs_leave_no_memory_behind(clock: CudaClock) -> None:
    x = torch.randn(1 << 20, device="cuda")
    clock.prepare(lambda: lambda: x * 2)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        clock.prepare(lambda: lambda: x * 2)
    assert torch.cuda.memory_allocated() == before


def test_kernels_inside_a_call_are_named() -> None:
    x = torch.randn(64, device="cuda")
    (kernel,) = kernels_of(lambda: x.mul_(2), torch.device("cuda"))
    assert kernel["calls"] == 1 and 0 < kernel["seconds"] < 1e-3


@pytest.fixture(scope="module")
def model() -> Transformer:
    import dsv4_bench.engine.implementations  # noqa: F401

    model = Transformer(Checkpoint(demo_checkpoint()), torch.bfloat16, "cuda")
    model.set_route(parse_route(["kernel"]))
    return model


@needs_kernels
@pytest.mark.parametrize("graph", [False, True])
def test_the_sites_of_a_decode_layer_add_up_to_the_layer(model: Transformer, graph: bool) -> None:
    tokens = sequences([(17 * i + 5) % 300 for i in range(158)], None, 1)
    request = Request((3,), "", "decode", Effort(0.1, 20, 60), graph=graph)
    document = profile(model, tokens, request, lambda text: None)
    assert all(site["kernel"] in ("sm90", "sm90+cutedsl") for site in document["sites"])
    assert {site["how"][site["kernel"]] for site in document["sites"]} == {"graph"}
    assert {site["verdict"] for site in document["sites"]} == {"ok"}
    (whole,) = document["whole"]
    assert whole["comparable"] and whole["eager"] > whole["seconds"]
    # In the layer the start of a site, 0.9 us as a dependent node (docs/cuda_timing.md), may lie beside
    # the end of the one before: programmatic launches. By themselves all sites pay for it.
    beside = whole["sites"] + whole["between"] - whole["seconds"]
    tenth = 0.1 * whole["seconds"]
    assert -tenth <= beside <= tenth + 0.9e-6 * len(document["sites"])
    if graph:
        found = whole["graph"]
        assert found["seconds"] <= 1.05 * found["chain"]
        stamped = [s["site"] for s in found["sites"]]  # some sites are launched with the next
        assert len(stamped) > 10 and set(stamped) <= {s["site"] for s in document["sites"]}


@needs_kernels
def test_every_op_is_run_for_ncu(model: Transformer) -> None:
    request = Request((3,), "*/core", "decode", Effort())
    assert count(model, [[1, 2, 3, 4]], request, lambda text: None) == 1
