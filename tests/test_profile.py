"""`profile`: one layer's sites, timed on captured inputs."""

from __future__ import annotations

import json

import pytest
from driver import implementations

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route, reference
from dsv4_bench.workbench import cli, profiling
from dsv4_bench.workbench.cli import output
from dsv4_bench.probes.judge import Judge
from dsv4_bench.workbench.profiling import capture_layer, time_site

TOKENS = [(17 * i + 5) % 300 for i in range(20)]


@pytest.fixture(scope="module")
def model(make_checkpoint):
    return Transformer(Checkpoint(make_checkpoint()))


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(profiling, "_SITE_SECONDS", 0.0)


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setattr(output, "reserve_stdout", lambda: None)

    def run(*words):
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(("phase", "rows"), [("prefill", 20), ("decode", 1)])
def test_capture_has_every_op_of_the_layer_with_its_own_inputs(model, phase, rows):
    calls = capture_layer(model, 1, TOKENS, phase, lambda text: None)
    step = model.new_cache()
    step.lengths = [20 - rows]
    expected = [p for p in model.schedule(step.step([TOKENS[20 - rows :]])) if p.startswith("L1/")]
    assert [c.site.path for c in calls] == expected
    assert calls[0].args[0].shape[0] == rows
    assert all(site.tap is None for site in model.sites.values())


def test_a_slow_and_wrong_kernel_shows(model):
    def slow(*args, **params):
        for _ in range(20):
            out, lse = reference("attention")(*args, **params)
        return out * 1.01, lse

    with implementations(attention__slow=slow):
        model.set_route(parse_route(["reference", "*/core=slow"]))
        core = next(
            c
            for c in capture_layer(model, 1, TOKENS, "decode", lambda t: None)
            if c.site.op == "attention"
        )
        row = time_site(model, core, Judge(model.dtype))
        model.set_route(parse_route(["reference"]))
    assert row.kernel == "slow" and row.repeats >= 3
    assert row.speedup < 0.5 and row.own_error == pytest.approx(0.01, rel=1e-2)
    assert row.verdict == "over" and row.bytes > 0 and row.flops > 0


def test_in_place_ops_are_timed_on_fresh_copies(model):
    calls = capture_layer(model, 1, TOKENS, "decode", lambda text: None)
    pool = next(c for c in calls if c.site.op == "compressor")
    before = {name: tensor.clone() for name, tensor in pool.before.items()}
    time_site(model, pool, Judge(model.dtype))
    assert all(before[name].equal(pool.before[name]) for name in before)


@pytest.mark.parametrize(
    ("layer", "tokens", "phase", "message"),
    [
        (4, TOKENS, "decode", "layer 4"),
        (-1, TOKENS, "decode", "layer -1"),
        (0, [1], "decode", "2 tokens"),
    ],
)
def test_refused(model, layer, tokens, phase, message):
    with pytest.raises(DSV4Error, match=message):
        capture_layer(model, layer, tokens, phase, lambda text: None)


def test_report(call, make_checkpoint):
    words = ["profile", make_checkpoint(), "--layer", "1", "--phase", "prefill", "--context", "9"]
    code, out, err = call(*words, "--route", "reference")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("Layer 1 (CSA), prefill, 9 tokens, float32 on cpu")
    assert lines[2].startswith("| site") and lines[-1].startswith("| all sites")
    code, out, _ = call(*words, "--json")
    document = json.loads(out)
    experts = next(s for s in document["sites"] if s["op"] == "experts")
    assert 0 < experts["bytes"] < 200_000
    assert document["total"]["reference"] > 0 and document["context"] == 9


@pytest.mark.parametrize("tool", ["--nsys", "--ncu"])
def test_tools_that_are_not_built_yet(call, tool):
    code, out, err = call("profile", "--layer", "1", tool)
    assert (code, out) == (3, "") and f"{tool} is not built yet" in err


def test_layer_12_of_the_demo_checkpoint(call, monkeypatch):
    """The very command of the README, on a machine without a checkpoint."""
    monkeypatch.delenv("DSV4_CKPT", raising=False)
    code, out, err = call("profile", "--layer", "12", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["layer"] == 12 and len(document["sites"]) > 20
