"""Probes against values worked out by hand, or in plain Python, one call at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_bench.engine import cpu_library
from dsv4_bench.engine.formats import Weight, quantize_nvfp4
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import Context, Site, reference, spec_of
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.base import Probe, make_probes
from dsv4_bench.probes.observation import Observation
from dsv4_bench.probes.readings import Call, Reading
from dsv4_bench.probes.stats import tensor_stats


def call_of(op: str, *args: Any, path: str = "", forward: int = 0, **params: Any) -> Call:
    """The reference's call of `op` on these arguments, as a tap sees it."""
    site = Site(path or f"L1/attn/{op}", spec_of(op), params, 1)
    inputs = site.spec.bind(args, params)
    before = {name: inputs[name].clone() for name in site.spec.mutates}
    result = reference(op)(*args, **params)
    outputs = site.spec.name_outputs(result) | {name: inputs[name] for name in site.spec.mutates}
    return Call(site, inputs, outputs, forward, before)


def look(probe: Probe, call: Call) -> dict[str, Reading]:
    def complain(probe: Probe, call: Call, text: str) -> None:
        raise AssertionError(f"{probe.name} raised {text} at {call.site.path}")

    assert probe.wants(call.site)
    observation = Observation([probe], complain)
    return {r.name: r for r in observation.look(call) + observation.flush()}


def values(readings: dict[str, Reading]) -> dict[str, Any]:
    return {name: reading.value for name, reading in readings.items()}


# ------------------------------------------------------------------------------ stats

ODD = [0.0, -0.0, 3.0, -3.0, 1e30, -1e30, 1.5, math.nan, math.inf, -math.inf, -math.inf, 1e-40]


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to take statistics."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_library, "kernels_at_hand", lambda: None)
    elif (reason := cpu_library.requires(Context())) is not None:
        pytest.skip(reason)
    else:
        cpu_library.kernels()
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 12, 15, 16, 17, 1023, 1024, 5000])
def test_statistics(way: str, dtype: torch.dtype, count: int):
    torch.manual_seed(count)
    tensor = torch.randn(count).to(dtype)
    places = torch.randperm(count)[: len(ODD)]
    tensor[places] = torch.tensor(ODD[: len(places)]).to(dtype)
    flat = tensor.double().tolist()
    finite = [x for x in flat if math.isfinite(x)]
    top = max(map(abs, finite), default=0.0)
    found = tensor_stats(tensor)
    assert found is not None
    assert found.finite == len(finite)
    assert found.nan == sum(map(math.isnan, flat))
    assert found.inf == sum(map(math.isinf, flat)) and found.minus_inf == flat.count(-math.inf)
    assert found.zero == finite.count(0.0)
    assert (found.abs_max, found.peaks) == (top, sum(abs(x) == top for x in finite))
    size = max(len(finite), 1)
    assert found.rms == pytest.approx(math.sqrt(math.fsum(x * x for x in finite) / size))
    assert found.mean == pytest.approx(math.fsum(finite) / size, abs=1e-9 * top)


def test_statistics_of_odd_shapes(way: str):
    assert tensor_stats(torch.zeros(0, 4)) == (0,) * 9
    assert tensor_stats(torch.ones(3, dtype=torch.int64)) is None
    strided = torch.arange(12.0).view(3, 4)[:, ::2]
    assert tensor_stats(strided).mean == 5.0
    found = tensor_stats(torch.full((3,), math.nan))
    assert (found.finite, found.nan, found.abs_max, found.mean) == (0, 3, 0.0, 0.0)
    assert tensor_stats(torch.ones(4, dtype=torch.float64)).rms == 1.0


def test_statistics_do_not_depend_on_threads(way: str):
    torch.manual_seed(0)
    tensor, before = torch.randn(1 << 18), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tensor_stats(tensor))
    finally:
        torch.set_num_threads(before)
    if way == "compiled":
        assert found[0] == found[1] == found[2]


def test_zeros_and_clamped_values():
    call = call_of("moe_sum", torch.zeros(2, 5), torch.zeros(2, 5), dtype=torch.float32)
    call.ran({"y": torch.tensor([[0.0, 10, -10, 10, 1], [0, 0, 2, 3, 4]])})
    found = values(look(make_probes(["stats"])[0], call))
    assert (found["zero"], found["peaks"], found["abs_max"]) == (0.3, 3, 10.0)
    call.ran({"y": torch.tensor([[1.0, 2.0]])})
    assert not {"zero", "peaks"} & look(make_probes(["stats"])[0], call).keys()


# ------------------------------------------------------------------------------ attention


def test_softmax_masses_by_hand():
    """Logits ln 1, ln 2 in the window, ln 3 of an entry, sink ln 4: shares 1, 2, 3, 4 of 10."""
    ln = [math.log(x) for x in (1, 2, 3)]
    q = torch.tensor([[[1.0, 0.0]]])
    window, entries = torch.tensor([[ln[0], 9.0], [ln[1], 9.0]]), torch.tensor([[ln[2], 9.0]])
    index = torch.tensor([[-1, 0, 1]], dtype=torch.int32)
    chosen = torch.tensor([[0, -1]], dtype=torch.int32)
    sink = torch.tensor([math.log(4)])
    call = call_of("attention", q, window, index, entries, chosen, sink=sink, scale=1.0)
    found = look(make_probes(["softmax"])[0], call)
    wanted = {
        "sink_mass": 0.4,
        "window_mass": 0.3,
        "entry_mass": 0.3,
        "max_weight": 0.3,
        "row_sum": 1.0,
    }
    assert {n: found[n].value for n in wanted} == pytest.approx(wanted)
    entropy = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3))
    assert found["entropy"].value == pytest.approx(entropy)
    assert all(reading.sampled == "" for reading in found.values())
    call.outputs["lse"] = call.outputs["lse"] + math.log(2)  # as if ten more were counted
    found = look(make_probes(["softmax"])[0], call)
    assert found["padding_mass"].value == pytest.approx(0.5)
    assert found["padding_mass"].verdict == found["row_sum"].verdict == "alarm"


def test_softmax_says_what_it_sampled():
    q, window = torch.randn(20, 1, 2), torch.randn(3, 2)
    index = torch.zeros(20, 3, dtype=torch.int32)
    call = call_of("attention", q, window, index, None, None, sink=torch.zeros(1), scale=1.0)
    found = look(make_probes(["softmax"])[0], call)
    assert found["entropy"].sampled == found["entropy"].detail == "8 of 20 queries"
    assert found["row_sum"].detail == "furthest from 1; 8 of 20 queries"
    assert "entry_mass" not in found and found["sink_mass"].sampled == ""


# ------------------------------------------------------------------------------ indexer


class Indexed:
    """One CSA layer with scores 0, 1, 2, ... and keep-2; the last of 20 tokens sees 5 entries."""

    def __init__(self, order: list[int], kept: list[int]) -> None:
        self.probe = make_probes(["index"])[0]
        step = Step(torch.arange(20), (0,), (20,), 128)
        keys = torch.zeros(1, 16, 1)
        keys[0, :5, 0] = torch.tensor(order, dtype=torch.float32)
        one = torch.ones(20, 1)
        scored = call_of("index_score", one[..., None], keys, one, step, scale=0.5, ratio=4)
        score, visible = scored.outputs["score"], step.visible(4)
        cut = call_of("index_topk", score, visible, k=2)
        cut.outputs["index"][-1] = torch.tensor(kept)
        self.scored, self.cut, self.step = scored, cut, step
        assert look(self.probe, scored) == {}

    def read(self) -> dict[str, Reading]:
        return look(self.probe, self.cut)

    def attend(self, logits: list[float]) -> dict[str, Reading]:
        """The attention of the same tokens over entries with these logits."""
        q = torch.ones(20, 1, 1)
        entries = torch.zeros(16, 1)
        entries[:5, 0] = torch.tensor(logits)
        index = self.cut.outputs["index"]
        window = torch.zeros(20, 1, dtype=torch.int32)
        return look(
            self.probe,
            call_of("attention", q, torch.zeros(1, 1), window, entries, index, sink=torch.zeros(1), scale=1.0),
        )  # fmt: skip


def test_a_right_cut():
    found = Indexed([5, 1, 4, 2, 3], [0, 2]).read()
    assert found["score_recall"].value == 1.0 and found["undecided"].value == 0.0
    assert found["wrong_entries"].value == 0 and found["wrong_entries"].verdict == "ok"
    # Tokens 11 to 14 see three entries (5, 1, 4), 15 to 18 four, 19 five; scale halves the scores.
    noise = 8 * math.sqrt(1 + 1) * 2.0**-24 * 0.5 * 1 * 1 * 5
    assert found["margin"].value == pytest.approx(0.5 * (4 - 3) / noise)
    assert found["margin"].sampled == "8 of 9 queries"


def test_a_wrong_cut():
    found = Indexed([5, 1, 4, 2, 3], [0, 4]).read()  # 3 instead of 4
    assert found["wrong_entries"].value == 1 and found["wrong_entries"].verdict == "alarm"
    assert found["score_recall"].value == pytest.approx((7 + 0.5) / 8)
    twice = Indexed([5, 1, 4, 2, 3], [0, 0]).read()
    assert twice["wrong_entries"].value == 1
    assert Indexed([5, 1, 4, 2, 3], [0, -1]).read()["wrong_entries"].value == 1


def test_a_tie_is_undecided_and_either_side_is_right():
    for kept in ([0, 2], [0, 4]):
        found = Indexed([5, 1, 4, 2, 4], kept).read()
        assert found["margin"].value == 0.0
        assert found["undecided"].value == pytest.approx(1 / 8)
        assert found["wrong_entries"].verdict == "ok"


def test_mass_recall():
    layer = Indexed([5, 1, 4, 2, 3], [0, 2])
    found = layer.attend([math.log(x) for x in (4, 1, 2, 1, 2)])
    sees_3, sees_4, sees_5 = 6 / 7, 6 / 8, 6 / 10
    # Of tokens 11 ... 19 the sample leaves out one that sees four entries.
    wanted = (4 * sees_3 + 3 * sees_4 + sees_5) / 8
    assert found["mass_recall"].value == pytest.approx(wanted)
    assert found["mass_recall_min"].value == pytest.approx(sees_5)
    layer.probe.reset()
    assert layer.attend([0.0] * 5) == {}  # nothing is known of how these were scored


def test_no_cut_no_reading():
    probe, step = make_probes(["index"])[0], Step(torch.arange(8), (0,), (8,), 128)
    one = torch.ones(8, 1)
    scored = call_of(
        "index_score", one[..., None], torch.ones(1, 2, 1), one, step, scale=1.0, ratio=4
    )
    assert look(probe, scored) == {}
    assert look(probe, call_of("index_topk", scored.outputs["score"], step.visible(4), k=2)) == {}


def test_a_batch_of_two_sequences():
    """Entries of the second sequence lie behind the first one's capacity."""
    probe, step = make_probes(["index"])[0], Step(torch.arange(2), (11, 11), (1, 1), 128)
    keys = torch.zeros(2, 4, 1)
    keys[:, :3, 0] = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    one = torch.ones(2, 1)
    scored = call_of("index_score", one[..., None], keys, one, step, scale=1.0, ratio=4)
    look(probe, scored)
    cut = call_of("index_topk", scored.outputs["score"], step.visible(4), k=1)
    assert cut.outputs["index"].tolist() == [[2], [0]]
    assert look(probe, cut)["score_recall"].value == 1.0
    entries = torch.log(torch.tensor([1.0, 1, 2, 1, 6, 1, 1, 1]))[:, None]
    rows = step.pool_rows(cut.outputs["index"], 4)
    window = torch.zeros(2, 1, dtype=torch.int32)
    call = call_of(
        "attention", torch.ones(2, 1, 1), torch.zeros(1, 1), window, entries, rows, sink=torch.zeros(1), scale=1.0
    )  # fmt: skip
    assert look(probe, call)["mass_recall"].value == pytest.approx((2 / 4 + 6 / 8) / 2)


# ------------------------------------------------------------------------------ experts


def gate_call(ids: list[list[int]], forward: int = 0) -> Call:
    n = len(ids)
    weight = Weight("g", "dense", torch.eye(4))
    call = call_of(
        "gate", torch.randn(n, 4), torch.arange(n), weight=weight, bias=torch.zeros(4), tid2eid=None,
        k=2, scale=1.5, forward=forward,
    )  # fmt: skip
    call.outputs["experts"] = torch.tensor(ids, dtype=torch.int32)
    return call


def test_load_of_a_pass_and_of_the_session():
    probe = make_probes(["load"])[0]
    found = values(look(probe, gate_call([[0, 1], [0, 2], [0, 1]])))
    assert found["load"] == found["session_load"] == [3, 2, 1, 0]
    assert (found["idle"], found["skew"], found["bad_ids"]) == (0.25, 2.0, 0)
    found = values(look(probe, gate_call([[3, 1]], forward=1)))
    assert (found["load"], found["session_load"]) == ([0, 1, 0, 1], [3, 3, 1, 1])
    assert (found["idle"], found["session_idle"]) == (0.5, 0.0)
    again = values(look(probe, gate_call([[3, 0]], forward=1)))  # the layer is run once more
    assert again["session_load"] == [4, 2, 1, 1]
    probe.reset()
    assert values(look(probe, gate_call([[3, 1]])))["session_load"] == [0, 1, 0, 1]


def test_ids_that_are_no_experts():
    found = look(make_probes(["load"])[0], gate_call([[0, 4], [-1, 1]]))
    assert found["load"].value == [1, 1, 0, 0]
    assert found["bad_ids"].value == 2 and found["bad_ids"].verdict == "alarm"


def dense(rows: list[list[float]]) -> Weight:
    return Weight("w", "dense", torch.tensor(rows))


def test_clamped_values_by_hand():
    """Gate of token t in expert e: t and -9; up: -t and 2; limit 2."""
    experts = [
        Expert(dense([[1.0, 0], [0, -9]]), dense([[1.0, 0], [0, 1]]), dense([[-1.0, 0], [0, 2]]))
    ]
    x = torch.tensor([[1.0, 1], [2, 1], [3, 1], [4, 1]])
    ids, routing = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1)
    call = call_of("experts", x, routing, ids, bank=experts, limit=2.0)
    found = values(look(make_probes(["clamp"])[0], call))
    assert found == {"clamped_gate": 2 / 8, "clamped_up": 2 / 8, "gate_max": 4.0, "up_max": 4.0}
    shared = call_of("shared_expert", x[:1], expert=experts[0], limit=0.5)
    found = values(look(make_probes(["clamp"])[0], shared))
    assert (found["clamped_gate"], found["clamped_up"]) == (0.5, 1.0)


def test_clamp_says_what_it_sampled():
    expert = Expert(dense([[1.0]]), dense([[1.0]]), dense([[1.0]]))
    call = call_of("shared_expert", torch.ones(30, 1), expert=expert, limit=0.5)
    found = look(make_probes(["clamp"])[0], call)
    assert found["clamped_gate"].sampled == "8 of 30 tokens" and found["clamped_gate"].value == 1.0


# ------------------------------------------------------------------------------ caches


def pool_call(start: int, count: int, state: tuple[Tensor, Tensor] | None = None) -> Call:
    kv, score = torch.ones(count, 2), torch.zeros(count, 2)
    kv_state, score_state = state or (torch.zeros(1, 8, 2), torch.full((1, 8, 2), -math.inf))
    step = Step(torch.zeros(count, dtype=torch.long), (start,), (count,), 4)
    path = "L1/attn/compressor/pool"
    return call_of(
        "compressor", kv, score, kv_state, score_state, step, ape=torch.zeros(4, 2), path=path
    )


def test_cache_occupancy():
    probe, call = make_probes(["cache"])[0], pool_call(0, 11)
    found = look(probe, call)
    assert (found["entries_used"].value, found["tail"].value) == ([2.0], [3.0])
    assert (found["tail_error"].value, found["tail_error"].verdict) == (0, "ok")
    index = torch.tensor([[-1, -1, 0, 1], [-1, 0, 1, 2]], dtype=torch.int32)
    chosen = torch.tensor([[0], [1]], dtype=torch.int32)
    attention = call_of(
        "attention", torch.ones(2, 1, 2), torch.ones(4, 2), index, torch.ones(16, 2), chosen,
        sink=torch.zeros(1), scale=1.0,
    )  # fmt: skip
    found = values(look(probe, attention))
    assert found == {"window_fill": 0.75, "pool_fill": 2 / 16}


def test_a_compressor_that_forgets_or_keeps_a_token():
    call = pool_call(0, 11)
    call.outputs["score_state"][0, 6] = -math.inf  # the third waiting token
    assert look(make_probes(["cache"])[0], call)["tail_error"].value == 1
    call = pool_call(0, 8)
    call.outputs["score_state"][0, 4:6] = 0.0  # a window that closed is still there
    found = look(make_probes(["cache"])[0], call)["tail_error"]
    assert (found.value, found.verdict) == (2, "alarm")


# ------------------------------------------------------------------------------ origin of a NaN


def origin(call: Call) -> dict[str, Reading]:
    return look(make_probes(["nonfinite"])[0], call)


def test_a_bad_scale_of_a_weight_is_named():
    data, scale, _ = quantize_nvfp4(torch.randn(8, 32))
    scale.view(torch.uint8)[5, 1] = 0x7F
    weight = Weight("w", "nvfp4", data, scale)
    found = origin(call_of("linear", torch.randn(3, 32), weight=weight, out_dtype=None))
    assert found["first_nonfinite"].value == [0.0, 5.0]
    assert found["nonfinite_slice"].value == [0.0, 3.0, 5.0, 6.0]
    assert found["nonfinite_slice"].detail == "3 of 24 values of y, in all 3 x 5"
    assert "weight.scale[5, 1] is nan" in found["first_nonfinite"].detail


def test_overflow_names_the_row_that_fed_it():
    x = torch.ones(4, 2)
    x[2] = 3e38
    weight = Weight("w", "dense", torch.ones(3, 2))
    found = origin(call_of("linear", x, weight=weight, out_dtype=None))
    assert found["nonfinite_slice"].value == [2.0, 3.0, 0.0, 3.0]
    assert (
        found["first_nonfinite"].detail == "y[2, 0] is inf, inputs finite: rows 2 of x up to 3e+38"
    )


def test_padding_that_was_read_is_named():
    """Row 3 of the window is garbage that no query refers to, and the op let it in."""
    window = torch.ones(4, 2)
    window[3] = math.nan
    index = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    call = call_of(
        "attention", torch.ones(2, 3, 2), window, index, None, None, sink=torch.zeros(3), scale=1.0
    )
    assert origin(call) == {}
    call.outputs["o"][1, 0::2] = math.nan
    call.ran(call.outputs)
    found = origin(call)
    assert found["nonfinite_slice"].value == [1.0, 2.0, 0.0, 3.0, 0.0, 2.0]
    assert found["nonfinite_slice"].detail == "4 of 12 values of o, in 1 x 0, 2 x all 2"
    assert (
        "window[3, 0] is nan, in a row the call does not refer to"
        in found["first_nonfinite"].detail
    )
    window[0] = math.nan  # a row that queries do refer to: the NaN came from before
    assert origin(call) == {}


def test_declared_infinities_are_none():
    call = pool_call(0, 3)
    assert origin(call) == {} and (call.outputs["score_state"] == -math.inf).any()
    call.outputs["score_state"][0, 1, 0] = math.inf  # only -inf is declared
    call.ran(call.outputs)
    assert origin(call)["first_nonfinite"].value == [0.0, 1.0, 0.0]


# ------------------------------------------------------------------------------ weights in use


def test_microscope_and_scales_of_the_experts_in_use():
    def expert(gate_scale: float) -> Expert:
        made = []
        for name, factor in (("w1", gate_scale), ("w2", 1.0), ("w3", 2.0)):
            data, scale, _ = quantize_nvfp4(torch.randn(16, 16))
            made.append(Weight(f"e{gate_scale}.{name}", "nvfp4", data, scale, factor, factor**2))
        return Expert(*made)

    bank = [expert(2.0), expert(8.0), expert(4.0)]
    ids = torch.tensor([[0, 2]], dtype=torch.int32)  # the second one is not used
    call = call_of("experts", torch.ones(1, 16), torch.ones(1, 2), ids, bank=bank, limit=10.0)
    found = look(make_probes(["scales"])[0], call)
    assert (found["gate_up_ratio"].value, found["input_scale_ratio"].value) == (2.0, 4.0)
    found = look(make_probes(["microscope"])[0], call)
    assert sum(found["exponents"].value[1::2]) == 6 * 16 and found["exponents"].value[-2] == 8.0
    assert found["at_top"].detail == "6 nvfp4 matrices"
    assert 0 < found["best_noise"].value < found["noise"].value < 0.05
