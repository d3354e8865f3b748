"""Cases for bench_cuda.py: linear, gate and the row-wise ops at DeepSeek-V4 shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_cuda import Call, Case
from bench_peers import Arguments, peers_of

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.cuda.linears import linears
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import IMPLEMENTATIONS

EXPERTS, TOP, D = 256, 6, 4096
BF16, CUDA = torch.bfloat16, torch.device("cuda")


def run(op: str, *args: Any, **params: Any) -> Call:
    function = IMPLEMENTATIONS[op]["sm90"].function
    return lambda: function(*args, **params)


def weight(kind: str, n: int, k: int) -> Weight:
    """Random bits; scales around 1."""

    def codes(low: int, high: int, columns: int, rows: int = n) -> torch.Tensor:
        return torch.randint(low, high, (rows, columns), dtype=torch.uint8, device=CUDA)

    if kind == "nvfp4":
        scale = codes(0x20, 0x50, k // 16).view(torch.float8_e4m3fn)
        return Weight(kind, kind, codes(0, 256, k // 2), scale, 0.01)
    if kind == "mxfp4":
        return Weight(kind, kind, codes(0, 256, k // 2), codes(115, 123, k // 32))
    if kind == "fp8":
        data = torch.randn(n, k, device=CUDA, dtype=BF16).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-n // 128), -(-k // 128), device=CUDA)
        return Weight(kind, "fp8_block", data, scale)
    return Weight(kind, "dense", torch.randn(n, k, device=CUDA, dtype=BF16))


# ------------------------------------------------------------------------------ linear

BYTES = {"nvfp4": 9 / 16, "mxfp4": 17 / 32, "fp8": 1.0, "bf16": 2.0}
# Measured on an H200 with the same method: (format, n, k, rows) -> peer, microseconds.
PUBLISHED = {
    ("nvfp4", 4096, 8192, 1): {"Humming": 13.39, "Marlin": 14.51},
    ("nvfp4", 4096, 8192, 8): {"Humming": 14.6, "Marlin": 14.55},
    ("nvfp4", 4096, 8192, 64): {"Humming": 18.27, "Marlin": 37.7},
    ("nvfp4", 32768, 1024, 1): {"Humming": 11.32, "Marlin": 12.35},
    ("nvfp4", 32768, 1024, 8): {"Humming": 12.87, "Marlin": 12.36},
    ("nvfp4", 32768, 1024, 64): {"Humming": 14.98, "Marlin": 18.25},
    ("nvfp4", 8192, 8192, 1): {"Humming": 20.5, "Marlin": 19.51},
    ("nvfp4", 8192, 8192, 8): {"Humming": 22.7, "Marlin": 19.54},
    ("nvfp4", 8192, 8192, 64): {"Humming": 28.2, "Marlin": 39.8},
    ("nvfp4", 2048, 4096, 1): {"Humming": 7.6, "Marlin": 13.16},
    ("nvfp4", 4096, 2048, 1): {"Humming": 8.61, "Marlin": 8.98},
    ("nvfp4", 512, 4096, 1): {"Humming": 6.91, "Marlin": 4.44},
    ("bf16", 4096, 8192, 1): {"SGLang GEMV": 19.07},
    ("bf16", 2048, 4096, 1): {"SGLang GEMV": 8.65},
    ("bf16", 512, 4096, 1): {"SGLang GEMV": 5.17},
}
GOALS = {  # at least, aim
    ("nvfp4", 4096, 8192): (12, 7.5),
    ("nvfp4", 32768, 1024): (11, 7.5),
    ("nvfp4", 8192, 8192): (18, 12),
    ("fp8", 4096, 8192): (13, 10),
    ("fp8", 32768, 1024): (11, 10),
    ("fp8", 8192, 8192): (19, 17.5),
}
SHAPES = [(4096, 8192), (32768, 1024), (8192, 8192), (2048, 4096), (4096, 2048), (512, 4096)]


def linear_case(kind: str, n: int, k: int, m: int) -> Case:
    def make(_: int) -> Call:
        x = torch.randn(m, k, device=CUDA, dtype=BF16)
        return run("linear", x, weight=weight(kind, n, k), out_dtype=None)

    def cublas(_: int) -> Call:
        x, w = torch.randn(m, k, device=CUDA, dtype=BF16), weight("bf16", n, k).data
        return lambda: torch.mm(x, w.T)

    def cublas_fp8(_: int) -> Call:
        x = torch.randn(max(m, 16), k, device=CUDA, dtype=BF16).to(torch.float8_e4m3fn)
        w, one = weight("fp8", n, k).data, torch.ones((), device=CUDA)
        rows = x[:m]
        return lambda: torch._scaled_mm(rows, w.T, one, one, out_dtype=BF16, use_fast_accum=True)

    peers = {"cuBLAS bf16": cublas, "cuBLAS fp8": cublas_fp8}  # fp8: one scale a tensor
    least, aim = GOALS.get((kind, n, k), (None, None)) if m == 1 else (None, None)
    size = int(n * k * BYTES[kind]) + 2 * m * (n + k)
    published = PUBLISHED.get((kind, n, k, m), {})
    shape = f"{kind} {n}x{k} m{m}"
    return Case("linear", shape, size, 2 * m * n * k, make, peers, published, least, aim)


def grouped_case(m: int) -> Case:
    n, k, groups = 8192, 4096, 8

    def make(_: int) -> Call:
        o = torch.randn(m, groups * k, device=CUDA, dtype=BF16)
        return run("grouped_linear", o, weight=weight("fp8", n, k), groups=groups)

    def bmm(_: int) -> Call:
        o = torch.randn(groups, m, k, device=CUDA, dtype=BF16)
        w = torch.randn(groups, k, n // groups, device=CUDA, dtype=BF16)
        return lambda: torch.bmm(o, w)

    size = n * k + 2 * m * (n + groups * k)
    shape = f"fp8 {groups} groups {n}x{k} m{m}"
    return Case("grouped_linear", shape, size, 2 * m * n * k, make, {"torch.bmm bf16": bmm})


# Products of one input in V4-Flash's layers, and all of a CSA layer's normed stream, in one launch.
BF16_PAIR = [("bf16", 1024)] * 2
FIVE = [("fp8", 1024), ("fp8", 512), *[("bf16", 256)] * 2, ("bf16", 64)]
JOINT = {
    "wq_a, wkv, indexer": (4096, FIVE),
    "compressor": (4096, BF16_PAIR),
    "all seven": (4096, [*FIVE, *BF16_PAIR]),
    "wq_b, index/wq_b": (1024, [("fp8", 32768), ("fp8", 8192)]),
}


def joint_case(name: str, m: int = 1) -> Case:
    k, shapes = JOINT[name]

    def make(_: int) -> Call:
        x = torch.randn(m, k, device=CUDA, dtype=BF16)
        weights = [weight(kind, n, k) for kind, n in shapes]
        return lambda: linears(x, weights, [None] * len(weights))

    def separate(_: int) -> Call:
        x = torch.randn(m, k, device=CUDA, dtype=BF16)
        calls = [run("linear", x, weight=weight(kind, n, k), out_dtype=None) for kind, n in shapes]
        return lambda: [call() for call in calls]

    size = sum(int(n * k * BYTES[kind]) + 2 * m * n for kind, n in shapes) + 2 * m * k
    flops = sum(2 * m * n * k for _, n in shapes)
    shape = name if m == 1 else f"{name} m{m}"
    return Case("linears", shape, size, flops, make, {"one launch each": separate})


# ------------------------------------------------------------------------------ small ops


def small(
    op: str,
    shape: str,
    size: int,
    flops: int,
    arguments: Callable[[], Arguments],
    **published: float,
) -> Case:
    def make(_: int) -> Call:
        args, params = arguments()
        return run(op, *args, **params)

    return Case(op, shape, size, flops, make, peers_of(op, arguments), published)


def gate_case(n: int) -> Case:
    def arguments() -> Arguments:
        x = torch.randn(n, D, device=CUDA, dtype=BF16)
        tokens = torch.zeros(n, dtype=torch.int64, device=CUDA)
        bias = torch.randn(EXPERTS, device=CUDA)
        constants = {"weight": weight("bf16", EXPERTS, D), "k": TOP, "scale": 1.5}
        return (x, tokens), {**constants, "bias": bias, "tid2eid": None}

    flops = 2 * n * EXPERTS * D
    return small("gate", f"{n} tokens", 2 * EXPERTS * D + 2 * n * D, flops, arguments)


def norm_case(n: int) -> Case:
    gain = torch.randn(D, device=CUDA, dtype=BF16)

    def arguments() -> Arguments:
        return (torch.randn(n, D, device=CUDA, dtype=BF16),), {"weight": gain, "eps": 1e-6}

    return small("rms_norm", f"{n}x{D}", 4 * n * D, 4 * n * D, arguments)


def rope_case(n: int) -> Case:
    freqs = 1 / 10000 ** (torch.arange(32, device=CUDA) / 32)
    published = {1: 1.21, 8: 1.29, 64: 2.92, 1024: 34.1}[n]

    def arguments() -> Arguments:
        q = torch.randn(n, 64, 512, device=CUDA, dtype=BF16)
        positions = torch.randint(0, 100000, (n,), device=CUDA)
        return (q, positions), {"freqs": freqs, "inverse": False}

    peer = {"SGLang norm+rope": published}
    return small("rope", f"{n}x64x512", 4 * n * 64 * 512, 0, arguments, **peer)


def cases() -> Iterator[Case]:
    for kind in ("nvfp4", "fp8"):
        for n, k in SHAPES:
            for m in (1, 8, 64):
                yield linear_case(kind, n, k, m)
    yield linear_case("mxfp4", 4096, 8192, 1)
    yield linear_case("bf16", 4096, 8192, 1)
    for n in (256, 512, 1024, 2048, 129280):
        yield linear_case("bf16", n, 4096, 1)
    for n, k, m in ((1024, 4096, 1), (8192, 1024, 1), (4096, 8192, 2), (4096, 8192, 4)):
        yield linear_case("fp8", n, k, m)
    for kind, n, k in (("bf16", 256, 4096), ("fp8", 1024, 4096)):
        for m in (8, 64):
            yield linear_case(kind, n, k, m)
    for kind in ("nvfp4", "fp8"):
        yield linear_case(kind, 4096, 8192, 32)
    yield linear_case("bf16", 4096, 8192, 64)
    for name in JOINT:
        for m in (1, 8):
            yield joint_case(name, m)
    for m in (1, 8, 64):
        yield grouped_case(m)
    for m in (1024, 4096):
        yield linear_case("nvfp4", 4096, 8192, m)
        yield linear_case("fp8", 4096, 8192, m)
        yield linear_case("bf16", 4096, 8192, m)
    for n in (1, 8, 64):
        yield gate_case(n)
    for n in (1, 64, 1024, 8192):
        yield norm_case(n)
    for n in (1, 8, 64, 1024):
        yield rope_case(n)
