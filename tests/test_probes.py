"""What each probe reads, on tensors made for it, and on a healthy engine."""

from __future__ import annotations

import pytest
import torch

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.formats import Weight, quantize_nvfp4
from dsv4_bench.engine.registry import Site, reference, spec_of
from dsv4_bench.probes.base import Probe, make_probes, probe, probe_that_reads
from dsv4_bench.probes.observation import Observation
from dsv4_bench.probes.readings import Call


def call_of(op, *args, path=None, change=None, **params):
    """A call of the reference; `change(outputs)` damages what it returned."""
    site = Site(path or f"L1/attn/{op}", spec_of(op), params, 1)
    outputs = site.spec.name_outputs(reference(op)(*args, **params))
    if change:
        change(outputs)
    return Call(site, site.spec.bind(args, params), outputs)


def read(name, call):
    found = make_probes([name])[0]
    assert found.wants(call.site)
    observation = Observation([found], fail)
    return {reading.name: reading for reading in observation.look(call) + observation.flush()}


def fail(probe, call, text):
    raise AssertionError(f"{probe.name} raised {text} at {call.site.path}")


def attention_call(change=None):
    torch.manual_seed(1)
    q, window = torch.randn(5, 2, 8), torch.randn(6, 8)
    index = torch.tensor([[-1, 0, 1]] * 5, dtype=torch.int32)
    entries, chosen = torch.randn(4, 8), torch.tensor([[2], [-1], [3], [0], [1]], dtype=torch.int32)
    sink = torch.tensor([0.5, -1.0])
    return call_of(
        "attention", q, window, index, entries, chosen, sink=sink, scale=0.3, change=change
    )


def test_softmax_of_a_right_attention():
    found = read("softmax", attention_call())
    assert found["row_sum"].verdict == "ok" and found["row_sum"].value == pytest.approx(1, abs=1e-5)
    assert 0 < found["sink_mass"].value < 1 and found["padding_mass"].value < 1e-5


def test_softmax_sees_padding_that_was_counted():
    """Five padded keys with logit 0 in the denominator."""

    def pad(outputs):
        outputs["lse"] = torch.logaddexp(outputs["lse"], torch.log(torch.tensor(5.0)))

    found = read("softmax", attention_call(pad))
    assert found["padding_mass"].verdict == found["row_sum"].verdict == "alarm"
    assert found["padding_mass"].value > 0.3


def hyper_call(change=None):
    torch.manual_seed(2)
    x, fn = torch.randn(3, 4, 16), torch.randn(24, 64) / 8
    scale, base = torch.ones(3), torch.zeros(24)
    return call_of(
        "hc_pre", x, fn=fn, scale=scale, base=base, iters=20, eps=1e-6, norm_eps=1e-6, change=change
    )


def test_hyper():
    assert {r.verdict for r in read("hyper", hyper_call()).values()} == {"ok", "info"}

    def transpose(outputs):
        outputs["comb"] = outputs["comb"].softmax(-1)
        outputs["post"] = outputs["post"] - 3

    found = read("hyper", hyper_call(transpose))
    assert found["column_error"].verdict == found["post_min"].verdict == "alarm"


def test_load():
    gate = Weight("g", "dense", torch.randn(4, 8))
    call = call_of(
        "gate",
        torch.randn(6, 8),
        torch.arange(6),
        weight=gate,
        bias=torch.zeros(4),
        tid2eid=None,
        k=2,
        scale=1.5,
    )
    found = read("load", call)
    assert sum(found["load"].value) == 12 and len(found["load"].value) == 4
    assert found["weight_sum"].value == pytest.approx(1.5) and found["weight_sum"].verdict == "ok"
    call.ran({**call.outputs, "routing": call.outputs["routing"] * 2})
    assert read("load", call)["weight_sum"].verdict == "alarm"


def test_scales():
    data, scale, _ = quantize_nvfp4(torch.randn(32, 32))
    weight = Weight("w", "nvfp4", data, scale, 0.5)
    call = call_of("linear", torch.randn(2, 32), weight=weight, out_dtype=None)
    found = read("scales", call)
    assert found["block_max"].value == pytest.approx(448.0)
    assert found["global"].value == [0.5, 0.5] and found["global"].verdict == "ok"
    bad = Weight("w", "nvfp4", data, scale.float().neg().to(scale.dtype), float("nan"))
    call = call_of("linear", torch.randn(2, 32), weight=bad, out_dtype=None)
    found = read("scales", call)
    assert found["block_max"].verdict == found["global"].verdict == "alarm"


def test_residual_growth_is_over_a_layer():
    residual = make_probes(["residual"])[0]

    def observe(path, layer, factor):
        x = torch.full((2, 4, 8), float(factor))
        site = Site(path, spec_of("hc_post"), {}, layer)
        return {r.name: r.value for r in residual.explain(Call(site, {}, {"x": x}))}

    assert observe("embed", None, 1)["norm"] == [1.0] * 4
    assert "growth" not in observe("L0/attn/hc_post", 0, 5)
    assert observe("L0/ffn/hc_post", 0, 2)["growth"] == pytest.approx(2)
    assert observe("L1/ffn/hc_post", 1, 3)["growth"] == pytest.approx(1.5)
    residual.reset()
    assert "growth" not in observe("L1/ffn/hc_post", 1, 3)


def test_stats_and_expected_infinities():
    call = call_of("moe_sum", torch.ones(2, 2), torch.ones(2, 2), dtype=torch.float32)
    call.outputs["y"][1, 0] = float("nan")
    found = read("stats", call)
    assert (found["nan"].value, found["nan"].verdict, found["inf"].verdict) == (1, "alarm", "ok")
    assert found["abs_max"].value == 2.0


def test_nonfinite_is_said_where_it_is_made():
    def poison(outputs):
        outputs["y"][1, 0] = float("inf")

    made = call_of(
        "moe_sum", torch.ones(2, 2), torch.ones(2, 2), dtype=torch.float32, change=poison
    )
    assert read("nonfinite", made)["first_nonfinite"].value == [1.0, 0.0]
    bad = torch.full((2, 2), float("inf"))
    spread = call_of("moe_sum", bad, torch.ones(2, 2), dtype=torch.float32)
    assert read("nonfinite", spread) == {}


def test_a_re_run_is_measured_anew():
    call = call_of("moe_sum", torch.ones(2, 2), torch.ones(2, 2), dtype=torch.float32)
    assert call.stats("y").abs_max == 2
    call.ran({"y": torch.zeros(1)})
    assert call.stats("y").abs_max == 0


def test_names():
    with pytest.raises(DSV4Error) as error:
        make_probes(["soft"])
    assert "'softmax'" in error.value.hint
    assert [p.name for p in make_probes(["stats", "load", "stats"])] == ["stats", "load"]
    assert probe_that_reads("nan") == "stats" and probe_that_reads("nothing") is None
    with pytest.raises(DSV4Error, match="has no name"):
        probe(type("Anonymous", (Probe,), {}))
