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


def case(n: int, heads: int, dim: int, widths: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(n + heads)
    pools = [torch.randn(300, dim, device="cuda").bfloat16() for _ in widths]
    index = [torch.randint(-1, 300, (n, w), device="cuda", dtype=torch.int32) for w in widths]
    q = torch.randn(n, heads, dim, device="cuda").bfloat16()
    sink = torch.randn(heads, device="cuda")
    pairs = [pair for pair in zip(pools, index, strict=True) if pair[1].shape[1]]
    given = {"q": q, "sink": sink, "scale": dim**-0.5, "pools": (*pairs, None)[:2]}
    given["lse"] = logits_of(given)[1].float()
    given["sample"] = list(range(0, n, max(1, n // 3)))
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


def expected(given: dict[str, Any]) -> Tensor:
    """FIELDS [s, 7] in float64; the sinks of all tokens in every row."""
    lse, rows = given["lse"].double(), given["sample"]
    weights = [(found - lse[..., None]).exp()[rows] for found in logits_of(given)[0]]
    sink = (given["sink"].double() - lse).exp()
    both = torch.cat(weights, -1)
    over = both.sum(-1) + sink[rows] - 1
    entries = weights[1].sum((1, 2)) if len(weights) > 1 else over.new_zeros(len(rows))
    columns = (sink.sum().expand(len(rows)), weights[0].sum((1, 2)), entries)
    columns += (torch.special.entr(both).sum((1, 2)), both.amax((1, 2)))
    return torch.stack([*columns, over.amax(1), (-over).amax(1)], 1)


def check(given: dict[str, Any]) -> Tensor:
    found = softmax_stats(**given)
    assert found is not None and found.shape == (len(given["sample"]), len(FIELDS))
    exact = expected(given)
    heads = given["q"].shape[1]
    for column, name in enumerate(FIELDS):
        ours, truth = found[:, column], exact[:, column]
        if name == "sinks":
            ours, truth = ours.sum(0), truth[0]
        many = heads if name in ("window", "entries", "entropy") else 1
        many = truth.clamp(min=1) if name == "sinks" else many
        assert bool(((ours - truth).abs() <= 2e-5 * truth.abs() + 2e-6 * many).all()), (
            name,
            ours,
            truth,
        )
    return exact


@pytest.mark.parametrize("n, heads, dim, widths", [
    (1, 64, 512, (128, 512)), (1, 64, 512, (128, 0)), (3, 5, 128, (128, 33)), (40, 8, 8, (1, 1)),
    (5, 9, 264, (31, 65)), (7, 128, 512, (128, 1024)), (2, 17, 40, (7, 2000)), (9, 1, 512, (128, 8)),
])  # fmt: skip
def test_right_attention(n: int, heads: int, dim: int, widths: tuple[int, int]) -> None:
    exact = check(case(n, heads, dim, widths))
    assert float(exact[:, -2:].max()) < 1e-4


def test_padding_that_was_counted_and_a_scaled_sink() -> None:
    given = case(4, 16, 512, (128, 64))
    given["lse"][1] = torch.logaddexp(given["lse"][1], torch.tensor(30.0, device="cuda").log())
    assert check(given)[1, FIELDS.index("under")] > 0.01
    given["lse"] -= 3
    assert float(check(given)[:, FIELDS.index("over")].max()) > 5


def test_one_key_of_one_head_is_found_wherever_it_lies() -> None:
    """All other weights are about 0: mass, largest weight and pool tell which key was seen."""
    heads, dim = 64, 512
    for place in (0, 7, 8, 127, 128, 300, 639):
        for head in (0, 15, 16, 63):
            given = case(1, heads, dim, (128, 512))
            given["lse"] += 60
            given["pools"][0][1].fill_(-1)
            given["pools"][1][1].fill_(-1)
            pool, index = given["pools"][place >= 128]
            index[0, place - 128 * (place >= 128)] = 299
            q, key = given["q"][0, head].double(), pool[299].double()
            given["lse"][0, head] = float(q @ key) * given["scale"] - 0.5
            check(given)


def test_nan_is_not_lost() -> None:
    for name in ("q", "lse"):
        given = case(3, 16, 512, (128, 64))
        given[name].view(-1)[7] = torch.nan
        found = softmax_stats(**given)
        assert found is not None
        row = dict(zip(FIELDS, found[0].tolist(), strict=True))
        for field in ("window", "entropy", "largest", "over", "under"):
            assert row[field] != row[field], (name, field)
    given = case(3, 16, 512, (128, 64))
    unused = ~torch.isin(torch.arange(300, device="cuda"), given["pools"][0][1])
    given["pools"][0][0][unused] = torch.nan  # keys that nobody refers to
    check(given)


def test_repeats_are_identical() -> None:
    given = case(9, 64, 512, (128, 512))
    first = softmax_stats(**given)
    assert first is not None
    for _ in range(50):
        again = softmax_stats(**given)
        assert again is not None and torch.equal(again, first)


def test_what_the_kernel_does_not_take() -> None:
    given = case(2, 4, 128, (16, 0))
    packed = (given["pools"][0][0].view(torch.uint8), given["pools"][0][1])
    assert softmax_stats(**{**given, "pools": (packed, None)}) is None
    assert softmax_stats(**{**given, "q": given["q"].float()}) is None
    assert softmax_stats(**{**given, "sample": [0] * 9}) is None
