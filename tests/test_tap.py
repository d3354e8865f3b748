"""The tap: nothing when off, every op in order when on, and never a different bit."""

from __future__ import annotations

import pytest
import torch

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.probes.base import make_probes
from dsv4_bench.probes.readings import Call
from dsv4_bench.probes.tap import set_taps

TOKENS = [(17 * i + 5) % 300 for i in range(139)]


class Recorder:
    def __init__(self, wanted="", probes=()):
        self.wanted, self.probes = wanted, make_probes(probes)
        self.asked, self.seen = [], []

    def wants(self, site):
        self.asked.append(site.path)
        return site.path.endswith(self.wanted)

    def around(self, site, args):
        self.seen.append(site.path)
        bound = site.spec.bind(args, site.params)
        before = {name: bound[name].clone() for name in site.spec.mutates}
        result = site.run(args)
        outputs = site.spec.name_outputs(result) | {n: bound[n] for n in site.spec.mutates}
        call = Call(site, bound, outputs, 0, before)
        for probe in self.probes:
            if probe.wants(site):
                assert all(reading.site == site.path for reading in probe.observe(call))
        return result


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return Transformer(Checkpoint(make_checkpoint()))


@pytest.fixture(autouse=True)
def untapped(model):
    yield
    set_taps(model.sites.values(), None)


def run(model, pieces, observer=None):
    """Logits of all pieces, one after another."""
    cache = model.new_cache()
    set_taps(model.sites.values(), observer)
    return torch.cat([model.forward(cache.step([piece]), cache) for piece in pieces])


def test_off_means_that_nobody_is_called(model):
    observer = Recorder()
    assert set_taps(model.sites.values(), observer) == len(model.sites)
    assert set_taps(model.sites.values(), None) == 0
    run(model, [TOKENS[:5]])
    assert observer.seen == []
    launches = [site.stamp.launches for site in model.sites.values()]
    assert all(site.tap is None for site in model.sites.values()) and max(launches) >= 0


def test_an_observer_gets_only_what_it_wants(model):
    observer = Recorder("L2/attn/core")
    run(model, [TOKENS[:9], TOKENS[9:10]], observer)
    assert observer.seen == ["L2/attn/core"] * 2
    assert observer.asked == list(model.sites)  # asked once, when the tap was set


PIECES = {
    "one token": [1],
    "prefill that closes no window": [3],
    "odd prefill": [7],
    "csa closes": [4, 1, 1, 1, 1],
    "hca closes in decode": [127, 1, 1],
    "chunks": [130, 7, 2],
    "decode from nothing": [1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("sizes", PIECES.values(), ids=list(PIECES))
def test_the_schedule_is_what_runs(model, sizes):
    cache, start = model.new_cache(), 0
    for size in sizes:
        observer = Recorder()
        set_taps(model.sites.values(), observer)
        step = cache.step([TOKENS[start : start + size]])
        expected = model.schedule(step)
        model.forward(step, cache)
        assert observer.seen == expected
        start += size


def test_the_schedule_of_a_ragged_batch(model):
    cache = model.new_cache(batch=2)
    for pieces in (
        [TOKENS[:6], TOKENS[:3]],
        [TOKENS[6:7], TOKENS[3:4]],
        [TOKENS[7:9], TOKENS[4:5]],
    ):
        observer = Recorder()
        set_taps(model.sites.values(), observer)
        step = cache.step(pieces)
        expected = model.schedule(step)
        model.forward(step, cache)
        assert observer.seen == expected


@pytest.mark.parametrize("route", ["reference", "kernel"])
def test_every_probe_on_changes_no_bit(model, route):
    import dsv4_bench.engine.cpu  # noqa: F401  (registers the kernels)

    model.set_route(parse_route([route]))
    pieces = [TOKENS[:130], TOKENS[130:137], TOKENS[137:138]]
    plain = run(model, pieces)
    observer = Recorder(probes=["all"])
    assert torch.equal(run(model, pieces, observer), plain)
    assert len(observer.seen) > 300
    model.set_route(parse_route(["reference"]))
