"""Invariants hold on the reference in float32 and bfloat16, and each is broken by what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, MakeCheckpoint
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.formats import Weight, quantize_nvfp4
from dsv4_bench.engine.model import Transformer
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.invariants import INVARIANTS, check_invariants, check_scales
from dsv4_bench.workbench.checking.baseline import Baseline

Values = dict[str, Tensor]


@pytest.fixture(scope="module")
def calls(make_checkpoint: MakeCheckpoint) -> dict[torch.dtype, list[Captured]]:
    """Every call of a prefill and a decode step on the reference, by dtype."""
    tokens = torch.randint(2, 300, (140,), generator=torch.Generator().manual_seed(2)).tolist()
    checkpoint = Checkpoint(make_checkpoint("nvfp4", SMALL))
    found = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            baseline = Baseline(Transformer(checkpoint, dtype), tokens, (139, 1), pair=False)
            found[dtype] = [call for piece in baseline.pieces() for call in piece.calls]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_keeps_them(
    calls: dict[torch.dtype, list[Captured]], dtype: torch.dtype
) -> None:
    seen = set()
    with torch.inference_mode():
        for call in calls[dtype]:
            for words, held in check_invariants(call, call.outputs).items():
                seen.add(words)
                assert held.ok and held.value <= held.limit / 3, (call.site.path, held)
    assert seen == {item.words for item in INVARIANTS}


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Captured], Values]:
    return lambda call: {**call.outputs, name: change(call.outputs[name].clone())}


def _put(part: tuple[object, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x[part] = value
        return x

    return change


def _without_padding_mass(call: Captured) -> Values:
    """lse as if one more key with the largest logit had been seen in every row."""
    return {**call.outputs, "lse": torch.logaddexp(call.outputs["lse"], call.outputs["lse"])}


BREAKS: dict[str, tuple[str, Callable[[Captured], Values]]] = {
    "comb's columns sum to 1": ("hc_pre", _changed("comb", lambda c: c.transpose(1, 2))),
    "comb is not negative": ("hc_pre", _changed("comb", _put((-1, 0, 1), -0.01))),
    "post is between 0 and 2": ("hc_pre", _changed("post", _put((0, 2), 2.01))),
    "u is a positive combination of the streams": ("hc_pre", _changed("u", lambda u: -u)),
    "softmax and sink sum to 1": ("attention", _changed("lse", lambda lse: lse - 0.01)),
    "no weight on padding": ("attention", _without_padding_mass),
    "index entries are in range and causal": ("index_topk", _changed("index", _put((0, 0), 7))),
    "index entries are unique": ("index_topk", _changed("index", _put((-1, slice(2)), 0))),
    "hidden entries have score -inf": ("index_score", _changed("score", _put((0, -1), 0.0))),
    "routing weights sum to the scale": ("gate", _changed("routing", lambda r: 1.001 * r)),
    "experts are in range and unique": ("gate", _changed("experts", _put((-1, slice(None)), 3))),
    "rotation keeps the norm of every pair": ("rope", _changed("y", lambda y: 1.01 * y)),
    "dims before the rotated ones are copied": ("rope", _changed("y", _put((0, ..., 0), 9.0))),
    "other rows of the cache are left alone": ("cache_write", _changed("cache", lambda c: c + 1)),
}


@pytest.mark.parametrize("words", [item.words for item in INVARIANTS])
def test_each_is_broken(calls: dict[torch.dtype, list[Captured]], words: str) -> None:
    op, wrong = BREAKS[words]
    with torch.inference_mode():
        several = [call for call in calls[torch.float32] if call.site.op == op]
        held = [check_invariants(call, wrong(call))[words] for call in several]
    broken = [item for item in held if not item.ok]
    assert broken and words in broken[0].sentence
    assert all(item.words != words or not item.ok for item in broken)


def test_nan_breaks_them(calls: dict[torch.dtype, list[Captured]]) -> None:
    call = next(call for call in calls[torch.float32] if call.site.op == "hc_pre")
    with torch.inference_mode():
        outputs = {name: torch.full_like(value, torch.nan) for name, value in call.outputs.items()}
        held = check_invariants(call, outputs)
    assert not any(item.ok for item in held.values())


def test_scales_by_hand() -> None:
    data, scale, total = quantize_nvfp4(torch.randn(32, 64))
    weight = Weight("w", "nvfp4", data, scale, float(total))
    fine = check_scales(weight)
    assert fine is not None and fine.ok
    assert check_scales(Weight("w", "dense", torch.zeros(2, 2))) is None
    raw = scale.view(torch.uint8).clone()
    raw[3, 1] = 0x7F  # NaN
    bad = check_scales(replace(weight, scale=raw.view(torch.float8_e4m3fn)))
    assert bad is not None and not bad.ok and bad.value == 1
    negative = check_scales(replace(weight, global_scale=-1.0))
    assert negative is not None and not negative.ok
