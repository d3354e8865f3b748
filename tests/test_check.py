"""`check` names planted bugs by site, op and kind, and stays silent on honest kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4_bench.engine.cpu  # noqa: F401
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, implementation, parse_route, reference
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes.metrics import ulp_histogram
from dsv4_bench.probes.signatures import Difference, classify
from dsv4_bench.workbench.checking import Checker, CheckReport

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


@pytest.fixture
def plant() -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """Register `bug` implementations for one test."""
    planted: list[str] = []

    def register(op: str, function: Callable[..., Any]) -> None:
        implementation(op=op, name="bug")(function)
        planted.append(op)

    yield register
    for op in planted:
        del IMPLEMENTATIONS[op]["bug"]


def check(
    checkpoint: Checkpoint, route: list[str], dtype: torch.dtype = torch.float32
) -> CheckReport:
    model = Transformer(checkpoint, dtype)
    chunks = (len(TOKENS) - 2, 1, 1)
    return Checker(model, parse_route(route)).run(TOKENS, chunks, lambda *progress: None)


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
    checkpoint: Checkpoint,
    plant: Callable[[str, Callable[..., Any]], None],
    op: str,
    bug: Callable[..., Any],
    site: str,
    kind: str | None,
) -> None:
    plant(op, bug)
    report = check(checkpoint, ["kernel", f"{site}=bug"])
    assert report.status == "found"
    assert {finding.site for finding in report.findings} == {site}
    first = report.to_dict()["first"]
    assert (first["site"], first["op"]) == (site, op)
    if kind is not None:
        assert first["kind"] == kind
    assert report.sites["head/logits"].verdict != "over"  # wrong inputs are not its fault


# -- signatures on constructed differences

TRUTH = torch.randn(24, 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _classified(ours: Tensor, truth: Tensor = TRUTH, **fields: Any) -> str:
    return classify(Difference("y", ours, truth, 1e-6, **fields)).kind


def test_signatures_by_construction() -> None:
    head = TRUTH.clone()
    head[:, 2] *= 0.5
    assert _classified(head) == "constant_factor"
    assert _classified(TRUTH.transpose(0, 1).reshape(TRUTH.shape)) == "transposed"
    assert _classified(TRUTH.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)) == "nibbles"
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert _classified(TRUTH[order]) == "permuted"
    assert _classified(TRUTH.roll(1, -1)) == "shifted"
    assert _classified(torch.where(TRUTH.abs() < 0.1, 0.0, TRUTH)) == "flushed"
    assert _classified(TRUTH.clamp(-1, 1)) == "saturated"
    rows = TRUTH.clone()
    rows[5] = torch.randn(4, 32, dtype=torch.float64)
    assert _classified(rows) == "rows"
    late = TRUTH.clone()
    late[20:] = torch.randn(4, 4, 32, dtype=torch.float64)
    assert _classified(late, positions=torch.arange(24)) == "positions"
    assert _classified(torch.randn(24, 4, 32, dtype=torch.float64)) == "unexplained"


def test_ulp_histogram_by_hand() -> None:
    one = torch.tensor([1.0, 1.0, -1.0, 0.0])
    up = torch.tensor([1.0, 1.0 + 2**-23, -1.0 - 2**-22, -0.0])
    assert ulp_histogram(up, one.double()) == {
        "0": 2,
        "1": 1,
        "2": 1,
        "3-4": 0,
        "5-16": 0,
        "more": 0,
    }


def test_the_attention_reference_takes_no_tokens() -> None:
    """A ragged step may leave an implementation with nothing to do."""
    none = torch.zeros(0, 3, dtype=torch.int32)
    q, pool = torch.zeros(0, 2, 8), torch.zeros(4, 8)
    o, lse = reference("attention")(q, pool, none, None, None, sink=torch.zeros(2), scale=1.0)
    assert o.shape == (0, 2, 8) and lse.shape == (0, 2)
