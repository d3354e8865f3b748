"""Cases for compute-sanitizer: linears of every format, the gate, and the row-wise ops. See sanitize.py.

Small and ragged sizes. Everything is made on the CPU and copied: initcheck does not see what torch's own
kernels write.
"""

from __future__ import annotations

from functools import partial

import torch

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda
from dsv4_bench.engine.cuda.fused import KINDS, Chain, norm_rope
from dsv4_bench.engine.cuda.library import DTYPES
from dsv4_bench.engine.cuda.linear import LINEAR, matmul
from dsv4_bench.engine.cuda.linears import linears
from dsv4_bench.engine.cuda.skinny import STAGES, plan_of, skinny
from dsv4_bench.engine.cuda.step import CudaStep
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.formats import (
    Weight,
    quantize_fp8_block,
    quantize_mxfp4,
    quantize_nvfp4,
)
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS, Site

CUDA, BF16, F32 = torch.device("cuda"), torch.bfloat16, torch.float32
FORMATS = ("nvfp4", "mxfp4", "fp8_e8m0", "fp8_f32", "bf16", "f32", "f16")


def run(op: str, *args: object, **params: object) -> None:
    IMPLEMENTATIONS[op]["sm90"].function(*args, **params)


def weight(kind: str, n: int, k: int) -> Weight:
    """Random [n, k] of one of FORMATS."""
    w = torch.randn(n, k)
    if kind == "nvfp4":
        codes, scale, g = quantize_nvfp4(w)
        made = Weight(kind, "nvfp4", codes, scale, float(g))
    elif kind == "mxfp4":
        made = Weight(kind, "mxfp4", *quantize_mxfp4(w))
    elif kind.startswith("fp8"):
        codes, scale = quantize_fp8_block(w)
        made = Weight(kind, "fp8_block", codes, scale.float() if kind == "fp8_f32" else scale)
    else:
        made = Weight(kind, "dense", w.to({"bf16": BF16, "f32": F32, "f16": torch.float16}[kind]))
    return made.to(CUDA)


def randn(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(CUDA)


# ------------------------------------------------------------------------------ linears


def multiplied(w: Weight, m: int, groups: int = 1, dtype: torch.dtype = BF16) -> None:
    """m rows by linear_sm90.cu, whatever else would be chosen for them."""
    n, k = w.shape
    x, y = randn(m, groups * k, dtype=BF16), torch.zeros(m, n, dtype=dtype).to(CUDA)
    given = (x.data_ptr(), DTYPES[BF16], m, pack(w).address, groups, y.data_ptr(), DTYPES[dtype])
    LINEAR.call("linear", x, *given)


def matrix_unit(kind: str) -> None:
    """1 to 8, 16 and more rows; one ring a warp, split over warps, over a cluster, ragged ends."""
    for n, k in ((33, 160), (80, 1056), (40, 1152), (33, 4096)):
        w = weight(kind, n, k)
        for m in (1, 3, 6, 9, 65) if n == 80 else (1, 2, 9):
            multiplied(w, m)
            if n in (40, 80):
                multiplied(w, m, dtype=F32)
    for m in (1, 20):
        multiplied(weight(kind, 64, 96), m, groups=2)
    if kind in ("fp8_e8m0", "fp8_f32", "bf16"):  # no room for rings of eight stages
        for dtype in (BF16, F32):
            multiplied(weight(kind, 16, 65536), 1, dtype=dtype)


def some_rows(kind: str) -> None:
    """5 to 64 rows: in one part and in two; more than one tile; more stages than slots."""
    for n, k in ((300, 1152), (65, 9216)):
        packed = pack(weight(kind, n, k))
        for m in (5, 20, 40) if n == 300 else (5,):
            x = randn(m, k, dtype=BF16)
            for dtype, parts in ((BF16, 1), (BF16, 2), (F32, 2)):
                plan = plan_of(n, m, k, STAGES[packed.format].columns, 1, parts)
                skinny(x, packed, 1, torch.zeros(m, n, dtype=dtype).to(CUDA), plan)


def multiply_adds() -> None:
    """What the matrix unit does not take: float32 on either side, groups of 8 rows, odd widths."""
    for kind in FORMATS:
        for k in (96, 33)[: 2 if kind in ("bf16", "f32", "f16") else 1]:
            w = weight(kind, 16, k)
            for x in (randn(9, 2 * k), randn(9, 2 * k, dtype=BF16)):
                for dtype in (F32, BF16):
                    matmul("grouped_linear", x, w, 2, dtype)


def joint() -> None:
    """Several matrices in one launch: bfloat16, FP8 with either kind of scales; several tiles a place."""
    some = [weight(kind, n, 1040) for kind, n in (("fp8_e8m0", 33), ("fp8_f32", 16), ("bf16", 40))]
    wide = [weight("fp8_f32", 150, 384), weight("bf16", 30, 384)]
    for m in (1, 5):
        linears(randn(m, 1040, dtype=BF16), some, [None, F32, BF16])
        linears(randn(m, 384, dtype=BF16), wide, [None, F32])


def any_rows(kind: str) -> None:
    matrix_unit(kind)
    some_rows(kind)


# ------------------------------------------------------------------------------ rows


def gate() -> None:
    for count, n in ((33, 3), (300, 12), (600, 20), (33, 40)):
        tokens, table = torch.randint(0, 4, (n,)).to(CUDA), torch.randint(0, count, (4, 6))
        router, x = weight("bf16", count, 264), randn(n, 264, dtype=BF16)
        for bias, tid2eid in ((randn(count), None), (None, table), (None, table.int())):
            given = None if tid2eid is None else tid2eid.to(CUDA)
            run("gate", x, tokens, weight=router, bias=bias, tid2eid=given, k=6, scale=1.0)


def rows() -> None:
    tokens, slots = torch.tensor([3, 1, 0]).to(CUDA), torch.tensor([2, -1, 0]).to(CUDA)
    dtypes = (F32, BF16)
    for d in (33, 512):
        for one in dtypes:
            for other in dtypes:
                run("cache_write", randn(3, d, dtype=one), slots, randn(4, d, dtype=other))
                run("gather_swa", randn(4, d, dtype=one), randn(3, d, dtype=other))
            run("moe_sum", randn(3, d), randn(3, d), dtype=one)
            for kind in ("f32", "bf16", "f16"):
                run("embed", tokens, weight=weight(kind, 4, d), hc=4, dtype=one)


def norms() -> None:
    positions = torch.tensor([0, 5, 70000]).to(CUDA)
    for d in (33, 512, 1001, 1024):
        for one in (F32, BF16):
            x = randn(3, 5, d, dtype=one)
            run("rms_norm", x, weight=None, eps=1e-6)
            for other in (F32, BF16):
                run("rms_norm", x, weight=randn(d, dtype=other), eps=1e-6)
            run("rope", x, positions, freqs=randn(16), inverse=d > 512)


def normed_and_turned() -> None:
    """norm_rope: into a result, into a cache, and with what lies between kept."""
    positions, slots = torch.tensor([0, 5, 70000]).to(CUDA), torch.tensor([2, -1, 0]).to(CUDA)
    for dtype in (F32, BF16):
        norm = Site("norm", OPS["rms_norm"], {"weight": randn(512, dtype=dtype), "eps": 1e-6}, 0)
        rope = Site("rope", OPS["rope"], {"freqs": randn(32), "inverse": False}, 0)
        write = Site("write", OPS["cache_write"], {}, 0)
        x, inner = randn(3, 512, dtype=BF16), [randn(3, 512, dtype=BF16) for _ in range(2)]
        args = [(x,), (x, positions), (x, slots, randn(4, 512, dtype=BF16))]
        norm_rope(Chain(KINDS[0], [], [norm, rope], args[:2], inner[:1], True))
        norm_rope(Chain(KINDS[1], [], [norm, rope, write], args, inner, False))


def steps() -> None:
    """A step's index tensors, of one sequence and of three, with none, one and two compressions."""
    for batch in (1, 3):
        for ratios in ((), (4,), (4, 128)):
            positions = (torch.arange(batch) * 37 + 126).to(CUDA)
            step = CudaStep(positions.clone(), positions, 128, 600, dict.fromkeys(ratios, 160))
            step.advance()
        step.pool_rows(torch.randint(-1, 150, (batch, 77), dtype=torch.int32).to(CUDA), 160)


def measuring() -> None:
    data = torch.randint(0, 9, (100_004,), dtype=torch.int32).to(CUDA)
    cuda.timing.read_pass(data, torch.zeros(1, dtype=torch.int32).to(CUDA))
    cuda.timing.leader(data)


def all_rows() -> None:
    joint()
    gate()
    rows()
    norms()
    normed_and_turned()
    steps()
    measuring()


PARTS = {
    **{f"linear_{kind}": (partial(any_rows, kind), ("linear", "skinny")) for kind in FORMATS[:5]},
    "linear_plain": (multiply_adds, ("linear",)),
    "rows": (all_rows, ("linears", "gate", "rows", "norm", "norm_rope", "step", "timing")),
}
