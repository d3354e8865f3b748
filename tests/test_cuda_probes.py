"""Probes of a model on a GPU: nobody waits before the layer is over. Skipped where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, with_ratios

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.model import Transformer
from dsv4_bench.probes.base import make_probes
from dsv4_bench.probes.honesty import measure
from dsv4_bench.probes.observation import Observation, Watch
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.session import DEFAULT_PROBES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CONFIG = with_ratios(SMALL, 0, 4, 128)
PIECES = [[(31 * i + 7) % 300 for i in range(150)], [3], [4]]


class Impatient(Observation):
    """Looks with torch's own alarm for anything that waits for the device."""

    def look(self, call: Call) -> list[Reading]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return super().look(call)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def readings_on(folder: Any, device: str) -> dict[tuple[Any, ...], Reading]:
    model, watch = Transformer(Checkpoint(folder), torch.float32, device), Watch(())
    heard: list[str] = []

    def complain(probe: Any, call: Call, text: str) -> None:
        heard.append(f"{probe.name} at {call.site.path}: {text}")

    kind = Impatient if device == "cuda" else Observation
    watch.observation = kind(make_probes(DEFAULT_PROBES), complain)
    set_taps(model.sites.values(), watch)
    cache = model.new_cache()
    for watch.forward, piece in enumerate(PIECES):
        model.forward(cache.step([piece]), cache)
        watch.flush()
    assert heard == []
    return {(r.forward, r.site, r.probe, r.name, r.output): r for r in watch.readings}


def test_the_same_readings_as_on_the_cpu_without_waiting(make_checkpoint: MakeCheckpoint):
    folder = make_checkpoint("nvfp4", CONFIG)
    here, there = readings_on(folder, "cpu"), readings_on(folder, "cuda")
    assert here.keys() <= there.keys()
    assert [r for r in there.values() if r.verdict == "alarm"] == []
    for key, reading in here.items():
        if reading.name in ("rms", "norm", "entropy", "sink_mass", "load", "entries_used"):
            assert there[key].value == pytest.approx(reading.value, rel=2e-3), key


def test_bits_on_the_gpu(make_checkpoint: MakeCheckpoint):
    model = Transformer(Checkpoint(make_checkpoint("nvfp4", CONFIG)), torch.bfloat16, "cuda")
    found = measure(model, PIECES, make_probes(["all"]))
    assert found.changed == ()
    assert found.observed == found.ops
