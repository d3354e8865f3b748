"""Cases for compute-sanitizer: routed and shared experts. See sanitize.py."""

from __future__ import annotations

from functools import partial

import torch
from sanitize_cuda import BF16, CUDA, FORMATS, randn, run, weight

from dsv4_bench.engine.ops.experts import Expert


def expert(kind: str, inner: int, d: int) -> Expert:
    return Expert(weight(kind, inner, d), weight(kind, d, inner), weight(kind, inner, d))


def chosen(m: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, routing weights and ids of two of three experts for m tokens."""
    ids = torch.randint(0, 3, (m, 2)).int().to(CUDA)
    return randn(m, d, dtype=BF16), torch.rand(m, 2).to(CUDA), ids


def experts(kind: str) -> None:
    """Sizes that tiles take; of whole stages, with one token, few pairs, many in tiles of 64 and of 128."""
    many = (40, 80) if kind in ("nvfp4", "mxfp4") else (40,)
    for inner, d in ((96, 160), (256, 512)):
        one = expert(kind, inner, d)
        bank = [expert(kind, inner, d), one, one]
        for m in (1, 5, *many) if d == 512 else (1, 5):
            x, routing, ids = chosen(m, d)
            run("experts", x, routing, ids, bank=bank, limit=2.0)
        for m in (1, 3, 40) if d == 512 else (1, 5):
            run("shared_expert", randn(m, d, dtype=BF16), expert=one, limit=2.0)


PARTS = {f"experts_{kind}": (partial(experts, kind), ("experts",)) for kind in FORMATS[:5]}
