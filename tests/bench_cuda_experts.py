"""Cases for bench_cuda.py: routed and shared experts at DeepSeek-V4-Flash shapes, all of route to combine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from bench_cuda import Call, Case
from bench_cuda_linear import BF16, BYTES, CUDA, run, weight

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert

EXPERTS, TOP, D, INNER = 256, 6, 4096, 2048
# Tokens: at least, aim; Humming (tuned up to 64) and Marlin as measured before on an H200, without
# routing; calls to rotate.
FIGURES = {
    1: (50, 30, 50.0, 47.6, 40),
    8: (250, 185, 241.0, 246.5, 10),
    64: (1300, 950, 1239.0, 1284.0, 4),
    1024: (2600, 1500, 1941.0, 2099.0, 3),
    4096: (6500, 3500, 4465.0, 6617.0, 2),
}


@cache
def bank(kind: str) -> list[Expert]:
    def one(n: int, k: int) -> Weight:
        return weight(kind, n, k)

    return [Expert(one(INNER, D), one(D, INNER), one(INNER, D)) for _ in range(EXPERTS)]


def balanced(n: int, turn: int) -> torch.Tensor:
    """Experts [n, TOP]: every one used as often as any other, or at most once."""
    order = (torch.arange(n * TOP) + turn * n * TOP) % EXPERTS
    return torch.randperm(EXPERTS)[order].view(n, TOP).int().to(CUDA)


def at_random(n: int, seed: int) -> torch.Tensor:
    """TOP different experts for each token, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, EXPERTS, generator=generator).topk(TOP).indices.int().to(CUDA)


@cache
def bf16_bank() -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up [experts, d, 2 i], down [experts, i, d], both stored with rows and columns exchanged."""
    up = torch.randn(EXPERTS, 2 * INNER, D, device=CUDA, dtype=BF16)
    down = torch.randn(EXPERTS, D, INNER, device=CUDA, dtype=BF16)
    return up.transpose(1, 2), down.transpose(1, 2)


def grouped_mm(chosen: torch.Tensor) -> Call:
    """torch's two grouped products of dequantised weights; no gather, activation or sum."""
    up, down = bf16_bank()
    ends = torch.bincount(chosen.flatten(), minlength=EXPERTS).cumsum(0).int()
    x = torch.randn(chosen.numel(), D, device=CUDA, dtype=BF16)
    middle = torch.randn(chosen.numel(), INNER, device=CUDA, dtype=BF16)
    return lambda: (
        torch._grouped_mm(x, up, offs=ends),
        torch._grouped_mm(middle, down, offs=ends),
    )


def experts_case(kind: str, n: int, random: bool = False) -> Case:
    """Cold: every call uses other experts, or all of them."""
    route = at_random if random else balanced
    size = int(3 * D * INNER * BYTES[kind])
    distinct = sum(len(route(n, turn).unique()) for turn in range(2)) / 2

    def make(turn: int) -> Call:
        x = torch.randn(n, D, device=CUDA, dtype=BF16)
        routing = torch.rand(n, TOP, device=CUDA)
        return run("experts", x, routing, route(n, turn), bank=bank(kind), limit=7.0)

    def torch_grouped(turn: int) -> Call:
        return grouped_mm(route(n, turn))

    least, aim, their_humming, marlin, copies = FIGURES.get(n, (None, None, None, None, 3))
    judged = kind == "nvfp4" and n in FIGURES and not random
    peers = {"torch grouped_mm bf16": torch_grouped}
    return Case(
        "experts",
        f"{kind} {n} tokens{' at random' if random else ''}, {distinct:g} distinct",
        int(distinct * size) + 6 * n * D,
        6 * D * INNER * n * TOP,
        make,
        peers=peers if kind == "nvfp4" else {},
        published={"Humming": their_humming, "Marlin": marlin} if judged else {},
        least=least if judged else None,
        aim=aim if judged else None,
        copies=copies,
    )


def shared_case(kind: str, n: int) -> Case:
    def make(_: int) -> Call:
        expert = Expert(weight(kind, INNER, D), weight(kind, D, INNER), weight(kind, INNER, D))
        x = torch.randn(n, D, device=CUDA, dtype=BF16)
        return run("shared_expert", x, expert=expert, limit=7.0)

    size = int(3 * D * INNER * BYTES[kind]) + 6 * n * D
    return Case("shared_expert", f"{kind} {n} tokens", size, 6 * D * INNER * n, make)


def cases() -> Iterator[Case]:
    for n in FIGURES:
        yield experts_case("nvfp4", n)
    for n in (64, 1024, 4096):
        yield experts_case("nvfp4", n, random=True)
    for n in (128, 256, 512):
        yield experts_case("nvfp4", n)
    for n in (8, 64, 4096):
        yield experts_case("mxfp4", n)
    for n in (1, 8, 64, 1024):
        yield shared_case("nvfp4", n)
        yield shared_case("fp8", n)
