"""`profile`: sites timed on captured inputs, ceilings, gates, traces and pictures"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from driver import implementations

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route, reference
from dsv4_bench.probes.judge import Judge
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.cli import output
from dsv4_bench.workbench.timing import ceilings as ceiling_module
from dsv4_bench.workbench.timing import trace
from dsv4_bench.workbench.timing.capturing import capture_pass, parse_layers, run_layer, sequences
from dsv4_bench.workbench.timing.ceilings import Ceilings, ceilings
from dsv4_bench.workbench.timing.clock import CpuClock
from dsv4_bench.workbench.timing.document import parse_gate, regressions, report
from dsv4_bench.workbench.timing.layers import time_layer
from dsv4_bench.workbench.timing.profile import Request, profile
from dsv4_bench.workbench.timing.sites import Effort, time_site

TOKENS = [(17 * i + 5) % 300 for i in range(20)]
BRIEF = Effort(0.0, 3, 3)
MACHINE = Ceilings("a CPU", 2, "2", read=1e9, copy=2e9, launch=0.0, matrix={"float32": 1e10})


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return Transformer(Checkpoint(make_checkpoint()))


@pytest.fixture(autouse=True)
def known_machine(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceilings")  # what is not true stays out of the user's cache
    monkeypatch.setattr(ceiling_module, "cache_folder", lambda: folder)
    monkeypatch.setattr(ceiling_module, "measure", lambda device: MACHINE)


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setattr(output, "reserve_stdout", lambda: None)

    def run(*words):
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


class Fixed:
    """Every call takes a second."""

    how, problem = "wall", ""

    def sample(self):
        return 1.0


def caught(model, layer=1, phase="decode", batch=1):
    tokens = sequences(TOKENS, None, batch)
    return capture_pass(model, lambda s: s.layer == layer, tokens, phase, lambda text: None)


# ------------------------------------------------------------------------------ capture


@pytest.mark.parametrize(("phase", "rows"), [("prefill", 20), ("decode", 1)])
def test_capture_has_every_op_of_the_layer_with_its_own_inputs(model, phase, rows):
    kept = caught(model, phase=phase)
    step = model.new_cache()
    step.lengths = [20 - rows]
    expected = [p for p in model.schedule(step.step([TOKENS[20 - rows :]])) if p.startswith("L1/")]
    assert [c.site.path for c in kept.calls] == expected
    assert kept.calls[0].args[0].shape[0] == rows
    assert all(site.tap is None for site in model.sites.values())


def test_a_captured_layer_runs_whole_on_its_own_inputs(model):
    """The layer's last op gives again what it gave in the forward pass, also the second time."""
    kept = caught(model, phase="prefill", batch=2)
    for _ in range(2):
        with torch.inference_mode():
            assert run_layer(model, kept, kept.layers[0]).equal(kept.calls[-1].outputs["x"])


def test_a_capture_knows_which_arguments_lie_in_the_cache(model):
    """Those come from memory in a real decode; what an op of the layer has written does not."""
    found = {call.site.path: call.cached for call in caught(model, layer=2).calls}
    assert found["L2/attn/core"] == {"window", "entries"}
    assert found["L2/attn/window_write"] == {"cache"} and found["L2/attn/wq_b"] == frozenset()


def test_sites_outside_layers_can_be_captured(model):
    kept = capture_pass(
        model, lambda s: s.path in ("embed", "head/logits"), [TOKENS], "prefill", lambda t: None
    )
    assert [c.site.path for c in kept.calls] == ["embed", "head/logits"]


def test_sequences_of_a_batch_differ():
    assert sequences([1, 2, 3], 5, 2) == [[1, 2, 3, 1, 2], [2, 3, 1, 2, 3]]
    assert sequences([1, 2, 3], None, 1) == [[1, 2, 3]]


@pytest.mark.parametrize(("text", "layers"), [("3", [3]), ("1-3", [1, 2, 3])])
def test_layers(text, layers):
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize("text", ["4", "-1", "2-1", "1-9", "x", "1-", ""])
def test_layers_that_are_refused(text):
    with pytest.raises(DSV4Error):
        parse_layers(text, 4)


# ------------------------------------------------------------------------------ times


def test_a_slow_and_wrong_kernel_shows(model):
    def slow(*args, **params):
        time.sleep(0.1)
        out, lse = reference("attention")(*args, **params)
        return out.mul(1.0).mul(1.01), lse

    with implementations(attention__slow=slow):
        model.set_route(parse_route(["reference", "*/core=slow"]))
        core = next(c for c in caught(model).calls if c.site.op == "attention")
        row = time_site(model, core, CpuClock(), MACHINE, Judge(model.dtype), BRIEF)
        model.set_route(parse_route(["reference"]))
    assert row.kernel == "slow" and row.repeats == 3
    assert row.speedup < 0.5 and row.own_error == pytest.approx(0.01, rel=1e-2)
    assert row.verdict == "over" and row.bytes > 0 and row.flops > 0
    calls = {name: sum(k["calls"] for k in found) for name, found in row.kernels.items()}
    assert calls["slow"] > calls["reference"] > 0


def test_between_the_sites_no_op_runs(model):
    """A slow op is in the time of the whole layer and not in that of the code between its sites."""

    def slow(*args, **params):
        time.sleep(0.1)
        return reference("attention")(*args, **params)

    with implementations(attention__slow=slow):
        model.set_route(parse_route(["reference", "*/core=slow"]))
        kept = caught(model)
        entry = time_layer(model, kept, kept.layers[0], CpuClock(), BRIEF)
        model.set_route(parse_route(["reference"]))
    assert min(entry["seconds"], entry["eager"]) > 0.1 > 2 * entry["between"] > 0
    assert entry["repeats"] == 3 and entry["how"] == entry["between_how"] == "wall"
    assert all(site.tap is None for site in model.sites.values())
    cache = kept.cache.layers[1].tensors()
    assert all(cache[name].equal(tensor) for name, tensor in kept.layers[0].cache.items())


def test_in_place_ops_are_timed_on_fresh_copies(model):
    pool = next(c for c in caught(model).calls if c.site.op == "compressor")
    before = {name: tensor.clone() for name, tensor in pool.before.items()}
    time_site(model, pool, CpuClock(), MACHINE, Judge(model.dtype), BRIEF)
    assert all(before[name].equal(pool.before[name]) for name in before)


def test_floor_is_the_larger_of_bytes_and_operations():
    assert MACHINE.floor(3_000_000, 1_000, "float32") == pytest.approx(3e-3)
    assert MACHINE.floor(1_000, 10_000_000, "float32") == pytest.approx(1e-3)
    assert MACHINE.bound(3_000_000, 1_000, "float32") == "memory"
    assert MACHINE.bound(1_000, 10_000_000, "bfloat16") == "compute"
    assert replace(MACHINE, launch=1.0).floor(0, 0, "float32") == 1.0


def test_ceilings_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(ceiling_module, "cache_folder", lambda: tmp_path)
    measured = []
    monkeypatch.setattr(ceiling_module, "measure", lambda device: measured.append(1) or MACHINE)
    cpu = torch.device("cpu")
    assert ceilings(cpu, print) == ceilings(cpu, print) == MACHINE and len(measured) == 1
    ceilings(cpu, print, fresh=True)
    (path,) = (tmp_path / "ceilings").iterdir()
    for damage in ("{", "[]", '{"read": 1}', path.read_text().replace("1000000000.0", "0")):
        path.write_text(damage)
        assert ceilings(cpu, print) == MACHINE
    assert len(measured) == 6


def test_measured_ceilings_are_plausible(monkeypatch):
    """The real thing, on little memory: a read is faster than 0.1 GB/s and slower than 10 TB/s."""
    monkeypatch.undo()
    monkeypatch.setattr(ceiling_module, "_CPU_BYTES", 8 << 20)
    found = ceiling_module.measure(torch.device("cpu"))
    assert 1e8 < found.read < 1e13 and 1e8 < found.copy < 1e13
    assert set(found.matrix) == {"float32", "bfloat16"} and min(found.matrix.values()) > 1e8


def test_nothing_is_timed_while_something_else_observes(model):
    class Watcher:
        def wants(self, site):
            return site.op == "attention"

        def around(self, site, args):
            return site.run(args)

    set_taps(model.sites.values(), Watcher())
    with pytest.raises(CannotAnswer, match="probes"):
        profile(model, [TOKENS], Request((1,), "", "decode", BRIEF), lambda text: None)
    set_taps(model.sites.values(), None)


def test_decode_needs_context(model):
    with pytest.raises(DSV4Error, match="2 tokens"):
        capture_pass(model, lambda s: True, [[1]], "decode", lambda text: None)


# ------------------------------------------------------------------------------ documents


@pytest.fixture(scope="module")
def document(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceilings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceiling_module, "cache_folder", lambda: folder)
        patch.setattr(ceiling_module, "measure", lambda device: MACHINE)
        return profile(
            model, [TOKENS] * 2, Request((1, 2), "", "decode", BRIEF, True), lambda text: None
        )


def test_whole_layers_stand_beside_the_sum_of_their_sites(document):
    assert [entry["layer"] for entry in document["whole"]] == [1, 2]
    for entry in document["whole"]:
        own = [s for s in document["sites"] if s["layer"] == entry["layer"]]
        assert entry["sites"] == pytest.approx(sum(s["seconds"]["reference"] for s in own))
        assert entry["seconds"] > entry["between"] > 0 and entry["comparable"]


def test_some_sites_of_a_layer_give_no_whole(model):
    found = profile(model, [TOKENS], Request((1,), "*/core", "decode", BRIEF), lambda text: None)
    assert [s["site"] for s in found["sites"]] == ["L1/attn/core"] and found["whole"] == []
    with pytest.raises(DSV4Error, match="layers asked for"):
        profile(model, [TOKENS], Request((1,), "head", "decode", BRIEF), lambda text: None)


def test_a_report_says_how_a_gpu_was_timed(document):
    copy = json.loads(json.dumps(document))
    copy["sites"][0]["how"] = dict.fromkeys(copy["sites"][0]["how"], "graph")
    copy["sites"][1]["how"]["reference"] = "waits"
    copy["whole"][0].update(
        seconds=1e-4, sites=9e-5, between=8e-6, eager=2e-3, how="graph",
        graph={"layer": 1, "seconds": 7e-5, "chain": 9.5e-5, "kernels": 40,
               "sites": [{"site": "L1/attn/core", "seconds": 1e-5}] * 8},
    )  # fmt: skip
    copy["whole"][1].update(comparable=False, problem="it waits for the GPU")
    text = report(copy)
    assert (
        "microseconds inside a CUDA graph" in text and " w |" in text and "\nw: waits for" in text
    )
    assert "add up to 90.0 us and the code between them to 8.0, together 98.0% of it" in text
    assert "launched from Python, 2000.0 us" in text and "it waits for the GPU" in text
    assert "40 kernels: 70.0 us with independent sites side by side, 95.0 us in one chain" in text
    assert "between time stamps on the device add up to 80.0 us" in text
    assert "may start while" not in text
    copy["whole"][0]["sites"] = 1e-4
    assert "together 108.0% of it (in the layer a kernel may start while" in report(copy)


@pytest.mark.parametrize(("text", "factor"), [("3%", 1.03), ("2x", 2.0), ("1.5", 1.5), ("0%", 1.0)])
def test_gates(text, factor):
    assert parse_gate(text, "time") == pytest.approx(factor)


@pytest.mark.parametrize("text", ["", "x", "-3%", "0.5x", "nan", "inf"])
def test_gates_that_are_refused(text):
    with pytest.raises(DSV4Error, match="--gate-time"):
        parse_gate(text, "time")


def changed(document, **values):
    copy = json.loads(json.dumps(document))
    for site in copy["sites"]:
        site["spread"] = dict.fromkeys(site["spread"], 0.0)
    copy["sites"][3].update(values)
    return copy


def test_slower_and_wronger_sites_are_found_and_nothing_else(document):
    base = changed(document)
    path, kernel = base["sites"][3]["site"], base["sites"][3]["kernel"]
    seconds = {name: 1.1 * value for name, value in base["sites"][3]["seconds"].items()}
    assert regressions(base, base, 1.03, 2.0) == []
    (slower,) = regressions(base, changed(document, seconds=seconds), 1.03, 2.0)
    assert (slower.site, slower.what) == (path, "time") and "+10.0%" in str(slower)
    assert regressions(base, changed(document, seconds=seconds), 1.2, 2.0) == []
    noisy = changed(document, seconds=seconds, spread={kernel: 1.0})
    assert regressions(base, noisy, 1.03, 2.0) == []
    (wronger,) = regressions(
        changed(document, own_error=1e-6), changed(document, own_error=3e-6), 1.03, 2.0
    )
    assert (wronger.site, wronger.what) == (path, "error")
    tiny = changed(document, own_error=0.0), changed(document, own_error=1.9e-7)
    assert regressions(*tiny, 1.03, 2.0) == []


def test_what_must_not_be_compared_is_refused(document):
    other = {**changed(document), "context": 7}
    with pytest.raises(CannotAnswer, match="context"):
        regressions(other, document, 1.03, 2.0)
    fewer = {**changed(document), "sites": document["sites"][1:]}
    with pytest.raises(CannotAnswer, match="sites"):
        regressions(fewer, document, 1.03, 2.0)


def test_trace_lays_sites_end_to_end_with_kernels_inside(document):
    events = [e for e in trace.of_document(document)["traceEvents"] if e["ph"] == "X"]
    for thread in (0, 1):
        sites = [e for e in events if e["tid"] == thread and "implementation" in e["args"]]
        assert [e["name"] for e in sites] == [s["site"] for s in document["sites"]]
        for left, right in pairwise(sites):
            assert right["ts"] == pytest.approx(left["ts"] + left["dur"])
        for kernel in (e for e in events if e["tid"] == thread and "calls" in e["args"]):
            around = max((s for s in sites if s["ts"] <= kernel["ts"]), key=lambda s: s["ts"])
            assert kernel["ts"] + kernel["dur"] <= around["ts"] + around["dur"] + 1e-6


# ------------------------------------------------------------------------------ command


def test_report(call, make_checkpoint):
    words = ["profile", make_checkpoint(), "--layer", "1", "--phase", "prefill", "--context", "9"]
    words += ["--seconds", "0"]
    code, out, err = call(*words, "--route", "reference", "--kernels")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("L1 (CSA), prefill, 9 tokens, float32 on a CPU")
    assert lines[2].startswith("ceilings (measured") and "read 1.0 GB/s" in lines[2]
    assert lines[4].startswith("| site") and any(line.startswith("| all sites") for line in lines)
    assert "aten::" in out
    code, out, _ = call(*words, "--json")
    document = json.loads(out)
    experts = next(s for s in document["sites"] if s["op"] == "experts")
    assert 0 < experts["bytes"] < 200_000
    assert document["total"]["reference"] > 0 and document["context"] == 9


def test_gate_plot_and_trace_through_the_command(call, make_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(CpuClock, "prepare", lambda self, make, warm=(): Fixed())
    words = ["profile", make_checkpoint(), "--sites", "L0/attn/core", "--seconds", "0"]
    code, out, _ = call(*words, "--json", "--route", "reference")
    base = json.loads(out)
    slow = json.loads(out)
    for site in slow["sites"]:
        site["seconds"] = {name: value / 1e6 for name, value in site["seconds"].items()}
        site["spread"] = dict.fromkeys(site["spread"], 0.0)
    for name, data in (("base", base), ("fast", slow)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    words += ["--route", "reference", "--gate-time", "1000x"]
    extra = ["--plot", tmp_path / "p.svg", "--trace", tmp_path / "t.json"]
    code, out, err = call(*words, "--against", tmp_path / "base.json", *extra)
    assert code == 0 and "0 of 1 sites worse" in out, err
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    code, out, _ = call(*words, "--against", tmp_path / "fast.json", "--json")
    assert code == 1 and json.loads(out)["regressions"][0]["what"] == "time"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "which layer"),
        (["--layer", "99"], 2, "layer 99"),
        (["--layer", "1", "--batch", "0"], 2, "--batch 0"),
        (["--layer", "1", "--context", "0"], 2, "--context 0"),
        (["--layer", "1", "--seconds", "nan"], 2, "--seconds"),
        (["--layer", "1", "--plot", "x.gif"], 2, "not a picture"),
        (["--layer", "1", "--trace", "/nowhere/t.json"], 2, "no such folder"),
        (["--layer", "1", "--against", "/nowhere.json"], 4, "No such file"),
        (["--layer", "1", "--nsys", "--ncu"], 2, "one at a time"),
        (["--layer", "1", "--graph", "--phase", "prefill"], 2, "a prefill is not run from"),
        (["--layer", "1", "--graph", "--device", "cpu"], 3, "the model is on cpu"),
    ],
)
def test_refused(call, make_checkpoint, words, code, message):
    found, out, err = call("profile", make_checkpoint(), *words)
    assert (found, out) == (code, "") and message in err


def test_a_base_that_is_none(call, make_checkpoint, tmp_path):
    for text, message in (("{", "not JSON"), ("{}", "not a profile"), ("[]", "not a profile")):
        (tmp_path / "base.json").write_text(text)
        words = ["--layer", "1", "--against", tmp_path / "base.json"]
        code, _, err = call("profile", make_checkpoint(), *words)
        assert code == 4 and message in err


def test_verdicts_do_not_depend_on_which_site_comes_first(call, monkeypatch):
    """The limits of an op come from all of its calls: one with a lucky reference is no alarm."""
    monkeypatch.delenv("DSV4_CKPT", raising=False)
    words = ["profile", "--sites", "L3/*/hc_pre", "--json", "--seconds", "0"]
    code, out, err = call(*words)
    assert code == 0, err
    rows = json.loads(out)["sites"]
    assert len(rows) == 2
    assert {row["verdict"] for row in rows} == {"ok"}


def test_layer_12_of_the_demo_checkpoint(call, monkeypatch):
    """The very command of the README, on a machine without a checkpoint."""
    monkeypatch.delenv("DSV4_CKPT", raising=False)
    code, out, err = call("profile", "--layer", "12", "--json", "--seconds", "0")
    assert code == 0, err
    document = json.loads(out)
    assert list(document["layers"]) == ["12"] and len(document["sites"]) > 20
    assert all(site["verdict"] == "ok" for site in document["sites"])
