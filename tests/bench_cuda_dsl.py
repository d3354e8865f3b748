"""Cases for bench_cuda.py: cutedsl's linear and grouped_linear at many rows, beside cuBLAS and sm90."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench_cuda import Call, Case
from test_cuda_dsl import random_weight

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.registry import IMPLEMENTATIONS

BF16, CUDA = torch.bfloat16, torch.device("cuda")
BYTES = {"nvfp4": 9 / 16, "mxfp4": 17 / 32, "fp8_e8m0": 1.0, "bf16": 2.0}
SHAPES = [(4096, 8192), (32768, 1024), (8192, 8192)]


def case(kind: str, n: int, k: int, m: int, groups: int = 1) -> Case:
    op = "linear" if groups == 1 else "grouped_linear"

    def call(name: str) -> Call:
        function = IMPLEMENTATIONS[op][name].function
        x = torch.randn(m, groups * k, device=CUDA, dtype=BF16)
        weight = random_weight(kind, n, k)
        if groups > 1:
            return lambda: function(x, weight=weight, groups=groups)
        return lambda: function(x, weight=weight, out_dtype=None)

    def cublas(_: int) -> Call:
        if groups == 1:
            x = torch.randn(m, k, device=CUDA, dtype=BF16)
            w = torch.randn(n, k, device=CUDA, dtype=BF16).T
            return lambda: torch.mm(x, w)
        o = torch.randn(groups, m, k, device=CUDA, dtype=BF16)
        parts = torch.randn(groups, k, n // groups, device=CUDA, dtype=BF16)
        return lambda: torch.bmm(o, parts)

    size = int(n * k * BYTES[kind]) + 2 * m * (n + groups * k)
    shape = f"{kind} {n}x{k}{f' {groups} groups' if groups > 1 else ''} m{m}"
    peers = {"cuBLAS bf16": cublas}
    if m <= 1024:  # far slower beyond
        peers["sm90"] = lambda _: call("sm90")
    return Case(
        f"{op}/cutedsl", shape, size, 2 * m * n * k, lambda _: call("cutedsl"), peers, copies=3
    )


def cases() -> Iterator[Case]:
    for n, k in SHAPES:
        for m in (64, 128, 1024, 4096):
            yield case("nvfp4", n, k, m)
    for kind in ("mxfp4", "fp8_e8m0", "bf16"):
        for m in (128, 1024):
            yield case(kind, 4096, 8192, m)
    yield case("fp8_e8m0", 8192, 4096, 1024, groups=8)
