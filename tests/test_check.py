"""`check` names planted bugs by site, op and kind, and stays silent on honest kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Plant
from torch import Tensor

import dsv4_bench.engine.cpu  # noqa: F401
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import (
    Site,
    parse_route,
    reference,
    spec_of,
)
from dsv4_bench.engine.step import Step
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes.capture import Capture
from dsv4_bench.probes.limits import Limits
from dsv4_bench.probes.signatures import Signature
from dsv4_bench.probes.verdicts import Broken, judge_values
from dsv4_bench.workbench.checking.baseline import Baseline, Scenario, default_chunks, pair_of
from dsv4_bench.workbench.checking.cache_check import WORDS
from dsv4_bench.workbench.checking.checker import Checker, CheckReport
from dsv4_bench.workbench.checking.findings import Finding
from dsv4_bench.workbench.checking.settling import Judged, settle

CONFIG = replace(
    TINY,
    hidden_size=64,
    q_lora_rank=64,
    o_lora_rank=32,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128),
    num_hash_layers=1,
    num_attention_heads=2,
)
TOKENS = torch.randint(2, 512, (140,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("check") / "ckpt"
    return Checkpoint(write_checkpoint(folder, CONFIG, "nvfp4", seed=2))


def check(
    checkpoint: Checkpoint, route: list[str], dtype: torch.dtype = torch.float32
) -> CheckReport:
    model = Transformer(checkpoint, dtype)
    chunks = (len(TOKENS) - 2, 1, 1)
    return Checker(model, parse_route(route)).run(TOKENS, chunks, lambda *progress: None)


@pytest.fixture(scope="module")
def baseline(checkpoint: Checkpoint) -> Baseline:
    return Baseline(Transformer(checkpoint), TOKENS, (110, 26, 1, 1, 1, 1))


def first_of(baseline: Baseline, site: str, **options: Any) -> Finding:
    """The first finding with the planted bug at `site` alone."""
    route = parse_route([f"{site}=bug"])
    report = Checker(baseline.model, route, **options).against(baseline)
    assert report.status == "found" and report.first is not None
    assert {finding.site for finding in report.findings} == {site}
    return report.first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_kernels_are_clean(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    report = check(checkpoint, ["kernel"], dtype)
    assert [finding.sentence for finding in report.findings] == []
    assert report.status == ("partial" if report.uncovered else "clean")


def test_what_is_not_checked_is_not_a_pass(checkpoint: Checkpoint) -> None:
    report = check(checkpoint, ["reference"])
    assert report.status == "partial"
    assert len(report.uncovered) == len(report.sites)


def _factor(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return 1.01 * reference("hc_post")(y, x, post, comb)


def _no_eps(x: Tensor, **params: Any) -> Any:
    return reference("hc_pre")(x, **{**params, "eps": 0.0})


def _halves(x: Tensor, **params: Any) -> Tensor:
    y = reference("linear")(x, **params)
    return torch.cat((y[:, y.shape[1] // 2 :], y[:, : y.shape[1] // 2]), 1)


def _shift(x: Tensor, **params: Any) -> Tensor:
    return reference("rms_norm")(x, **params).roll(1, 0)


def _nan_row(x: Tensor, **params: Any) -> Tensor:
    y = reference("linear")(x, **params).clone()
    y[-1, 3] = torch.nan
    return y


def _columns(x: Tensor, **params: Any) -> Tensor:
    y = reference("linear")(x, **params).clone()
    y[:, 8:16] += y[:, 16:24]
    return y


def _clamp(routed: Tensor, shared: Tensor, **params: Any) -> Tensor:
    y = reference("moe_sum")(routed, shared, **params)
    return y.clamp(-float(y.abs().max()) / 8, float(y.abs().max()) / 8)


def _worse_sets(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    return reference("index_topk")(-score.nan_to_num(neginf=0), visible, k=k)


@pytest.mark.parametrize(
    ("op", "bug", "site", "kind"),
    [
        ("hc_post", _factor, "L1/ffn/hc_post", "constant_factor"),
        ("hc_pre", _no_eps, "L2/attn/hc_pre", None),
        ("linear", _halves, "L1/attn/wq_a", "halves_swapped"),
        ("rms_norm", _shift, "L0/ffn/norm", "shifted"),
        ("linear", _nan_row, "L2/attn/wkv", "nan"),
        ("linear", _columns, "L0/attn/wo_b", "columns"),
        ("moe_sum", _clamp, "L1/ffn/sum", "saturated"),
        ("index_topk", _worse_sets, "L1/attn/index/topk", "decision_flip"),
    ],
)
def test_a_planted_bug_is_named(
    baseline: Baseline,
    plant: Plant,
    op: str,
    bug: Callable[..., Any],
    site: str,
    kind: str | None,
) -> None:
    plant(op, bug)
    first = first_of(baseline, site)
    assert (first.site, first.op) == (site, op)
    if kind is not None:
        assert first.kind == kind


def test_wrong_inputs_are_not_an_ops_fault(baseline: Baseline, plant: Plant) -> None:
    plant("linear", _columns)
    route = parse_route(["kernel", "L0/attn/wo_b=bug"])
    report = Checker(baseline.model, route).against(baseline)
    assert {finding.site for finding in report.findings} == {"L0/attn/wo_b"}
    assert report.sites["head/logits"].verdict == "ok"
    assert report.sites["head/logits"].carried_error > 0.1


def test_the_attention_reference_takes_no_tokens() -> None:
    """A ragged step may leave an implementation with nothing to do."""
    none = torch.zeros(0, 3, dtype=torch.int32)
    q, pool = torch.zeros(0, 2, 8), torch.zeros(4, 8)
    o, lse = reference("attention")(q, pool, none, None, None, sink=torch.zeros(2), scale=1.0)
    assert o.shape == (0, 2, 8) and lse.shape == (0, 2)


# -- what was computed instead


def _short(q: Tensor, window: Tensor, index: Tensor, *rest: Any, **params: Any) -> Any:
    """Padded columns are zero rows that take part in the softmax."""
    padded = torch.cat((window, window.new_zeros(1, window.shape[1])))
    index = torch.where(index >= 0, index, len(window))
    return reference("attention")(q, padded, index, *rest, **params)


def _comb(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return reference("hc_post")(y, x, post, comb.transpose(1, 2))


def _sink(*args: Any, sink: Tensor, scale: float) -> Any:
    return reference("attention")(*args, sink=sink * scale, scale=scale)


def _late(x: Tensor, positions: Tensor, **params: Any) -> Tensor:
    return reference("rope")(x, positions + 1, **params)


def _unclamped(x: Tensor, *, expert: Any, limit: float) -> Tensor:
    return reference("shared_expert")(x, expert=expert, limit=1e9)


def _no_relu(q: Tensor, keys: Tensor, weights: Tensor, step: Step, **params: Any) -> Tensor:
    both = [reference("index_score")(sign * q, keys, weights, step, **params) for sign in (1, -1)]
    return torch.where(both[0] == -torch.inf, both[0], both[0] - both[1])


def _forgets(kv: Tensor, score: Tensor, *state: Any, **params: Any) -> Tensor:
    kept = [t.clone() if isinstance(t, Tensor) else t for t in state]
    return reference("compressor")(kv, score, *kept, **params)


@pytest.mark.parametrize(
    ("op", "bug", "site", "kind", "words"),
    [
        ("attention", _short, "L0/attn/core", "padding", "padding is counted as keys"),
        ("hc_post", _comb, "L1/ffn/hc_post", "transposed", "comb is read transposed"),
        ("attention", _sink, "L2/attn/core", "constant_factor", "multiplied by the softmax scale"),
        ("rope", _late, "L0/attn/q_rope", "shifted", "positions is +1"),
        ("shared_expert", _unclamped, "L1/ffn/shared", "saturated", "the clamp is missing"),
        ("index_score", _no_relu, "L1/attn/index/score", "flushed", "relu is missing"),
        ("compressor", _forgets, "L1/attn/compressor/pool", "stale", "keeps its previous contents"),
    ],
)
def test_what_was_computed_instead_is_said(
    baseline: Baseline,
    plant: Plant,
    op: str,
    bug: Callable[..., Any],
    site: str,
    kind: str,
    words: str,
) -> None:
    plant(op, bug)
    found = first_of(baseline, site)
    assert (found.kind, found.forward, found.own) == (kind, 0, True)
    assert words in found.sentence and found.sentence.startswith(f"{site}: ")


def test_the_first_finding_has_numbers(baseline: Baseline, plant: Plant) -> None:
    plant("hc_post", _factor)
    route = parse_route(["L1/ffn/hc_post=bug"])
    report = Checker(baseline.model, route).against(baseline)
    first = report.to_dict()["first"]
    assert first["metrics"]["relative_l2"] == pytest.approx(0.01, rel=1e-3)
    assert first["metrics"]["cosine"] == pytest.approx(1.0)
    assert sum(first["metrics"]["ulp"].values()) == 110 * 4 * 64
    assert first["limit_evidence"]["honest"] < first["limit"] < 1e-5
    assert first["sentence"] == "L1/ffn/hc_post: x = 1.01 x reference"


# -- what is no output at all


def test_an_exception_is_a_finding_and_the_check_goes_on(baseline: Baseline, plant: Plant) -> None:
    def breaks(x: Tensor, **params: Any) -> Tensor:
        if len(x) == 1:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x64 and 32x64)")
        return reference("linear")(x, **params)

    plant("linear", breaks)
    found = first_of(baseline, "L1/attn/wq_a")
    assert (found.kind, found.forward, found.output) == ("transposed", 2, "")
    assert "raises RuntimeError" in found.sentence and "transposed" in found.sentence


def _with_k_for_n(x: Tensor, *, weight: Any, out_dtype: Any) -> Tensor:
    return x.new_zeros(len(x), weight.shape[1])


def _nothing(x: Tensor, **params: Any) -> None:
    return None


def _half(x: Tensor, **params: Any) -> Tensor:
    return reference("linear")(x, **params).half()


def _fewer_rows(x: Tensor, **params: Any) -> Tensor:
    return reference("linear")(x, **params)[:-1]


@pytest.mark.parametrize(
    ("bug", "kind", "words"),
    [
        (_with_k_for_n, "transposed", "y is [110, 64], should be [110, 1024]"),
        (_nothing, "unexplained", "y is missing"),
        (_half, "unexplained", "y is float16, should be float32"),
        (_fewer_rows, "rows", "y is [109, 1024], should be [110, 1024]"),
    ],
)
def test_a_broken_contract_is_a_finding(
    baseline: Baseline, plant: Plant, bug: Callable[..., Any], kind: str, words: str
) -> None:
    plant("linear", bug)
    found = first_of(baseline, "L2/attn/wq_b")
    assert found.kind == kind and words in found.sentence


# -- memory


def test_an_earlier_output_is_stale(baseline: Baseline, plant: Plant) -> None:
    kept: list[Tensor] = []

    def late(x: Tensor, **params: Any) -> Tensor:
        """Returns what it computed the call before."""
        y = reference("rms_norm")(x, **params)
        kept.append(y)
        return kept[-2] if len(kept) > 1 and kept[-2].shape == y.shape else y

    plant("rms_norm", late)
    found = first_of(baseline, "head/norm")
    assert found.kind == "stale" and "y of head/norm in pass" in found.sentence


def test_chance_is_nondeterministic(baseline: Baseline, plant: Plant) -> None:
    generator = torch.Generator().manual_seed(3)

    def racing(x: Tensor, **params: Any) -> Tensor:
        y = reference("linear")(x, **params)
        return y + 1e-7 * torch.randn(y.shape, generator=generator)

    plant("linear", racing)
    assert first_of(baseline, "L0/attn/wkv").kind == "nondeterministic"
    report = Checker(baseline.model, parse_route(["L0/attn/wkv=bug"]), repeats=1, poison=False)
    assert report.against(baseline).status == "partial"  # one run shows nothing


def test_two_ops_that_only_fail_together(baseline: Baseline, plant: Plant) -> None:
    """One returns rows with a gap between them, the other takes them to be contiguous."""

    def with_gaps(x: Tensor, **params: Any) -> Tensor:
        y = reference("linear")(x, **params)
        wide = torch.zeros(len(y), y.shape[1] + 16)
        wide[:, : y.shape[1]] = y
        return wide[:, : y.shape[1]]

    def ignores_strides(x: Tensor, **params: Any) -> Tensor:
        flat = torch.as_strided(x, x.shape, (x.shape[1], 1), x.storage_offset())
        return reference("rms_norm")(flat, **params)

    plant("linear", with_gaps)
    plant("rms_norm", ignores_strides)
    for alone in ("L1/attn/wq_a=bug", "L1/attn/q_norm=bug"):
        assert Checker(baseline.model, parse_route([alone])).against(baseline).findings == []
    both = parse_route(["L1/attn/wq_a=bug", "L1/attn/q_norm=bug"])
    found = Checker(baseline.model, both).against(baseline).first
    assert found is not None and found.site == "L1/attn/q_norm" and not found.own
    assert "check --minimise" in found.sentence


def test_an_output_overwritten_before_it_is_read(baseline: Baseline, plant: Plant) -> None:
    shared = torch.empty(1 << 16)

    def in_workspace(x: Tensor, **params: Any) -> Tensor:
        y = reference("rms_norm")(x, **params)
        return shared[: y.numel()].view(y.shape).copy_(y)

    def through_workspace(x: Tensor, **params: Any) -> Tensor:
        y = reference("linear")(x, **params)
        return shared[: y.numel()].view(y.shape).copy_(y).clone()

    plant("rms_norm", in_workspace)
    plant("linear", through_workspace)
    route = parse_route(["L1/attn/q_norm=bug", "L1/attn/wkv=bug"])
    found = Checker(baseline.model, route).against(baseline).first
    assert found is not None and (found.site, found.kind) == ("L1/attn/q_norm", "stale")
    assert "overwritten before L1/attn/index/wq_b reads it" in found.sentence


# -- decisions


def test_ties_may_go_either_way() -> None:
    score = torch.tensor([[0.5, 2.0, 1.0, 1.0, 1.0, 0.0]])
    site = Site("L0/x", spec_of("index_topk"), {"k": 3}, 0)
    capture = Capture()
    capture.around(site, (score, torch.tensor([6])))
    call, limits = capture.calls[0], Limits(torch.float32)

    def broken(*index: int) -> list[Broken]:
        picked = {"index": torch.tensor([index], dtype=torch.int32)}
        return judge_values(call, picked, call.truth, limits).broken

    assert broken(1, 2, 3) == broken(4, 1, 2) == []
    assert broken(1, 2, 0)[0].signature.kind == "decision_flip"  # type: ignore[union-attr]
    assert broken(1, 2, 2) and broken(1, 2, -1)


def test_a_better_score_may_not_be_left_out(baseline: Baseline, plant: Plant) -> None:
    def one_worse(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
        """The entry after the last kept one in its place."""
        index = reference("index_topk")(score, visible, k=k + 1)
        return torch.cat((index[:, : k - 1], index[:, k:]), 1) if index.shape[1] > k else index

    plant("index_topk", one_worse)
    found = first_of(baseline, "L1/attn/index/topk")
    assert found.kind == "decision_flip" and "94% of it right" in found.sentence


def test_experts_in_another_order_are_the_same_experts(baseline: Baseline, plant: Plant) -> None:
    def reversed_pairs(*args: Any, **params: Any) -> Any:
        routing, experts, scores = reference("gate")(*args, **params)
        return routing.flip(1), experts.flip(1), scores

    plant("gate", reversed_pairs)
    report = Checker(baseline.model, parse_route(["L2/ffn/gate=bug"])).against(baseline)
    assert report.findings == []

    def unpaired(*args: Any, **params: Any) -> Any:
        routing, experts, scores = reference("gate")(*args, **params)
        return routing, experts.flip(1), scores

    plant("gate", unpaired)
    assert first_of(baseline, "L2/ffn/gate").kind == "permuted"


# -- passes and batches


def test_a_batch_of_two_shows_what_one_sequence_hides(baseline: Baseline, plant: Plant) -> None:
    def first_only(q: Tensor, keys: Tensor, weights: Tensor, step: Step, **params: Any) -> Tensor:
        return reference("index_score")(q, keys[:1].expand_as(keys), weights, step, **params)

    plant("index_score", first_only)
    found = first_of(baseline, "L1/attn/index/score")
    assert found.forward >= 6  # the passes of the second scenario
    assert found.kind == "rows" and "every sequence reads the first one's" in found.sentence


def test_scenarios() -> None:
    pair = pair_of(list(range(100, 120)))
    assert pair is not None and pair_of([1, 2, 3]) is None
    assert [[len(piece) for piece in step] for step in pair.steps()] == [[9, 4], [1, 1], [1, 1]]
    assert pair.steps()[1] == [[109], [115]]
    one = Scenario((tuple(range(7)),), (4, 1))
    assert one.steps() == [[[0, 1, 2, 3]], [[4]], [[5]], [[6]]]


@pytest.mark.parametrize("tokens", [1, 2, 5, 9, 17, 129, 130, 131, 300, 1000])
def test_default_pieces_meet_every_mode(tokens: int) -> None:
    steps = Scenario((tuple(range(tokens)),), default_chunks(tokens)).steps()
    lengths = [len(step[0]) for step in steps]
    assert sum(lengths) == tokens and (tokens < 9 or lengths.count(1) >= 4)
    if tokens >= 130:
        first = lengths[0]
        assert (first + 2) % 128 == 0 and lengths[1:4] == [1, 1, 1]  # a window closes in decode


def test_later_passes_settle_rows_or_positions() -> None:
    signature = Signature("positions", "y is wrong in rows 64-99 of 100", 64)
    found = Finding("L0/x", "linear", 0, 0, "y", 1.0, 0.1, signature)
    prefill = Judged(0, 100, 0, True)
    assert settle(found, [prefill, Judged(1, 1, 100, True)]).kind == "positions"
    assert settle(found, [prefill, Judged(1, 1, 100, False)]).kind == "rows"
    assert settle(found, [prefill]).kind == "positions"
    odd = Finding("L0/x", "linear", 0, 1, "y", 1.0, 0.1, Signature("unexplained", "y differs"))
    decode = [Judged(0, 100, 0, False), Judged(1, 1, 100, True)]
    assert settle(odd, decode).kind == "rows"
    assert settle(odd, [Judged(0, 100, 0, True), decode[1]]).kind == "unexplained"


def test_the_route_is_back_afterwards(baseline: Baseline, plant: Plant) -> None:
    plant("hc_post", _factor)
    first_of(baseline, "L1/ffn/hc_post")
    model = baseline.model
    assert model.sites["L1/ffn/hc_post"].impl.name == "bug"
    assert all(site.tap is None for site in model.sites.values())


def test_cache_rows_do_not_depend_on_the_pieces(baseline: Baseline, plant: Plant) -> None:
    report = Checker(baseline.model, parse_route(["*/core=reference", "kernel"])).against(baseline)
    held = {
        path: site.invariants[WORDS]
        for path, site in report.sites.items()
        if WORDS in site.invariants
    }
    assert set(held) == {
        "L0/attn/window_write",
        "L1/attn/window_write",
        "L1/attn/compressor/write",
        "L1/attn/index/compressor/write",
    }
    assert all(item.ok and item.value < item.limit / 10 for item in held.values())
    assert report.findings == []

    def forgets_decode(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
        if len(rows) > 1:
            reference("cache_write")(rows, slots, cache)

    plant("cache_write", forgets_decode)
    route = parse_route(["L0/attn/window_write=bug"])
    broken = Checker(baseline.model, route).against(baseline).sites["L0/attn/window_write"]
    assert broken.invariants[WORDS].value > 0.05


def test_a_kernel_that_fails_in_one_long_prefill(baseline: Baseline, plant: Plant) -> None:
    """Right in every piece of the check, wrong on more rows than any of them has."""

    def up_to_128_rows(x: Tensor, **params: Any) -> Tensor:
        if len(x) > 128:
            raise RuntimeError("too many rows")
        return reference("linear")(x, **params)

    plant("linear", up_to_128_rows)
    route = parse_route(["L0/attn/wq_a=bug"])
    found = Checker(baseline.model, route).against(baseline).first
    assert found is not None and found.site == "L0/attn/wq_a" and not found.own
    assert found.sentence.endswith("too many rows; with all 140 tokens in one prefill")
