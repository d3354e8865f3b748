"""mHC, the manifold-constrained hyper-connections between the four residual streams.

Source: the release, Block.hc_pre, hc_post and ParallelHead.hc_head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.registry import op


def _mixes(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """x [n, hc, d], fn [m, hc*d] float32 -> [n, m] float32; the norm scales after the product."""
    flat = acc(x.flatten(1))  # [n, hc*d], stream-major
    rho = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return (flat @ acc(fn).T) * rho


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[n, hc, hc] -> doubly stochastic, columns normalised last.

    Row softmax + eps, then columns, then iters - 1 rounds of rows and columns. Column sums (over
    the first index) are 1 to rounding; row sums only approximately.
    """
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def _pre_flops(a: dict) -> int:
    n, hc, d = a["x"].shape
    return 2 * n * hc * d * (a["fn"].shape[0] + 2)


@op("hc_pre", outputs=("u", "post", "comb"), flops=_pre_flops)
def hc_pre(
    x: Tensor,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into the sublayer's input, and compute how to expand its output.

    x [n, hc, d]; fn [(2+hc)*hc, hc*d], scale [3], base [(2+hc)*hc], all float32.
    Returns u [n, d] in x's dtype, post [n, hc] and comb [n, hc, hc] in float32, where
    pre = sigmoid + eps, post = 2 sigmoid (no eps), comb = sinkhorn; order pre, post, comb.
    """
    n, hc, _ = x.shape
    pre_m, post_m, comb_m = _mixes(x, fn, norm_eps).split([hc, hc, hc * hc], dim=-1)
    pre_b, post_b, comb_b = acc(base).split([hc, hc, hc * hc])
    s = acc(scale)
    pre = torch.sigmoid(pre_m * s[0] + pre_b) + eps  # [n, hc]
    post = 2 * torch.sigmoid(post_m * s[1] + post_b)  # [n, hc]
    comb = sinkhorn((comb_m * s[2] + comb_b).view(n, hc, hc), iters, eps)  # [n, hc, hc]
    u = (pre.unsqueeze(-1) * acc(x)).sum(1).to(x.dtype)  # [n, d]
    return u, post, comb


@op("hc_post", outputs=("x",), flops=lambda a: 2 * a["x"].numel() * (a["x"].shape[1] + 1))
def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """x'_k = post_k * y + sum_j comb[j, k] * x_j: the sum runs over comb's *first* index.

    y [n, d], x [n, hc, d], post [n, hc], comb [n, hc, hc] -> [n, hc, d]; float32 inside, one cast.
    """
    mixed = acc(comb).transpose(1, 2) @ acc(x)  # [n, hc, d]
    return (acc(post).unsqueeze(-1) * acc(y).unsqueeze(1) + mixed).to(x.dtype)


@op("hc_head", outputs=("h",), flops=_pre_flops)
def hc_head(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """Collapse the streams before the final norm: x [n, hc, d] -> h [n, d].

    fn [hc, hc*d], scale [1], base [hc]; weights sigmoid(mix * scale + base) + eps.
    """
    pre = torch.sigmoid(_mixes(x, fn, norm_eps) * acc(scale) + acc(base)) + eps
    return (pre.unsqueeze(-1) * acc(x)).sum(1).to(x.dtype)
