"""What was computed instead: a changed input is found again from the wrong output alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.formats import Weight, quantize_mxfp4, quantize_nvfp4
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses import explain
from dsv4_bench.probes.hypotheses.base import cut, hypotheses_for, try_one
from dsv4_bench.probes.hypotheses.weights import changed_weights
from dsv4_bench.probes.signatures import KINDS
from dsv4_bench.probes.verdicts import judge_values
from dsv4_bench.workbench.checking.baseline import Baseline

CONFIG = replace(
    TINY,
    vocab_size=300,
    hidden_size=64,
    q_lora_rank=64,
    o_lora_rank=32,
    head_dim=128,
    qk_rope_head_dim=32,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    compress_ratios=(4, 128),
    num_hash_layers=1,
    num_attention_heads=2,
    index_n_heads=4,
    index_head_dim=64,
)
OPS = (
    "embed", "hc_pre", "hc_post", "hc_head", "rms_norm", "linear", "grouped_linear", "rope",
    "cache_write", "gather_swa", "compressor", "index_score", "index_topk", "attention", "gate",
    "experts", "shared_expert", "moe_sum",
)  # fmt: skip


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    folder = tmp_path_factory.mktemp("hypotheses") / "ckpt"
    model = Transformer(Checkpoint(write_checkpoint(folder, CONFIG, "nvfp4-dense", seed=3)))
    tokens = torch.randint(2, 300, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    base = Baseline(model, tokens, (140, 9, 1), pair=False)
    with torch.inference_mode():
        for piece in base.pieces():
            for call in piece.calls:
                base.limits.learn(call, call.truth, None)
    return base


def calls_of(base: Baseline, op: str, forward: int = 0) -> list[Captured]:
    """Calls of an op in one pass, cut to a few rows where its rows are independent."""
    found = []
    for piece in base.pieces():
        for call in piece.calls:
            if piece.forward == forward and call.site.op == op:
                found.append(call)
    return found


def few_rows(call: Captured) -> Captured:
    rowwise = {"embed", "hc_pre", "hc_post", "hc_head", "rms_norm", "linear", "grouped_linear",
               "rope", "attention", "index_topk", "gate", "experts", "shared_expert", "moe_sum"}  # fmt: skip
    return cut(call, slice(118, 140)) if call.site.op in rowwise else call


def as_computed(call: Captured, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float64 outputs in the dtypes that an implementation returns."""
    return {n: outputs[n].to(v.dtype) for n, v in call.outputs.items()}


@pytest.mark.parametrize("op", OPS)
def test_a_hypothesis_is_found_again(baseline: Baseline, op: str) -> None:
    """Whatever was changed, the wrong output leads back to it, or to a change with the same effect."""
    call = few_rows(calls_of(baseline, op)[-1])
    limits, config = baseline.limits, baseline.model.config
    with torch.inference_mode():
        every = list(hypotheses_for(call, config))
        assert every and {h.kind for h in every} <= set(KINDS)
        random.Random(op).shuffle(every)
        tried = 0
        for hypothesis in every:
            try:
                ours = as_computed(call, hypothesis.outputs(call))
                verdict = judge_values(call, ours, call.truth, limits)
            except Exception:
                continue
            if any(v.isnan().any() for v in ours.values()):
                continue
            if not verdict.broken or try_one(call, ours, limits, hypothesis, {}) is None:
                continue  # no effect, or one within the limit
            found = explain(call, ours, limits, config)
            assert found is not None, hypothesis.words
            if found.hypothesis.kind != hypothesis.kind:
                again = as_computed(call, found.hypothesis.outputs(call))
                assert try_one(call, again, limits, hypothesis, {}), (hypothesis, found)
            tried += 1
            if tried == 3:
                break
        assert tried == 3


@pytest.mark.parametrize("op", OPS)
def test_the_reference_needs_no_hypothesis(baseline: Baseline, op: str) -> None:
    with torch.inference_mode():
        for call in calls_of(baseline, op)[:2]:
            assert not judge_values(call, call.outputs, call.truth, baseline.limits).broken


@pytest.mark.parametrize("op", ["linear", "attention", "hc_pre", "rms_norm"])
def test_noise_is_not_explained(baseline: Baseline, op: str) -> None:
    """Random numbers in place of an output are no bug that anybody could name."""
    call = few_rows(calls_of(baseline, op)[-1])
    generator = torch.Generator().manual_seed(4)
    ours = {n: torch.randn(v.shape, generator=generator).to(v) for n, v in call.outputs.items()}
    with torch.inference_mode():
        assert explain(call, ours, baseline.limits, baseline.model.config) is None


# -- bugs of one kind in a part of the rows


def _short_rows(call: Captured) -> Tensor:
    return (call.inputs["window_index"] < 0).any(1)


def test_padding_as_keys_is_named_with_its_rows(baseline: Baseline) -> None:
    call = cut(calls_of(baseline, "attention")[-1], slice(100, 140))
    index = call.inputs["window_index"]
    window = torch.cat((call.inputs["window"], call.inputs["window"].new_zeros(1, 128)))
    with torch.inference_mode():
        ours = call.oracle(
            window=window, window_index=torch.where(index >= 0, index, len(window) - 1)
        )
        found = explain(call, as_computed(call, ours), baseline.limits, None)
    assert found is not None and found.hypothesis.kind == "padding"
    assert "padding of window_index is counted as keys" in found.words


def test_a_bug_in_some_rows_is_explained_there(baseline: Baseline) -> None:
    call = calls_of(baseline, "rope")[0]
    a = call.inputs
    late = a["positions"] >= 128
    with torch.inference_mode():
        off = torch.where(late, a["positions"] + 1, a["positions"])
        ours = as_computed(call, call.oracle(positions=off))
        groups = {"positions from 128 on": late}
        found = explain(call, ours, baseline.limits, baseline.model.config, groups)
    assert found is not None and found.hypothesis.kind == "shifted"
    assert found.words.endswith("(only in positions from 128 on)")


def test_a_factor_nobody_thought_of_is_fitted(baseline: Baseline) -> None:
    call = few_rows(calls_of(baseline, "attention")[-1])
    with torch.inference_mode():
        ours = as_computed(call, call.oracle(scale=1.277 * call.inputs["scale"]))
        found = explain(call, ours, baseline.limits, baseline.model.config)
    assert found is not None and found.hypothesis.kind == "constant_factor"
    assert "1.277 times" in found.words


# -- weights


def _weight(form: str) -> Weight:
    value = torch.randn(128, 256, generator=torch.Generator().manual_seed(6))
    if form == "nvfp4":
        data, scale, total = quantize_nvfp4(value)
        return Weight("w", form, data, scale, float(total))
    data, scale = quantize_mxfp4(value)
    return Weight("w", form, data, scale)


def _nibbles_by_hand(weight: Weight) -> Tensor:
    """Neighbouring columns of the dense matrix exchanged; a pair shares its block scale."""
    return weight.dequantize().view(128, 128, 2).flip(-1).reshape(128, 256)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_misread_weights_by_hand(form: str) -> None:
    weight = _weight(form)
    table = {words: changed for _, words, changed in changed_weights(weight)}
    dense, block = weight.dequantize(), 256 // weight.scale.shape[1]  # type: ignore[union-attr]
    nibbles = table["low and high nibble are exchanged"].dequantize()
    assert torch.equal(nibbles, _nibbles_by_hand(weight))
    codes = table["block scales are left out"].dequantize()
    factors = dense / torch.where(codes == 0, torch.inf, codes)  # a block scale (times g) each
    blocks = factors.view(128, -1, block).amax(-1)
    shifted = table["block scales are shifted by 1 row"].dequantize()
    again = shifted / torch.where(codes == 0, torch.inf, codes)
    expected = blocks.roll(1, 0)
    assert torch.allclose(again.view(128, -1, block).amax(-1), expected * weight.global_scale**0)
    if form == "nvfp4":
        half = table["the global scale is read as its square root"]
        assert half.global_scale == pytest.approx(weight.global_scale**0.5)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_changed_weights_keep_their_shape(form: str) -> None:
    weight = _weight(form)
    for _, words, changed in changed_weights(weight):
        assert changed.shape == weight.shape, words
        assert changed.dequantize().shape == (128, 256), words
