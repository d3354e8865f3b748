"""The CUDA attention kernels: against float64, hostile inputs, bit-identical repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_judge import judge, kernel, same_each_time, views
from torch import Tensor

from dsv4_bench.engine.cuda.attention import attention_rope, joins_rope
from dsv4_bench.engine.kv_entry import pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SCALE = 512**-0.5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def rows_of(pool: Tensor, n: int, width: int, empty: float = 0.0) -> Tensor:
    """[n, width] int32 random rows of the pool, a share of them -1; no row twice in a token."""
    picks = torch.rand(n, len(pool), device="cuda").argsort(dim=1)[:, :width].int()
    return torch.where(torch.rand(n, width, device="cuda") < empty, -1, picks)


def case(
    n: int,
    heads: int,
    window: int,
    selected: int,
    dim: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    empty: float = 0.1,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the op; every row that no index names is NaN."""
    q = (torch.randn(n, heads, dim, device="cuda") * 2).to(dtype)
    args: list[Any] = [q]
    for width in (window, selected):
        pool = torch.randn(2 * width + 3, dim, device="cuda").to(dtype)
        index = rows_of(pool, n, width, empty)
        used = torch.zeros(len(pool), dtype=torch.bool, device="cuda")
        used[index[index >= 0].long()] = True
        args += [torch.where(used[:, None], pool, torch.nan), index]
    return tuple(args), {"sink": torch.randn(heads, device="cuda"), "scale": dim**-0.5}


WIDTHS = [
    (128, 512),
    (1, 0),
    (2, 1),
    (63, 64),
    (64, 65),
    (65, 127),
    (128, 0),
    (127, 129),
    (128, 1024),
]


@pytest.mark.parametrize("n", [1, 3, 9, 40, 70, 150])
@pytest.mark.parametrize("window, selected", WIDTHS)
def test_widths(n: int, window: int, selected: int) -> None:
    args, params = case(n, 64, window, selected)
    judge("attention", *args, **params)


@pytest.mark.parametrize(
    "n, selected", [(20, 512), (20, 320), (14, 512), (1, 4000), (3, 1900), (140, 512)]
)
def test_other_shares(n: int, selected: int) -> None:
    """Two shares that meet in a cluster, many that a second kernel combines; 132 tokens and 8 in clusters."""
    args, params = case(n, 64, 128, selected)
    judge("attention", *args, **params)


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_many_tokens_a_processor(width: int) -> None:
    """One to four blocks of 64 keys a token, odd numbers of them, token after token."""
    args, params = case(300, 64, width, 0)
    judge("attention", *args[:3], None, None, **params)
    judge("attention", *args, **params)


@pytest.mark.parametrize("heads", [128, 64, 65, 16, 4, 1])
def test_heads(heads: int) -> None:
    for n in (1, 40):
        args, params = case(n, heads, 128, 300)
        judge("attention", *args, **params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [512, 128, 40])
def test_any_width_and_dtype(dim: int, dtype: torch.dtype) -> None:
    args, params = case(5, 7, 64, 33, dim, dtype)
    judge("attention", *args, **params)


@pytest.mark.parametrize("n", [1, 200])
def test_empty_keys(n: int) -> None:
    args, params = case(n, 64, 128, 512, empty=1.0)  # nothing but the sink
    got = judge("attention", *args, **params)
    assert not got["o"].any()
    args, params = case(n, 64, 128, 512, empty=0.97)  # whole blocks are empty
    judge("attention", *args, **params)
    q, window, index, entries, entry_index = args
    index = torch.where(torch.arange(128, device="cuda") < 100, -1, index)
    judge("attention", q, window, index, None, None, **params)
    judge("attention", q, window, index, entries, entry_index[:, :0], **params)


def test_no_tokens() -> None:
    args, params = case(0, 64, 128, 512)
    judge("attention", *args, **params)


def test_sinks_and_outliers() -> None:
    args, params = case(9, 64, 128, 512)
    args[0][3, 5] *= 60
    for sink in (-torch.inf, -50.0, 0.0, 50.0):
        judge("attention", *args, **{**params, "sink": torch.full((64,), sink, device="cuda")})
    same = [x.clone() for x in args]
    same[1][:], same[3][:] = same[1][same[2].max()], same[1][same[2].max()]  # all logits equal
    judge("attention", *same, **params)


def test_nan_stays_with_its_token() -> None:
    args, params = case(9, 64, 128, 512)
    clean = kernel("attention", *args, **params)
    args[0][4, 11, 3] = torch.nan
    spoilt = kernel("attention", *args, **params)
    keep = torch.ones(9, 64, dtype=torch.bool, device="cuda")
    keep[4, 11] = False
    assert spoilt["o"][4, 11].isnan().all()
    for name, value in spoilt.items():
        assert torch.equal(value[keep], clean[name][keep]), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "n, widths", [(1, (128, 512)), (5, (128, 200)), (9, (128, 512)), (2, (65, 0))]
)
def test_rope_in_the_same_launch(n: int, widths: tuple[int, int], packed: bool) -> None:
    args, params = case(n, 64, *widths)
    if packed:
        args = (args[0], pack(args[1], 584), args[2], pack(args[3], 584), args[4])
    positions, freqs = torch.randint(1 << 20, (n,), device="cuda"), torch.rand(32, device="cuda")
    assert joins_rope(args[0], args[1], args[2], args[4], freqs)
    unturned, lse = (value.clone() for value in kernel("attention", *args, **params).values())
    (want,) = kernel("rope", unturned, positions, freqs=freqs, inverse=True).values()
    outs = torch.empty_like(unturned), torch.empty_like(lse)
    for wanted in (None, outs):
        got = attention_rope(*args, positions, **params, freqs=freqs, outs=wanted)
        assert torch.equal(got, want)
    assert torch.equal(outs[0], unturned) and torch.equal(outs[1], lse)


def test_views() -> None:
    args, params = case(6, 64, 128, 512)
    plain = kernel("attention", *args, **params)
    for q, window, entries in zip(views(args[0]), views(args[1]), views(args[3]), strict=True):
        got = kernel("attention", q, window, args[2], entries, args[4], **params)
        assert all(torch.equal(got[name], plain[name]) for name in plain)


@pytest.mark.parametrize("n", [1, 8, 64, 256])
def test_repeats_are_identical(n: int) -> None:
    args, params = case(n, 64, 128, 512)
    same_each_time("attention", *args, **params)


@pytest.mark.parametrize("n", [134, 140, 270])
def test_the_last_tokens_wait_for_what_is_before_and_hold_up_what_is_behind(n: int) -> None:
    """Their clusters do not wait for the kernel of the other tokens, but for the one that made q."""
    args, params = case(n, 64, 128, 64)

    def chain(x: Tensor, between: Callable[[], None]) -> Tensor:
        (q,) = kernel("rms_norm", x, weight=None, eps=1e-6).values()
        between()
        o = kernel("attention", q, *args[1:], **params)["o"]
        between()
        (y,) = kernel("rms_norm", o, weight=None, eps=1e-6).values()
        return y

    inputs = [torch.randn_like(args[0]) for _ in range(12)]
    apart = [chain(x, torch.cuda.synchronize) for x in inputs]
    close = [chain(x, lambda: None) for x in inputs]
    for one, other in zip(apart, close, strict=True):
        assert torch.equal(one, other)


def test_prefill_equals_decode() -> None:
    args, params = case(1000, 64, 128, 512)
    judge("attention", *args, **params)
