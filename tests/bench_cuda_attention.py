"""Cases for bench_cuda.py: attention, hyper-connections, indexer, top-k and compressor at V4 shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from bench_cuda import Call, Case
from bench_peers import peers_of
from torch import Tensor

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.cuda.hyper import hc_post, hc_post_pre, hc_post_pre_norm, hc_pre
from dsv4_bench.engine.cuda.indexer import index_score, rope_index_score
from dsv4_bench.engine.cuda.rows import rms_norm, rope
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS
from dsv4_bench.engine.step import Step

F32 = torch.float32
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def case(
    op: str,
    shape: str,
    arguments: Callable[[], Arguments],
    least: float | None = None,
    aim: float | None = None,
    copies: int | None = None,
    **published: float,
) -> Case:
    """Bytes and FLOPs are those of the op's contract, for one call's arguments."""
    function = IMPLEMENTATIONS[op]["sm90"].function

    def make(_: int) -> Call:
        args, params = arguments()
        return lambda: function(*args, **params)

    args, params = arguments()
    cost = OPS[op].cost(args, params, function(*args, **params))
    peers = peers_of(op, arguments)
    return Case(op, shape, cost.bytes, cost.flops, make, peers, published, least, aim, copies)


# ------------------------------------------------------------------------------ hyper-connections


def hyper(n: int, d: int) -> tuple[Callable[[], Arguments], Callable[[], Arguments]]:
    def pre() -> Arguments:
        fn = randn(24, 4 * d, dtype=F32) * (4 * d) ** -0.5
        constants = {"scale": torch.rand(3, device="cuda"), "base": randn(24, dtype=F32)}
        return (randn(n, 4, d),), {
            **{"fn": fn, "iters": 20, "eps": 1e-6, "norm_eps": 1e-6},
            **constants,
        }

    def post() -> Arguments:
        return (randn(n, d), randn(n, 4, d), randn(n, 4, dtype=F32), randn(n, 4, 4, dtype=F32)), {}

    return pre, post


def fused(n: int, d: int) -> Case:
    """hc_post with the next hc_pre: reads y, the streams and fn, writes streams and u."""
    pre, post = hyper(n, d)

    def make(_: int) -> Call:
        params, (inputs, _none) = pre()[1], post()
        return lambda: hc_post_pre(*inputs, **params)

    def apart(_: int) -> Call:
        params, (inputs, _none) = pre()[1], post()
        return lambda: hc_pre(hc_post(*inputs), **params)

    values, weights = 2 * n * d * (1 + 4 + 4 + 1), 4 * 24 * 4 * d
    flops = 2 * n * 4 * d * (5 + 24 + 2)
    peers = {"two_launches": apart}
    return Case("hc_post_pre", f"{n}x4x{d}", values + weights, flops, make, peers)


def fused_with_norm(n: int, d: int) -> Case:
    """The same with the RMS norm of u."""
    pre, post = hyper(n, d)

    def inputs() -> tuple[Any, ...]:
        return post()[0], pre()[1], torch.rand(d, device="cuda").bfloat16()

    def make(_: int) -> Call:
        args, params, weight = inputs()
        return lambda: hc_post_pre_norm(*args, weight=weight, weight_eps=1e-6, **params)

    def apart(_: int) -> Call:
        args, params, weight = inputs()

        def call() -> Any:
            x = hc_post(*args)
            u, *gates = hc_pre(x, **params)
            return x, u, gates, rms_norm(u, weight=weight, eps=1e-6)

        return call

    values, weights = 2 * n * d * (1 + 4 + 4 + 1 + 1), 4 * 24 * 4 * d + 2 * d
    flops = 2 * n * 4 * d * (5 + 24 + 2)
    peers = {"three_launches": apart}
    return Case("hc_post_pre_norm", f"{n}x4x{d}", values + weights, flops, make, peers)


def hyper_cases() -> Iterator[Case]:
    rows = [  # tokens; pre: least, aim, best peer; post: the same
        (1, (9, 4, 14.1), (2, 1.43, 1.43)),
        (64, (12, 5, 19.3), (3.5, 2.68, 2.68)),
        (1024, (35, 20, 35.1), (24, 20.1, 20.1)),
        (8192, (170, 110, 160.7), (165, 145.7, 145.7)),
    ]
    for n, (least, aim, peer), (post_least, post_aim, post_peer) in rows:
        pre, post = hyper(n, 4096)
        yield case("hc_pre", f"{n}x4x4096", pre, least, aim, DeepGEMM_FlashInfer=peer)
        yield case("hc_post", f"{n}x4x4096", post, post_least, post_aim, FlashInfer=post_peer)
        yield fused(n, 4096)
    for n in (1, 8, 64):
        yield fused_with_norm(n, 4096)
    for n in (1, 1024):
        pre, post = hyper(n, 7168)
        yield case("hc_pre", f"{n}x4x7168", pre)
        yield case("hc_post", f"{n}x4x7168", post)
        yield fused(n, 7168)


# ------------------------------------------------------------------------------ attention


@cache
def pools() -> tuple[Tensor, Tensor]:
    """Far more rows than the L2 holds; every call takes others."""
    return randn(150_000, 512), randn(400_000, 512)


def attention(
    n: int, heads: int, widths: tuple[int, int], rows: int = 0
) -> Callable[[], Arguments]:
    """Random rows of the whole pools, or of their first `rows`."""

    def arguments() -> Arguments:
        pool = [whole[:rows] if rows else whole for whole in pools()]
        index = [
            torch.randint(0, len(keys), (n, width), device="cuda", dtype=torch.int32)
            for keys, width in zip(pool, widths, strict=True)
        ]
        constants = {"sink": randn(heads, dtype=F32), "scale": 512**-0.5}
        return (randn(n, heads, 512), pool[0], index[0], pool[1], index[1]), constants

    return arguments


def attention_cases() -> Iterator[Case]:
    rows = [(1, 16, 9, 13.3), (8, 18, 11, 15.1), (64, 52, 25, 43.4), (256, 110, 60, 86.1)]
    for n, least, aim, peer in rows:
        shape, make = f"{n}x64 128+512", attention(n, 64, (128, 512))
        yield case("attention", shape, make, least, aim, FlashMLA=peer)
    for n, heads, widths, peer in (
        (1, 64, (128, 64), 11.65),
        (64, 64, (128, 64), 16.42),
        (1, 128, (128, 1024), 14.76),
        (64, 128, (128, 1024), 53.0),
        (1, 64, (128, 8192), 29.1),
    ):
        make = attention(n, heads, widths)
        shape = f"{n}x{heads} {widths[0]}+{widths[1]}"
        yield case("attention", shape, make, FlashMLA=peer)
    make = attention(4096, 64, (128, 512), rows=5120)
    yield case("attention", "4096x64 128+512 of 5120", make, 1100, 600, 3, FlashMLA=622)


# ------------------------------------------------------------------------------ indexer, compressor


def with_rope(entries: int) -> Case:
    """The rope of one token's queries and their scores."""

    def inputs() -> tuple[Any, ...]:
        step = Step(torch.zeros(1, dtype=torch.int64, device="cuda"), (4 * entries - 1,), (1,), 128)
        freqs = 1 / 10000 ** (torch.arange(32, device="cuda") / 32)
        return randn(1, 64, 128), (randn(1, entries, 128), randn(1, 64), step), freqs

    def make(_: int) -> Call:
        q, others, freqs = inputs()
        return lambda: rope_index_score(q, *others, freqs=freqs, scale=0.01, ratio=4)

    def apart(_: int) -> Call:
        q, others, freqs = inputs()
        positions = others[2].positions

        def call() -> Tensor:
            turned = rope(q, positions, freqs=freqs, inverse=False)
            return index_score(turned, *others, scale=0.01, ratio=4)

        return call

    size, flops = 2 * 128 * (entries + 64) + 4 * entries, 2 * 64 * 129 * entries
    peers = {"two_launches": apart}
    return Case("rope_index_score", f"1 of {entries}", size, flops, make, peers)


def index_cases() -> Iterator[Case]:
    for batch, entries, peer in (
        (1, 1024, None),
        (1, 16384, 3.9),
        (1, 262144, 12.9),
        (8, 16384, 8.0),
        (64, 16384, 39.3),
    ):

        def score(batch: int = batch, entries: int = entries) -> Arguments:
            tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
            step = Step(tokens, (4 * entries - 1,) * batch, (1,) * batch, 128)
            keys, q, weights = randn(batch, entries, 128), randn(batch, 64, 128), randn(batch, 64)
            return (q, keys, weights, step), {"scale": 0.01, "ratio": 4}

        published = {"DeepGEMM_fp8": peer} if peer else {}
        yield case("index_score", f"{batch} of {entries}", score, **published)
        if batch == 1:
            yield with_rope(entries)
    for n, total, equal, peer in (
        (1, 1024, False, None),
        (8, 1024, False, None),
        (64, 1024, False, None),
        (1, 2048, False, None),
        (1, 4096, False, None),
        (1, 16384, False, 4.9),
        (1, 16384, True, 16.1),
        (1, 18432, False, None),
        (1, 262144, False, 8.3),
        (1, 262144, True, 9.6),
        (64, 16384, False, 5.4),
    ):

        def topk(n: int = n, total: int = total, equal: bool = equal) -> Arguments:
            scores = randn(n, total, dtype=F32)
            visible = torch.full((n,), total, device="cuda")
            return (scores * 0 if equal else scores, visible), {"k": 512}

        shape = f"{n} of {total} {'equal' if equal else 'random'}"
        published = {"SGLang": peer} if peer else {}
        yield case("index_topk", shape, topk, None, None, 8, **published)


def compressor_cases() -> Iterator[Case]:
    for ratio, start, n in (
        (4, 4095, 1),
        (4, 4094, 1),
        (128, 4095, 1),
        (128, 4094, 1),
        (4, 0, 4096),
    ):

        def pool(ratio: int = ratio, start: int = start, n: int = n) -> Arguments:
            width, slots = (1024, 8) if ratio == 4 else (512, 128)
            states = randn(1, slots, width, dtype=F32), randn(1, slots, width, dtype=F32)
            step = Step(torch.zeros(n, dtype=torch.int64, device="cuda"), (start,), (n,), 128)
            inputs = randn(n, width, dtype=F32), randn(n, width, dtype=F32)
            return (*inputs, *states, step), {"ape": randn(ratio, width, dtype=F32)}

        yield case("compressor", f"ratio {ratio}, {n} from {start}", pool, copies=48)


def cases() -> Iterator[Case]:
    torch.manual_seed(1)
    yield from hyper_cases()
    yield from attention_cases()
    yield from index_cases()
    yield from compressor_cases()
