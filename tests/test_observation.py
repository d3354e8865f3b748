"""Watching: it changes no bit, raises no false alarm, waits for a device once, and says what it did."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, with_ratios

import dsv4_bench.engine.cpu  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.probes import base
from dsv4_bench.probes.base import Probe, make_probes
from dsv4_bench.probes.honesty import measure
from dsv4_bench.probes.observation import Observation, Watch
from dsv4_bench.probes.readings import Call, at_least, at_most, fetch, near
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.cli import main
from dsv4_bench.workbench.session import DEFAULT_PROBES

TOKENS = [(31 * i + 7) % 300 for i in range(150)]
PIECES = [TOKENS[:70], TOKENS[70:148], TOKENS[148:149], TOKENS[149:]]  # prefill, a chunk, decode


def model_of(folder: Path, dtype: torch.dtype, route: str) -> Transformer:
    model = Transformer(Checkpoint(folder), dtype)
    model.set_route(parse_route([route]))
    return model


@pytest.mark.parametrize("route", ["reference", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_probes_change_no_bit(make_checkpoint: MakeCheckpoint, dtype: torch.dtype, route: str):
    model = model_of(make_checkpoint("nvfp4"), dtype, route)
    found = measure(model, PIECES, make_probes(["all"]))
    assert found.changed == ()
    assert found.observed == found.ops > 500
    silent = {name for name, sites in found.sites.items() if not sites}
    assert silent == {"nonfinite"}  # which speaks of trouble alone
    assert found.sampled["softmax entropy"].startswith("8 of ")
    assert "output bits unchanged" in found.sentence and found.slow_down > 1


class Meddler(Probe):
    """A probe that does what probes must not."""

    name = "meddler"

    def wants(self, site: Any) -> bool:
        return site.path == "L1/attn/core"

    def observe(self, call: Call) -> Iterator[Any]:
        call.outputs["o"].mul_(1.0001)
        yield call.reading(self.name, "times", 1.0001)


def test_a_probe_that_changes_bits_is_found_out(make_checkpoint: MakeCheckpoint):
    model = model_of(make_checkpoint("nvfp4"), torch.float32, "reference")
    site = model.sites["embed"]
    site.tap = marker = lambda site, args: site.run(args)
    site.stamp.launches = 7
    found = measure(model, [TOKENS[:20], TOKENS[20:21]], [Meddler()])
    assert found.changed[:2] == ("logits of pass 0", "logits of pass 1")
    assert not any(name.startswith("L1 ring") for name in found.changed)  # written before the core
    assert "L2 ring" in found.changed and found.sites == {"meddler": 1}
    assert "PROBES CHANGED BITS of logits of pass 0 and" in found.sentence
    assert site.tap is marker and site.stamp.launches == 7  # as if nobody had measured
    assert found.observed == 2 < found.ops


CLEAN = [
    ("nvfp4", with_ratios(SMALL, 4, 128, 0), torch.float32, "reference"),
    ("deepseek", with_ratios(SMALL, 4, 128, 0), torch.bfloat16, "kernel"),
    ("bf16", with_ratios(SMALL, 4, 4), torch.bfloat16, "reference"),
    (
        "compressed-tensors",
        replace(with_ratios(SMALL, 4, 4), index_topk=4),
        torch.float32,
        "kernel",
    ),
]


@pytest.mark.parametrize(("layout", "config", "dtype", "route"), CLEAN)
def test_no_alarm_on_clean_models(
    make_checkpoint: MakeCheckpoint, layout: str, config: Any, dtype: torch.dtype, route: str
):
    model, watch = (
        model_of(make_checkpoint(layout, config), dtype, route),
        Watch(make_probes(["all"])),
    )
    set_taps(model.sites.values(), watch)
    cache = model.new_cache(batch=2)
    for watch.forward, pieces in enumerate(([TOKENS[:140], TOKENS[5:40]], [[3], [4]], [[5], [6]])):
        model.forward(cache.step(pieces), cache)
        watch.flush()
    assert [r for r in watch.readings if r.verdict not in ("ok", "info")] == []
    judged = Counter(r.name for r in watch.readings if r.verdict == "ok")
    assert judged["wrong_entries"] and judged["tail_error"] and judged["padding_mass"]


def test_no_alarm_on_packed_entries(make_checkpoint: MakeCheckpoint):
    folder = make_checkpoint("nvfp4", replace(with_ratios(SMALL, 4, 128, 0), index_topk=4))
    model, watch = Transformer(Checkpoint(folder), kv="fp8"), Watch(make_probes(["all"]))
    set_taps(model.sites.values(), watch)
    cache = model.new_cache()
    for watch.forward, piece in enumerate((TOKENS[:140], [3])):
        model.forward(cache.step([piece]), cache)
    assert [r for r in watch.readings if r.verdict not in ("ok", "info")] == []
    assert {"mass_recall", "row_sum"} <= {r.name for r in watch.readings if r.forward == 1}


def test_no_alarm_on_the_demo():
    from dsv4_bench.engine.demo import demo_checkpoint

    model, watch = (
        model_of(demo_checkpoint(), torch.bfloat16, "kernel"),
        Watch(make_probes(DEFAULT_PROBES)),
    )
    set_taps(model.sites.values(), watch)
    cache = model.new_cache()
    for watch.forward, piece in enumerate(([(17 * i + 5) % 400 for i in range(160)], [3])):
        model.forward(cache.step([piece]), cache, last_only=True)
    assert [r for r in watch.readings if r.verdict not in ("ok", "info")] == []


# ------------------------------------------------------------------------------ a device


SYNCS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


class OnDevice(torch.Tensor):
    """A tensor that says it is not on the CPU and counts what would wait for it."""

    waits: ClassVar[Counter[str]] = Counter()
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in SYNCS:
            cls.waits[func.__name__] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def away(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.as_subclass(OnDevice) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }


class Calls(Watch):
    """Keeps the calls instead of asking anybody."""

    def __init__(self) -> None:
        super().__init__(make_probes(["stats"]))
        self.calls: list[Call] = []

    def wants(self, site: Any) -> bool:
        return True

    def around(self, site: Any, args: tuple[Any, ...]) -> Any:
        bound = site.spec.bind(args, site.params)
        before = {name: bound[name].clone() for name in site.spec.mutates}
        result = site.run(args)
        outputs = dict(site.spec.name_outputs(result))
        outputs |= {name: bound[name].clone() for name in site.spec.mutates}
        self.calls.append(Call(site, bound, outputs, 0, before))
        return result


def calls_of_a_layer(make_checkpoint: MakeCheckpoint) -> list[Call]:
    folder = make_checkpoint("nvfp4", with_ratios(SMALL, 4))
    model, watch = model_of(folder, torch.float32, "reference"), Calls()
    set_taps(model.sites.values(), watch)
    cache = model.new_cache()
    model.forward(cache.step([TOKENS[:60]]), cache)
    return [call for call in watch.calls if call.site.layer == 0]


def test_a_layer_waits_for_the_device_once(make_checkpoint: MakeCheckpoint):
    """The same readings as on the CPU, fetched in one transfer when the layer is over."""
    names = ["stats", "residual", "softmax", "hyper", "load", "nonfinite", "index", "cache"]
    calls = calls_of_a_layer(make_checkpoint)
    here, there = Observation(make_probes(names)), Observation(make_probes(names))
    expected = {_key(r): r for call in calls for r in here.look(call)}
    OnDevice.waits.clear()
    for call in calls:
        inputs, outputs, before = away(call.inputs), away(call.outputs), away(call.before)
        there.look(Call(call.site, inputs, outputs, 0, before))
    assert OnDevice.waits == {}
    readings = {_key(r): r for r in there.flush()}
    assert OnDevice.waits["cpu"] == 1
    assert expected.keys() <= readings.keys()
    for key, reading in expected.items():
        assert readings[key].value == pytest.approx(reading.value, rel=1e-6, abs=1e-12)
        assert readings[key]._replace(value=0) == reading._replace(value=0)
    assert there.flush() == []


def _key(reading: Any) -> tuple[str, ...]:
    return (reading.site, reading.probe, reading.name, reading.output)


def test_a_nan_on_a_device_is_explained_at_the_flush(make_checkpoint: MakeCheckpoint):
    (call,) = [c for c in calls_of_a_layer(make_checkpoint) if c.site.path == "L0/attn/core"]
    call.outputs = {name: tensor.clone() for name, tensor in call.outputs.items()}
    call.outputs["o"][3, 1] = torch.nan
    observation = Observation(make_probes(["nonfinite"]))
    watched = Call(call.site, away(call.inputs), away(call.outputs), 0, {})
    assert observation.look(watched) == []
    found = {r.name: r.value for r in observation.flush()}
    assert found["nonfinite_slice"] == [3.0, 4.0, 1.0, 2.0, 0.0, 128.0]


def test_fetch_keeps_shapes_and_kinds():
    site = type("S", (), {"path": "p", "layer": None})()
    call = Call(site, {}, {})  # type: ignore[arg-type]
    tensors = (torch.tensor(3), torch.tensor([1.5, 2.5]), torch.tensor([4, 5]), torch.tensor(True))
    pending = [call.reading("a", str(i), t.as_subclass(OnDevice)) for i, t in enumerate(tensors)]
    values = [r.value for r in fetch([*pending, call.reading("a", "now", 7)]).readings]
    assert values == [3, [1.5, 2.5], [4, 5], True, 7]
    assert [type(v) for v in (values[0], values[2][0])] == [int, int]


def test_rules():
    nan = float("nan")
    assert [at_most(1)(v) for v in (0, 1, 2, nan)] == ["ok", "ok", "alarm", "alarm"]
    assert [at_least(1)(v) for v in (0, 1, 2, nan)] == ["alarm", "ok", "ok", "alarm"]
    assert [near(1, 0.5)(v) for v in (0.4, 0.5, 1.5, nan)] == ["alarm", "ok", "ok", "alarm"]


def test_a_probe_that_raises_is_an_alarm_and_not_the_end():
    class Broken(Probe):
        name = "broken"

        def wants(self, site: Any) -> bool:
            return True

        def observe(self, call: Call) -> Any:
            raise ValueError("no\nway")

    heard: list[str] = []
    observation = Observation([Broken()], lambda probe, call, text: heard.append(text))
    site = type("S", (), {"path": "p", "layer": None})()
    (reading,) = observation.look(Call(site, {}, {}))  # type: ignore[arg-type]
    assert (reading.name, reading.verdict, reading.value) == ("error", "alarm", "ValueError: no")
    assert heard == ["ValueError: no"]


def test_a_probe_that_cannot_say_what_it_wants():
    class Undecided(Probe):
        name = "undecided"

        def wants(self, site: Any) -> bool:
            raise KeyError("op")

    heard: list[str] = []
    site = type("S", (), {"path": "p", "layer": None})()
    observation = Observation([Undecided()], lambda probe, call, text: heard.append(text))
    assert observation.look(Call(site, {}, {})) == []  # type: ignore[arg-type]
    assert heard == ["KeyError: 'op' when asked for sites"]
    with pytest.raises(DSV4Error, match="probe undecided raised KeyError: 'op' when asked for p"):
        Watch([Undecided()]).wants(site)


# ------------------------------------------------------------------------------ a user's probe


def documented_example() -> str:
    """The code in the module's docstring."""
    text = inspect.getdoc(base) or ""
    lines = re.search(r"--plugin file:\n\n(.*?)\n\n\S", text, re.DOTALL)
    assert lines is not None
    return inspect.cleandoc(lines[1]) + "\n"


def test_the_documented_probe_runs_from_the_command_line(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    code = documented_example()
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    file, script = tmp_path / "peak.py", tmp_path / "steps.txt"
    file.write_text(code)
    script.write_text(
        "break L1/attn/wq_a\ncontinue\nprint y.abs().max()\nhonesty\nreadings L1/attn/wq_a peak\n"
    )
    arguments = [str(make_checkpoint("nvfp4")), "--plugin", str(file), "--probes", "peak"]
    assert main(["script", str(script), *arguments, "--json"]) == 0
    results = [row["result"] for row in json.loads(capfd.readouterr().out)["commands"]]
    assert results[3]["changed"] == [] and results[3]["sites"]["peak"] > 20
    (reading,) = results[-1]["readings"]
    assert (reading["site"], reading["probe"], reading["name"]) == ("L1/attn/wq_a", "peak", "peak")
    assert reading["value"] == pytest.approx(
        float(re.findall(r"[\d.]+", results[2]["text"])[0]), rel=1e-3
    )
