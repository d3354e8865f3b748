"""Runs each kernel of linear, gate, experts and the row-wise ops once, for compute-sanitizer.

Small and ragged sizes; the sanitizer, not this file, says whether all went well.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.cuda.experts import moe
from dsv4_bench.engine.cuda.linears import linears
from dsv4_bench.engine.formats import (
    Weight,
    quantize_fp8_block,
    quantize_mxfp4,
    quantize_nvfp4,
)
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import IMPLEMENTATIONS

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def run(op: str, *args: object, **params: object) -> None:
    IMPLEMENTATIONS[op]["sm90"].function(*args, **params)
    torch.cuda.synchronize()


def weights(n: int, k: int) -> list[Weight]:
    w = torch.randn(n, k)
    codes, scale, g = quantize_nvfp4(w)
    fp8, exponents = quantize_fp8_block(w)
    found = [
        Weight("a", "nvfp4", codes, scale, float(g)),
        Weight("b", "mxfp4", *quantize_mxfp4(w)),
        Weight("c", "fp8_block", fp8, exponents),
        Weight("d", "fp8_block", fp8, exponents.float()),
        Weight("e", "dense", w.to(BF16)),
        Weight("f", "dense", w),
    ]
    return [weight.to(CUDA) for weight in found]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Converted on the CPU: initcheck does not see what torch's own kernels write."""
    return torch.randn(*shape).to(dtype).to(CUDA)


def expert_cases(inner: int, d: int) -> None:
    kinds = zip(weights(inner, d)[:5], weights(d, inner)[:5], strict=True)
    experts = [Expert(first, second, replace(first)) for first, second in kinds]
    nvfp4, mxfp4, fp8 = experts[:3]
    for m, routed in ((1, nvfp4), (5, mxfp4)):
        x, ids = randn(m, d, dtype=BF16), torch.randint(0, 3, (m, 2)).int().to(CUDA)
        params = {"bank": [routed] * 3, "shared": fp8, "limit": 2.0, "dtype": BF16}
        moe(x, torch.rand(m, 2).to(CUDA), ids, **params)
    for expert in experts:
        bank = [expert, expert, expert]
        for m in (1, 5, 40):
            x, ids = randn(m, d, dtype=BF16), torch.randint(0, 3, (m, 2)).int().to(CUDA)
            run("experts", x, torch.rand(m, 2).to(CUDA), ids, bank=bank, limit=2.0)
            run("shared_expert", x, expert=expert, limit=2.0)


def main() -> None:
    # Sizes that need float32 multiply-adds; tiles of weight rows; one ring a warp, split over warps and
    # over a cluster.
    for n, k in ((33, 160), (80, 1056), (40, 1152), (33, 4096)):
        for weight in weights(n, k):
            for m in (1, 3, 9, 65):
                for dtype in (torch.float32, BF16):
                    run("linear", randn(m, k, dtype=dtype), weight=weight, out_dtype=None)
    for weight in weights(64, 96):
        run("grouped_linear", randn(3, 192, dtype=BF16), weight=weight, groups=2)
    expert_cases(96, 160)  # always as for few pairs
    expert_cases(128, 256)  # 4 bits: the longest as for many
    router = Weight("gate", "dense", randn(33, 64))
    tokens = torch.tensor([3, 1, 0], device=CUDA)
    for bias, table in ((randn(33), None), (None, torch.randint(0, 33, (4, 6)).to(CUDA))):
        arguments = {"weight": router, "bias": bias, "tid2eid": table, "k": 6, "scale": 1.0}
        run("gate", randn(3, 64), tokens, **arguments)
        arguments["weight"] = Weight("gate", "dense", randn(33, 64, dtype=BF16))
        run("gate", randn(3, 64, dtype=BF16), tokens, **arguments)
    some = [w for w in weights(33, 1040) if w.name in "cde"]
    linears(randn(1, 1040, dtype=BF16), some, [None, torch.float32, BF16])
    for d in (33, 512):
        x, positions = randn(3, 5, d), torch.tensor([0, 5, 70000], device=CUDA)
        run("rms_norm", x, weight=randn(d), eps=1e-6)
        run("rope", x, positions, freqs=randn(16), inverse=False)
        run("embed", tokens, weight=Weight("e", "dense", randn(4, d)), hc=4, dtype=BF16)
        run("cache_write", randn(3, d), torch.tensor([2, -1, 0], device=CUDA), randn(4, d))
        run("gather_swa", randn(4, d), randn(3, d))
        run("moe_sum", randn(3, d), randn(3, d), dtype=BF16)


if __name__ == "__main__":
    main()
