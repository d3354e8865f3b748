"""Cases for compute-sanitizer: routed and shared experts, alone and together. See sanitize.py."""

from __future__ import annotations

from functools import partial

import torch
from sanitize_cuda import BF16, CUDA, F32, FORMATS, randn, run, weight

from dsv4_bench.engine.cuda.experts import moe
from dsv4_bench.engine.ops.experts import Expert


def expert(kind: str, inner: int, d: int) -> Expert:
    return Expert(weight(kind, inner, d), weight(kind, d, inner), weight(kind, inner, d))


def chosen(m: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, routing weights and ids of two of three experts for m tokens."""
    ids = torch.randint(0, 3, (m, 2)).int().to(CUDA)
    return randn(m, d, dtype=BF16), torch.rand(m, 2).to(CUDA), ids


def experts(kind: str) -> None:
    """One token, few pairs, many in tiles of 64 and of 128; 96 x 160 stays with the kernels of few."""
    for inner, d in ((96, 160), (128, 256)):
        one = expert(kind, inner, d)
        bank = [expert(kind, inner, d), one, one]
        for m in (1, 5, 40, 80) if d == 256 else (1, 5):
            x, routing, ids = chosen(m, d)
            run("experts", x, routing, ids, bank=bank, limit=2.0)
            run("shared_expert", x, expert=one, limit=2.0)


def together() -> None:
    """The shared expert beside the routed ones: four pairs of formats, one token and five."""
    for routed in ("nvfp4", "mxfp4"):
        for beside in ("fp8_e8m0", "fp8_f32"):
            bank, shared = [expert(routed, 96, 160) for _ in range(3)], expert(beside, 96, 160)
            for m, dtype in ((1, BF16), (5, F32)):
                given = {"bank": bank, "shared": shared, "limit": 2.0, "dtype": dtype}
                moe(*chosen(m, 160), **given)
                moe(*chosen(m, 160), **given, outs=(randn(m, 160), randn(m, 160)))


PARTS = {
    **{f"experts_{kind}": (partial(experts, kind), ("experts",)) for kind in FORMATS[:5]},
    "moe": (together, ("moe",)),
}
