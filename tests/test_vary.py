"""`check --vary` says which variable changes the bits, where first, and whether rounding explains it"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, Plant, with_ratios
from torch import Tensor

import dsv4_bench.engine.cpu  # noqa: F401
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route, reference
from dsv4_bench.workbench.checking import layerwise
from dsv4_bench.workbench.checking.sequence_rows import aligned, rows_at
from dsv4_bench.workbench.checking.varying import Effect, Varied, standard_variations, vary

TOKENS = torch.randint(2, 300, (48,), generator=torch.Generator().manual_seed(1)).tolist()
CHUNKS = (44, 1, 3)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return Checkpoint(make_checkpoint("nvfp4", with_ratios(SMALL, 0, 4)))


def varied(checkpoint: Checkpoint, *route: str, only: str = "") -> Varied:
    """All standard variations, or the repeats and those of the variable `only`."""
    model = Transformer(checkpoint)
    model.set_route(parse_route(route or ("kernel",)))
    variations = standard_variations(TOKENS, CHUNKS)
    wanted = ("base", "repeat", only)
    return vary(model, [v for v in variations if not only or v.variable in wanted])


def by_variable(result: Varied) -> dict[str, list[Effect]]:
    groups = itertools.groupby(result.effects, lambda effect: effect.variable)
    return {name: list(effects) for name, effects in groups}


# ------------------------------------------------------------------------------ by hand


def test_rows_of_one_sequence(checkpoint: Checkpoint) -> None:
    """Sequences of 9 and 6 tokens: rows 9 to 14 are the second's; at ratio 4 they close 2 and 1."""
    model = Transformer(checkpoint)
    steps = layerwise.forward_calls(model, [list(range(9)), list(range(6))], [(9,), (6,)])
    site = model.sites["L1/attn/compressor/norm"]
    assert rows_at(site, steps[0], 1, 15, 4) == slice(9, 15)
    assert rows_at(site, steps[0], 1, 3, 4) == slice(2, 3)
    assert rows_at(site, steps[0], 0, 3, 4) == slice(0, 2)
    assert rows_at(site, steps[0], 0, 7, 4) is None
    assert rows_at(model.sites["L1/attn/gather_swa"], steps[0], 0, 15, 0) is None


def test_scores_and_picks_of_other_widths_are_filled_up() -> None:
    inf = torch.inf
    a, b = aligned([torch.zeros(1, 1), torch.ones(1, 2)], [torch.zeros(2, 3)])
    assert a.tolist() == [[0, -inf, -inf], [1, 1, -inf]] and b.shape == (2, 3)
    picks, _ = aligned([torch.zeros(1, 1, dtype=torch.int32)], [torch.zeros(1, 2).int()])
    assert picks.tolist() == [[0, -1]]


def test_every_variation_runs_the_same_tokens() -> None:
    variations = standard_variations(TOKENS, CHUNKS)
    assert variations[0].chunks == ((44, 1, 3),)
    assert {v.variable for v in variations[1:]} == {
        "repeat",
        "threads",
        "chunks",
        "batch",
        "companions",
    }
    for variation in variations:
        assert list(variation.sequences[variation.ours]) == TOKENS
    neighbours = [len(v.sequences[1 - v.ours]) for v in variations if v.variable == "companions"]
    assert neighbours == [3, 48 + 37]


def test_a_single_token_can_be_varied() -> None:
    variations = standard_variations([5], (1,))
    assert all(v.sequences[v.ours] == (5,) for v in variations)


# ------------------------------------------------------------------------------ in the model


def test_honest_kernels_are_clean(checkpoint: Checkpoint) -> None:
    result = varied(checkpoint)
    assert result.status == "clean"
    effects = by_variable(result)
    assert [effect.verdict for effect in effects["repeat"]] == ["same", "same"]
    assert len(effects["chunks"]) == 2


def test_a_fault_beyond_row_128_shows_beside_other_sequences(
    checkpoint: Checkpoint, plant: Plant
) -> None:
    def tile(x: Tensor, **params: Any) -> Tensor:
        y = reference("rms_norm")(x, **params)
        y[80:] *= 1.01  # never reached by 48 tokens alone
        return y

    plant("rms_norm", tile)
    result = varied(checkpoint, "reference", "L1/ffn/norm=bug")
    effects = by_variable(result)
    assert result.status == "found"
    for name in ("repeat", "threads", "chunks"):
        assert not any(effect.verdict == "over" for effect in effects[name])
    (batch,) = effects["batch"]
    after, before = effects["companions"]
    for effect in (batch, before):
        assert effect.first_over is not None and effect.first_over.site == "L1/ffn/norm"
        assert effect.first_over.error == pytest.approx(0.01, rel=0.5)
    assert after.verdict != "over"


def test_a_kernel_that_differs_between_repeats(checkpoint: Checkpoint, plant: Plant) -> None:
    calls = itertools.count()
    steps = {"size": 1e-2}

    def racing(routed: Tensor, shared: Tensor, **params: Any) -> Tensor:
        y = reference("moe_sum")(routed, shared, **params)
        return y * (1 + steps["size"] * (next(calls) % 7))

    plant("moe_sum", racing)
    effects = by_variable(varied(checkpoint, "reference", "L0/ffn/sum=bug", only="repeat"))
    assert [effect.verdict for effect in effects["repeat"]] == ["over", "over"]
    assert effects["repeat"][0].first == effects["repeat"][0].first_over
    first = effects["repeat"][0].first
    assert first is not None and first.site == "L0/ffn/sum"
    assert first.limit < 1e-5  # rounding, which the racing kernel has no part in

    steps["size"] = 2.0**-24  # below the rounding of the ops around it
    quiet = varied(checkpoint, "reference", "L0/ffn/sum=bug", only="repeat")
    assert quiet.status == "clean"
    repeats = by_variable(quiet)["repeat"]
    assert "rounding" in {effect.verdict for effect in repeats}
    assert any("not fixed" in effect.sentence for effect in repeats)


def test_a_kernel_that_depends_on_threads(checkpoint: Checkpoint, plant: Plant) -> None:
    def threaded(x: Tensor, **params: Any) -> Tensor:
        y = reference("linear")(x, **params)
        return y * (1 + 0.01 * torch.get_num_threads())

    plant("linear", threaded)
    before = torch.get_num_threads()
    effects = by_variable(varied(checkpoint, "reference", "head/logits=bug", only="threads"))
    assert [effect.verdict for effect in effects["threads"]] == ["over"]
    assert effects["threads"][0].logits is not None
    assert effects["repeat"][0].verdict == "same"
    assert torch.get_num_threads() == before


def test_flipped_picks_beyond_near_ties_are_over(checkpoint: Checkpoint, plant: Plant) -> None:
    def crowded(x: Tensor, tokens: Tensor, **params: Any) -> Any:
        routing, chosen, scores = reference("gate")(x, tokens, **params)
        if len(x) > 60 and params["tid2eid"] is None:
            biased = scores if params["bias"] is None else scores + params["bias"]
            chosen = biased.argsort(dim=-1)[:, : params["k"]].int()
        return routing, chosen, scores

    plant("gate", crowded)
    effects = by_variable(varied(checkpoint, "reference", "L1/ffn/gate=bug", only="batch"))
    (batch,) = effects["batch"]
    assert batch.first_over is not None
    assert (batch.first_over.site, batch.first_over.output) == ("L1/ffn/gate", "experts")
    assert effects["repeat"][0].verdict == "same"


def test_a_kernel_that_fails_beside_others(checkpoint: Checkpoint, plant: Plant) -> None:
    def alone(x: Tensor, **params: Any) -> Tensor:
        if len(x) > 60:
            raise RuntimeError("grid too large")
        return reference("rms_norm")(x, **params)

    plant("rms_norm", alone)
    effects = by_variable(varied(checkpoint, "reference", "head/norm=bug", only="batch"))
    assert effects["batch"][0].raised == "RuntimeError: grid too large"
    assert effects["batch"][0].verdict == "over"
    assert effects["repeat"][0].verdict == "same"


def test_a_route_that_fails_by_itself_is_an_error(checkpoint: Checkpoint, plant: Plant) -> None:
    def broken(*args: Any, **params: Any) -> Any:
        raise RuntimeError("no launch")

    plant("moe_sum", broken)
    with pytest.raises(DSV4Error, match="no launch") as caught:
        varied(checkpoint, "reference", "L0/ffn/sum=bug")
    assert caught.value.exit_code == ExitCode.CRASHED
