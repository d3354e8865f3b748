"""RMS norm, weighted and unweighted."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.registry import op


@op("rms_norm", outputs=("y",), flops=lambda a: 4 * a["x"].numel())
def rms_norm(x: Tensor, *, weight: Tensor | None, eps: float) -> Tensor:
    """y = x * rsqrt(mean(x^2) + eps) * weight over the last axis; [..., d] -> [..., d].

    float32 inside, one cast to x's dtype at the end (the release, RMSNorm). `weight` None is the
    unweighted norm of each query head.
    """
    xf = acc(x)
    y = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * acc(weight)
    return y.to(x.dtype)
