"""Decisions recorded, compared and replayed, against cases worked out by hand; KL and its split"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, with_ratios
from torch import Tensor

import dsv4_bench.engine.cpu  # noqa: F401
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import (
    IMPLEMENTATIONS,
    Site,
    implementation,
    parse_route,
    reference,
    spec_of,
)
from dsv4_bench.probes.decisions import (
    Choice,
    Flips,
    KLMeter,
    Record,
    Replay,
    cut_margin,
    differing_rows,
    kl_divergence,
    replayed,
    spread,
)
from dsv4_bench.workbench.checking import layerwise
from dsv4_bench.workbench.checking.calibration import tapped
from dsv4_bench.workbench.checking.checker import Checker
from dsv4_bench.workbench.checking.decision_split import SplitBaseline

# ------------------------------------------------------------------------------ by hand

OURS = torch.tensor([[0, 2], [1, 2], [3, -1], [0, 1]], dtype=torch.int32)
THEIRS = torch.tensor([[2, 0], [1, 3], [3, -1], [2, 3]], dtype=torch.int32)
SCORES = torch.tensor(
    [
        [4.0, 1.0, 3.0, 0.0],
        [0.0, 9.0, 5.0, 4.5],
        [-math.inf, -math.inf, -math.inf, 1.0],
        [8, 7, 6, 5.0],
    ]
)


def test_rows_that_differ_as_sets() -> None:
    assert differing_rows(OURS, THEIRS).tolist() == [False, True, False, True]


def test_spread_of_what_was_swapped() -> None:
    """Row 1 swaps 5.0 for 4.5; row 3 swaps {8, 7} for {6, 5}: from 8 to 5 it is 3."""
    assert spread(OURS, THEIRS, SCORES).tolist()[1::2] == [0.5, 3.0]
    assert spread(OURS, THEIRS, None).tolist() == [math.inf] * 4
    fewer = torch.tensor([[2, -1]], dtype=torch.int32)
    assert spread(fewer, THEIRS[:1], SCORES[:1]).tolist() == [math.inf]
    nan = SCORES.clone()
    nan[1, 2] = math.nan
    assert spread(OURS, THEIRS, nan)[1] == math.inf


def test_flips_by_hand() -> None:
    """The reference ranks by SCORES_REF; this run moved one score so that row 1 flips."""
    right = SCORES.clone()
    right[1, 3] = 5.25  # the reference has 3 before 2, by 0.25
    right[3] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    flips = Flips("L0/ffn/gate")
    flips.add(Choice(OURS, SCORES, 4), Choice(THEIRS, right, 4), differing_rows(OURS, THEIRS))
    assert (flips.rows, flips.flipped) == (4, 2)
    assert flips.overlap == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert flips.lowest_overlap == 0.0
    assert flips.gap == 1.0  # row 3: the worst of {7, 8} is 1 above the best of {5, 6}
    assert flips.against_scores == 0  # each picked what its own scores say
    # cuts: 3 - 1, 5.25 - 5, (row 2 has nothing left out that is finite), 7 - 6
    assert sorted(cut_margin(Choice(THEIRS, right, 4)).tolist()) == [0.25, 1.0, 2.0]
    assert flips.margin == 1.0
    # row rms moves: 0, .75/2, 0, sqrt((9 + 1 + 1 + 9)/4)
    assert flips.move == 0.0
    flips.add(
        Choice(OURS[1:2], SCORES[1:2], 4), Choice(THEIRS[1:2], right[1:2], 4), torch.tensor([True])
    )
    assert (flips.rows, flips.flipped, flips.move) == (5, 3, pytest.approx(0.375))


def test_picks_against_the_own_scores_are_told_apart() -> None:
    worst = torch.tensor([[3, 1]], dtype=torch.int32)  # scores 4, 1, 3, 0: the two lowest
    flips = Flips("x")
    best = Choice(THEIRS[:1], SCORES[:1], 4)
    flips.add(Choice(worst, SCORES[:1], 4), best, torch.tensor([True]))
    assert flips.against_scores == 1
    table = Flips("hash")
    table.add(Choice(worst, None, 4), Choice(THEIRS[:1], None, 4), torch.tensor([True]))
    assert (table.against_scores, table.gap, table.margin) == (1, math.inf, None)


def test_a_replayed_gate_keeps_its_own_numbers() -> None:
    """scores .5 .3 .2, k = 2, scale 1.5: picks {0, 2} weigh .5/.7 and .2/.7 of 1.5."""
    site = Site("g", spec_of("gate"), {"scale": 1.5, "bias": None, "tid2eid": None}, 0)
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    experts = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    routing = torch.tensor([[9.0, 9.0], [8.0, 8.0]])
    chosen = torch.tensor([[0, 2], [0, 2]], dtype=torch.int32)
    rows = torch.tensor([True, False])
    new, picks, same = replayed(site, (), (routing, experts, scores), rows, chosen)
    torch.testing.assert_close(new, torch.tensor([[1.5 * 5 / 7, 1.5 * 2 / 7], [8.0, 8.0]]))
    assert picks.tolist() == [[0, 2], [0, 1]] and same is scores
    assert routing.tolist() == [[9.0, 9.0], [8.0, 8.0]]  # what the kernel returned is not written


def test_kl_by_hand() -> None:
    """KL of (1/2, 1/2) to (1/4, 3/4) is ln 2 - ln 3 / 2."""
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3.0)]])
    assert float(kl_divergence(p, q)) == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert float(kl_divergence(p, p + 5)) == 0.0
    assert float(kl_divergence(p, torch.tensor([[0.0, math.nan]]))) == math.inf


def test_the_split_by_hand() -> None:
    p, q = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, math.log(3.0)], [0.0, 1.0]])
    meter = KLMeter()
    meter.add(p, q, p)  # with decisions replayed nothing is left
    split = meter.split()
    kl = math.log(2) - math.log(3) / 2
    assert split.total == pytest.approx(kl / 2, rel=1e-6) and split.arithmetic == 0.0
    assert split.decisions == split.total
    assert (split.positions, split.worst_position, split.top1_changed) == (2, 0, 1)
    nan = torch.full_like(p, math.nan)
    meter.add(p, nan, nan)
    assert (meter.split().total, meter.split().decisions) == (math.inf, 0.0)


# ------------------------------------------------------------------------------ in the model

TOKENS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(1)).tolist()
CHUNKS = (23, 1)


@pytest.fixture(scope="module")
def model(make_checkpoint: MakeCheckpoint) -> Transformer:
    return Transformer(Checkpoint(make_checkpoint("nvfp4", with_ratios(SMALL, 0, 4, 0))))


@pytest.fixture
def bug() -> Iterator[Any]:
    planted: list[str] = []

    def plant(op: str, function: Any) -> None:
        implementation(op=op, name="bug")(function)
        planted.append(op)

    yield plant
    for op in planted:
        IMPLEMENTATIONS[op].pop("bug", None)


def worst_experts(x: Tensor, tokens: Tensor, **params: Any) -> Any:
    """Picks the k lowest: only the decision is wrong, every number is right."""
    _, chosen, scores = reference("gate")(x, tokens, **params)
    if params["tid2eid"] is None:
        biased = scores if params["bias"] is None else scores + params["bias"]
        chosen = biased.argsort(dim=-1)[:, : params["k"]].int()
    routing = scores.gather(1, chosen.long())
    return routing / routing.sum(-1, keepdim=True) * params["scale"], chosen, scores


def check(model: Transformer, *route: str, replay: bool = False) -> tuple[Checker, SplitBaseline]:
    checker = Checker(
        model, parse_route(["reference", *route]), poison=False, replay_decisions=replay
    )
    baseline = SplitBaseline(model, TOKENS, CHUNKS, checker.chosen)
    checker.against(baseline)
    return checker, baseline


def test_a_wrong_decision_is_all_decisions(model: Transformer, bug: Any) -> None:
    bug("gate", worst_experts)
    checker, baseline = check(model, "L1/ffn/gate=bug")
    kl = baseline.to_dict()["kl"]
    assert kl["total"] > 1e-4 and kl["decisions"] == kl["total"] and kl["arithmetic"] == 0.0
    rows = {row["site"]: row for row in baseline.to_dict()["decisions"]}
    assert rows["L1/ffn/gate"]["flipped"] == rows["L1/ffn/gate"]["against_scores"] > 0
    assert rows["L1/ffn/gate"]["rows"] == len(TOKENS)
    assert rows["L2/ffn/gate"]["flipped"] == 0  # in the replayed run nothing follows from it
    assert kl["positions"] == len(TOKENS)


def test_wrong_numbers_are_arithmetic(model: Transformer, bug: Any) -> None:
    bug("linear", lambda x, **p: reference("linear")(x, **p) * 1.01)
    _, baseline = check(model, "head/logits=bug")
    kl = baseline.to_dict()["kl"]
    assert kl["arithmetic"] == kl["total"] > 0 and kl["decisions"] == 0.0


def test_an_implementation_that_raises_leaves_no_split(model: Transformer, bug: Any) -> None:
    def broken(*args: Any, **params: Any) -> Any:
        raise RuntimeError("no launch")

    bug("moe_sum", broken)
    checker, baseline = check(model, "L1/ffn/sum=bug")
    assert baseline.to_dict()["kl"] is None
    assert baseline.to_dict()["kl_problem"] == "RuntimeError: no launch"
    assert checker.report.status == "found"


def test_a_check_with_replayed_decisions_carries_no_flips(model: Transformer, bug: Any) -> None:
    bug("gate", worst_experts)
    free, _ = check(model, "L1/ffn/gate=bug")
    kept, _ = check(model, "L1/ffn/gate=bug", replay=True)
    assert free.report.sites["L2/ffn/experts"].carried_error > 1e-3
    assert kept.report.sites["L2/ffn/experts"].carried_error == 0.0
    assert kept.report.status == "found"  # the gate itself is judged by its own picks


def test_work_goes_by_tokens(model: Transformer) -> None:
    """A pass of 23 tokens and one of 1, each with 12 for itself; then the extra batch of two."""
    baseline = SplitBaseline(model, TOKENS, CHUNKS, {})
    work, parts = baseline.work_before(), len(model.layers) + 2
    assert len(work) == baseline.count + 1 and work == sorted(work)
    assert (work[parts], work[2 * parts]) == (pytest.approx(35), pytest.approx(35 + 13))


def test_near_ties_go_the_references_way(model: Transformer, bug: Any) -> None:
    """A bias off by up to 0.3 flips picks that are as close; settling those undoes every flip."""
    steps = layerwise.forward_calls(model, [TOKENS], [CHUNKS])
    layerwise.use(model, layerwise.references(model))
    record = Record()
    with tapped(model, record):
        exact = layerwise.run(model, steps)

    def shaken(x: Tensor, tokens: Tensor, **params: Any) -> Any:
        if params["bias"] is not None:
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(params["bias"].shape, generator=generator) * 0.3
            params = {**params, "bias": params["bias"] + noise}
        return reference("gate")(x, tokens, **params)

    bug("gate", shaken)
    model.set_route(parse_route(["reference", "*/gate=bug"]))
    logits, flipped = {}, {}
    for tolerance in (-1.0, 0.3, math.inf):
        replay = Replay(record, tolerance)
        with tapped(model, replay):
            logits[tolerance] = layerwise.run(model, steps)
        flipped[tolerance] = sum(flips.flipped for flips in replay.flips.values())
    assert flipped[-1.0] >= flipped[0.3] == flipped[math.inf] > 0
    assert torch.equal(logits[0.3], logits[math.inf])
    assert not torch.equal(logits[-1.0], logits[0.3])
    torch.testing.assert_close(logits[0.3], exact, rtol=1e-4, atol=1e-5)
