"""The softmax probe's kernel against the probe's own definition in float64. Skipped where there is no H100 or H200."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_bench.engine import cuda
from dsv4_bench.engine.cuda.softmax_stats import FIELDS, softmax_stats

reason = cuda.library._device_reason()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]


def case(
    n: int, heads: int, dim: int, widths: tuple[int, int], dtype: torch.dtype
) -> dict[str, Any]:
    torch.manual_seed(n + heads)
    pools = [torch.randn(300, dim, device="cuda").to(dtype) for _ in widths]
    index = [torch.randint(-1, 300, (n, w), device="cuda", dtype=torch.int32) for w in widths]
    q = torch.randn(n, heads, dim, device="cuda").to(dtype)
    sink = torch.randn(heads, device="cuda")
    pairs = [pair for pair in zip(pools, index, strict=True) if pair[1].shape[1]]
    given = {"q": q, "sink": sink, "scale": dim**-0.5, "pools": (*pairs, None)[:2]}
    given["lse"] = logits_of(given)[1].float()
    given["sample"] = torch.arange(0, n, max(1, n // 3), device="cuda")
    return given


def logits_of(given: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """Of every pool in float64 [n, h, k], -inf for no key; and the exact lse [n, h] with the sink."""
    q = given["q"].double() * given["scale"]
    logits = []
    for pool in given["pools"]:
        if pool is not None:
            keys = pool[0].double()[pool[1].clamp(min=0)]
            found = torch.einsum("nhd,nkd->nhk", q, keys)
            logits.append(found.masked_fill(pool[1][:, None] < 0, -torch.inf))
    sinks = given["sink"].double().expand(len(q), -1)[..., None]
    return logits, torch.cat([*logits, sinks], -1).logsumexp(-1)


def expected(given: dict[str, Any]) -> list[float]:
    lse, rows = given["lse"].double(), given["sample"]
    weights = [(found - lse[..., None]).exp()[rows] for found in logits_of(given)[0]]
    sink = (given["sink"].double() - lse).exp()
    both = torch.cat(weights, -1)
    sums = both.sum(-1) + sink[rows]
    furthest = sums.flatten()[(sums - 1).abs().argmax()]
    entries = weights[1].sum(-1).mean() if len(weights) > 1 else sums.new_zeros(())
    entropy = torch.special.entr(both).sum(-1).mean()
    padding = (1 - sums).clamp(min=0).max()
    found = (
        sink.mean(),
        weights[0].sum(-1).mean(),
        entries,
        entropy,
        both.max(),
        padding,
        furthest,
    )
    return [float(value) for value in found]


def check(given: dict[str, Any]) -> dict[str, float]:
    result = softmax_stats(**given)
    assert result is not None
    found = result.tolist()
    for name, ours, exact in zip(FIELDS, found, expected(given), strict=True):
        assert ours == pytest.approx(exact, rel=2e-5, abs=2e-6, nan_ok=True), name
    return dict(zip(FIELDS, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, heads, dim, widths", [
    (1, 64, 512, (128, 512)), (1, 64, 512, (128, 0)), (3, 5, 128, (128, 33)), (40, 8, 8, (1, 1)),
    (5, 9, 264, (31, 65)), (7, 128, 512, (128, 1024)),
])  # fmt: skip
def test_right_attention(
    n: int, heads: int, dim: int, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    found = check(case(n, heads, dim, widths, dtype))
    assert found["padding_mass"] < 1e-4 and abs(found["row_sum"] - 1) < 1e-4


def test_padding_that_was_counted_and_a_scaled_sink() -> None:
    given = case(4, 16, 512, (128, 64), torch.bfloat16)
    given["lse"][2] = torch.logaddexp(given["lse"][2], torch.tensor(30.0, device="cuda").log())
    assert check(given)["padding_mass"] > 0.01
    given["lse"] -= 3
    assert check(given)["row_sum"] > 5


def test_nan_is_not_lost() -> None:
    for name in ("q", "lse"):
        given = case(3, 16, 512, (128, 64), torch.float32)
        given[name].view(-1)[7] = torch.nan
        found = dict(zip(FIELDS, softmax_stats(**given).tolist(), strict=True))  # type: ignore[union-attr]
        for field in ("window_mass", "entropy", "max_weight", "padding_mass", "row_sum"):
            assert found[field] != found[field], (name, field)
    given = case(3, 16, 512, (128, 64), torch.float32)
    unused = ~torch.isin(torch.arange(300, device="cuda"), given["pools"][0][1])
    given["pools"][0][0][unused] = torch.nan  # keys that nobody refers to
    check(given)


def test_repeats_are_identical() -> None:
    given = case(9, 64, 512, (128, 512), torch.bfloat16)
    first = softmax_stats(**given)
    assert first is not None
    for _ in range(50):
        again = softmax_stats(**given)
        assert again is not None and torch.equal(again, first)


def test_what_the_kernel_does_not_take() -> None:
    given = case(2, 4, 128, (16, 0), torch.float32)
    given["pools"] = ((given["pools"][0][0].byte(), given["pools"][0][1]), None)
    assert softmax_stats(**given) is None
