"""The CUDA kernels of the hyper-connections: against float64, hostile inputs, bit-identical repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cuda_judge import FLOOR, judge, kernel, reference, same_each_time, views, widened
from torch import Tensor

from dsv4_bench.engine.cuda.hyper import hc_post_pre, hc_post_pre_norm
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.probes.metrics import tensor_and_row_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def parameters(d: int, mixes: int = 24) -> dict[str, Any]:
    return {
        "fn": torch.randn(mixes, 4 * d, device="cuda") * (4 * d) ** -0.5,
        "scale": torch.rand(3 if mixes == 24 else 1, device="cuda") + 0.5,
        "base": torch.randn(mixes, device="cuda"),
        "eps": 1e-6,
        "norm_eps": 1e-6,
    }


def streams(n: int, d: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, 4, d, device="cuda").to(dtype)


# 4096 and 7168 in bfloat16 take the cluster kernel, tiles of 8 or 16 tokens; the others the simple one.
COUNTS = [1, 2, 8, 9, 15, 16, 17, 24, 25, 50, 64, 65, 113, 300, 1024, 2100]


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("d", [4096, 7168])
def test_pre_and_head_of_real_widths(n: int, d: int) -> None:
    x = streams(n, d, torch.bfloat16)
    judge("hc_pre", x, iters=20, **parameters(d))
    judge("hc_head", x, **parameters(d, mixes=4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d", [(0, 64), (1, 192), (3, 33), (5, 4096), (70, 256), (0, 4096)])
def test_any_width(n: int, d: int, dtype: torch.dtype) -> None:
    x = streams(n, d, dtype)
    got = judge("hc_pre", x, iters=20, **parameters(d))
    judge("hc_head", x, **parameters(d, mixes=4))
    y = torch.randn(n, d, device="cuda").to(dtype)
    judge("hc_post", y, x, got["post"], got["comb"])


@pytest.mark.parametrize("n", [1, 63, 64, 129])
@pytest.mark.parametrize("d", [4096, 7168])
def test_post_of_real_widths(n: int, d: int) -> None:
    x, y = streams(n, d, torch.bfloat16), torch.randn(n, d, device="cuda").bfloat16()
    post, comb = torch.rand(n, 4, device="cuda"), torch.rand(n, 4, 4, device="cuda")
    judge("hc_post", y, x, post, comb)
    for view in views(x):
        judge("hc_post", y, view, post, comb)


def test_constants_count() -> None:
    x = streams(20, 4096, torch.bfloat16)
    for change in ({"norm_eps": 0.5}, {"eps": 0.01}, {"iters": 1}, {"iters": 3}):
        judge("hc_pre", x * 0.1, **{**parameters(4096), "iters": 20, **change})


def test_views_outliers_and_one_bad_token() -> None:
    x = streams(33, 4096, torch.bfloat16)
    params = parameters(4096)
    x[5, 2, 17], x[7] = 3e4, 0
    for view in views(x):
        judge("hc_pre", view, iters=20, **params)
    clean = kernel("hc_pre", x, iters=20, **params)
    x[9, 1, 4000] = torch.nan
    spoilt = kernel("hc_pre", x, iters=20, **params)
    rows = torch.arange(33, device="cuda") != 9
    for name, value in spoilt.items():
        assert value[9].isnan().any(), name
        assert torch.equal(value[rows], clean[name][rows]), f"{name}: NaN leaks to other tokens"


@pytest.mark.parametrize("n", [1, 40, 700])
def test_repeats_are_identical(n: int) -> None:
    x = streams(n, 4096, torch.bfloat16)
    same_each_time("hc_pre", x, iters=20, **parameters(4096))
    same_each_time("hc_head", x, repeats=20, **parameters(4096, mixes=4))


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("d", [4096, 7168, 64])
def test_post_fused_with_the_next_pre(n: int, d: int) -> None:
    """The same bits as the two kernels, which are judged above."""
    x, y = streams(n, d, torch.bfloat16), torch.randn(n, d, device="cuda").bfloat16()
    params = {**parameters(d), "iters": 20}
    gates = torch.rand(n, 4, device="cuda"), torch.rand(n, 4, 4, device="cuda")
    streams_after = kernel("hc_post", y, x, *gates)["x"]
    wanted = {"x": streams_after, **kernel("hc_pre", streams_after, **params)}
    got = dict(zip(wanted, hc_post_pre(y, x, *gates, **params), strict=True))
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def as_near_float64(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], x: Tensor, params: dict[str, Any]
) -> None:
    """u, post and comb of streams x, ours in another order of additions than the op's."""
    with double_precision():
        wide = reference("hc_pre", x.double(), **{name: widened(v) for name, v in params.items()})
    for one, other, truth in zip(ours, theirs, wide.values(), strict=True):
        error, row = tensor_and_row_error(one, truth)
        fair, fair_row = tensor_and_row_error(other, truth)
        floor = FLOOR[one.dtype]
        assert error <= 1.5 * fair + floor and row <= 1.5 * fair_row + 4 * floor


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 15, 16, 17, 24, 25, 50, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_post_and_pre_fused_with_the_norm(n: int, dtype: torch.dtype) -> None:
    """The streams' bits; u and gates too but of few tokens, which are as near float64; rms_norm's of its u."""
    x, y = streams(n, 4096, torch.bfloat16), torch.randn(n, 4096, device="cuda").bfloat16()
    params = {**parameters(4096), "iters": 20}
    gates = torch.rand(n, 4, device="cuda"), torch.rand(n, 4, 4, device="cuda")
    weight = torch.randn(4096, device="cuda").to(dtype)
    plain = hc_post_pre(y, x, *gates, **params)
    for eps in (1e-6, 0.3):
        *rest, normed = hc_post_pre_norm(y, x, *gates, weight=weight, weight_eps=eps, **params)
        assert torch.equal(rest[0], plain[0])
        if n > 8:
            assert all(map(torch.equal, rest, plain))
        else:
            as_near_float64(rest[1:], plain[1:], plain[0], params)
        u = rest[1].double()
        truth = u * (u.square().mean(1, keepdim=True) + eps).rsqrt() * weight.double()
        worst = ((normed.double() - truth).abs() / truth.abs().clamp_min(1e-30)).max().item()
        assert worst <= 1.001 * 2**-8, worst
        assert torch.equal(normed, kernel("rms_norm", rest[1], weight=weight, eps=eps)["y"])
        outs = tuple(torch.empty_like(like) for like in (x, y, *gates))
        norm = {"weight": weight, "weight_eps": eps, "outs": outs}
        again = hc_post_pre_norm(y, x, *gates, **norm, **params)
        assert all(map(torch.equal, again, (*rest, normed)))
        assert all(a is out for a, out in zip(again[:4], outs, strict=True))
