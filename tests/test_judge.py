"""Own error in passing: limits learn from float64, clean kernels pass, wrong ones are classified."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.registry import Site, reference, spec_of
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.judge import Judge

ROWS = 24


def norm_call(seed: int = 0, scale: float = 1.0) -> Captured:
    """An RMS norm as the reference ran it on rows of `scale`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(64, generator=generator) + 0.5
    site = Site("L3/attn/norm", spec_of("rms_norm"), {"weight": weight, "eps": 1e-6}, 3)
    x = torch.randn(ROWS, 64, generator=generator) * scale
    call = Captured(site, (x,), {})
    return replace(call, outputs=call.run(reference("rms_norm")))


def test_an_honest_result_passes_and_float64_is_asked_twice_an_op():
    judge = Judge(torch.float32)
    for seed in range(5):
        call = norm_call(seed)
        honest = {"y": call.outputs["y"] * (1 + 2e-8)}
        found = judge.judge(call, honest)
        assert found is not None and found.comparison.verdict == "ok" and found.signature is None
    assert judge.calls == 4 and judge.seconds > 0  # two calls, each with moved inputs too
    limit, _ = judge.limits.of("rms_norm", "y")
    assert 1.5e-7 < limit < 2e-6


def test_a_wrong_factor_is_over_and_named():
    judge = Judge(torch.float32)
    call = norm_call()
    found = judge.judge(call, {"y": call.outputs["y"] * 1.0001})
    assert found is not None and found.signature is not None
    assert (found.comparison.verdict, found.comparison.against) == ("over", "float64")
    assert found.comparison.relative_l2 == pytest.approx(1e-4, rel=1e-2)
    assert found.comparison.times > 20
    assert found.signature.kind == "constant_factor" and "1.0001" in found.signature.detail


def test_positions_reach_the_signature():
    judge, call = Judge(torch.float32), norm_call()
    wrong = call.outputs["y"].clone()
    wrong[16:] += 0.1
    found = judge.judge(call, {"y": wrong}, torch.arange(100, 100 + ROWS))
    assert found is not None and found.signature is not None
    assert found.signature.kind == "positions" and "position 116" in found.signature.detail


def test_what_breaks_a_limit_by_the_references_own_error_is_decided_by_float64():
    """The route is exact, the reference is not: the comparison is over, the route is not."""
    judge, call = Judge(torch.float32), norm_call()
    truth = call.oracle()["y"]
    for seed in (0, 1):
        judge.judge(norm_call(seed), norm_call(seed).outputs)
    coarse = replace(call, outputs={"y": call.outputs["y"] * (1 + 1e-4)})
    found = judge.judge(coarse, {"y": truth.float()})
    assert found is not None
    assert (found.comparison.verdict, found.comparison.against) == ("ok", "float64")


def test_nan_and_shapes_never_pass():
    judge, call = Judge(torch.float32), norm_call()
    wrong = call.outputs["y"].clone()
    wrong[3, 5] = torch.nan
    found = judge.judge(call, {"y": wrong})
    assert found is not None and found.signature is not None and found.signature.kind == "nan"
    assert found.comparison.times == float("inf") and found.comparison.coordinate == [3, 5]
    found = judge.judge(call, {"y": wrong[:, :32]})
    assert found is not None and found.comparison.verdict == "over"
    assert found.signature is not None and "[24, 32], should be [24, 64]" in found.signature.detail
    found = judge.judge(call, {})
    assert found is not None and found.comparison.verdict == "over"
    assert found.signature is not None and found.signature.detail == "y is missing"


def test_an_op_that_runs_again_is_not_stale_but_another_calls_result_is():
    judge, call = Judge(torch.float32), norm_call()
    wrong = {"y": call.outputs["y"].flip(0).contiguous()}
    for _ in range(2):
        found = judge.judge(replace(call), wrong, forward=0)
        assert found is not None and found.signature is not None
        assert found.signature.kind != "stale"
    found = judge.judge(norm_call(seed=1), wrong, forward=1)
    assert found is not None and found.signature is not None
    assert found.signature.kind == "stale" and "L3/attn/norm in pass 0" in found.signature.detail


def topk_call(score: torch.Tensor, k: int) -> Captured:
    site = Site("L2/attn/index/topk", spec_of("index_topk"), {"k": k}, 2)
    call = Captured(site, (score, torch.full((len(score),), score.shape[1])), {})
    return replace(call, outputs=call.run(reference("index_topk")))


def test_sets_are_compared_as_sets():
    score = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    call, judge = topk_call(score, 4), Judge(torch.float32)
    ((name, index),) = call.outputs.items()
    same = judge.judge(call, {name: index.flip(-1)})
    assert same is not None and same.comparison.verdict == "ok"
    other = index.clone()
    other[5] = score[5].topk(4, largest=False).indices
    found = judge.judge(call, {name: other})
    assert found is not None and found.signature is not None
    assert found.signature.kind == "decision_flip" and "first row 5" in found.signature.detail
    assert found.comparison.times == float("inf")


def test_another_choice_among_equal_scores_is_as_good():
    score = torch.tensor([[1.0, 2.0, 2.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    call, judge = topk_call(score, 1), Judge(torch.float32)
    ((name, index),) = call.outputs.items()
    other = index.clone()
    other[0] = 3 - index[0]  # the other one of the two that score 2
    assert sorted([int(index[0]), int(other[0])]) == [1, 2]
    found = judge.judge(call, {name: other})
    assert found is not None and found.signature is None
    assert (found.comparison.verdict, found.comparison.note) == ("ok", "as good a choice")
