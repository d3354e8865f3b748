"""Faults of mHC: the order of the mixes, Sinkhorn, eps, the direction of comb"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.numerics import acc
from dsv4_bench.probes.faults.base import fault, right, rounded

hc_pre = right("hc_pre")
hc_post = right("hc_post")
hc_head = right("hc_head")
Result = tuple[Tensor, Tensor, Tensor]


def mixes(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """What the sigmoids and Sinkhorn start from, before scale and base: [n, m] float32."""
    flat = acc(x.flatten(1))
    return (flat @ acc(fn).T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)


def logits_of_comb(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float) -> Tensor:
    """What the reference hands to Sinkhorn: [n, hc, hc] float32."""
    n, hc, _ = x.shape
    mix = mixes(x, fn, norm_eps)[:, 2 * hc :] * acc(scale)[2] + acc(base)[2 * hc :]
    return mix.view(n, hc, hc)


@fault(
    op="hc_post",
    sites="L2/attn/hc_post",
    kinds="transposed",
    source="NVIDIA-NeMo/Automodel issue 2154, NVIDIA/Megatron-LM issue 4957",
)
def comb_transposed(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The mixing sum runs over comb's second index."""
    return hc_post(y, x, post, comb.transpose(1, 2))


@fault(
    op="hc_pre",
    sites="L2/attn/hc_pre",
    kinds="permuted",
    source="mHC pre, post, comb in that order",
)
def mixes_read_as_pre_comb_post(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, **more: Any
) -> Result:
    """The rows of fn and base are read in the order pre, comb, post."""
    hc = x.shape[1]
    order = torch.tensor([*range(hc), *range(2 * hc + hc * hc - hc, 2 * hc + hc * hc)])
    order = torch.cat((order, torch.arange(hc, hc + hc * hc)))
    return hc_pre(x, fn=fn[order], scale=scale, base=base[order], **more)


@fault(
    op="hc_pre",
    sites="L3/attn/hc_pre",
    kinds="unexplained",
    source="Sinkhorn starts from softmax + eps",
)
def sinkhorn_from_exp(
    x: Tensor,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
) -> Result:
    """Sinkhorn starts from exp of the logits instead of their row softmax plus eps."""
    u, post, _ = hc_pre(x, fn=fn, scale=scale, base=base, iters=iters, eps=eps, norm_eps=norm_eps)
    comb = torch.exp(logits_of_comb(x, fn, scale, base, norm_eps))
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return u, post, comb


def _far_from_doubly_stochastic(model: Any) -> None:
    """Logits of comb so large that 20 rounds of Sinkhorn leave rows off, as in real layers."""
    site = model.sites["L4/attn/hc_pre"]
    site.params["scale"] = site.params["scale"] * torch.tensor([1.0, 1.0, 12.0])
    site.use(site.impl)


@fault(
    op="hc_pre",
    sites="L4/attn/hc_pre",
    kinds="unexplained constant_factor",
    why="each row is divided by its sum once more: a factor a row",
    source="NVIDIA-NeMo/Automodel issue 2039: order of the Sinkhorn passes",
    data="row sums of comb that are not 1 after 20 rounds",
    prepare=_far_from_doubly_stochastic,
)
def sinkhorn_rows_last(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, **more: Any
) -> Result:
    """The last Sinkhorn pass is over rows, so columns do not sum to 1."""
    u, post, comb = hc_pre(x, fn=fn, scale=scale, base=base, norm_eps=norm_eps, **more)
    return u, post, comb / (comb.sum(-1, keepdim=True) + more["eps"])


@fault(
    op="hc_pre",
    sites="L1/ffn/hc_pre",
    kinds="unexplained",
    source="a loop bound for faster kernels",
)
def sinkhorn_4_rounds(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, iters: int, **more: Any
) -> Result:
    """Sinkhorn stops after 4 of 20 rounds."""
    return hc_pre(x, fn=fn, scale=scale, base=base, iters=4, **more)


@fault(
    op="hc_pre",
    sites="L2/ffn/hc_pre",
    kinds="constant_factor",
    source="hc_eps on pre missing",
)
def pre_without_eps(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float, **more: Any
) -> Result:
    """pre is the bare sigmoid, without hc_eps."""
    u, post, comb = hc_pre(x, fn=fn, scale=scale, base=base, eps=eps, norm_eps=norm_eps, **more)
    hc = x.shape[1]
    pre = torch.sigmoid(mixes(x, fn, norm_eps)[:, :hc] * acc(scale)[0] + acc(base)[:hc])
    return (pre.unsqueeze(-1) * acc(x)).sum(1).to(x.dtype), post, comb


@fault(
    op="hc_pre",
    sites="L3/ffn/hc_pre",
    kinds="constant_factor unexplained",
    why="an offset of 1e-6 that post must not have: an eps too many",
    source="NVIDIA-NeMo/Automodel issue 2039: post has no eps",
)
def post_with_eps(x: Tensor, **params: Any) -> Result:
    """post gets hc_eps as well."""
    u, post, comb = hc_pre(x, **params)
    return u, post + params["eps"], comb


@fault(
    op="hc_pre",
    sites="L1/attn/hc_pre",
    kinds="constant_factor",
    source="NVIDIA-NeMo/Automodel issue 2039: post = 2 sigmoid",
)
def post_without_2(x: Tensor, **params: Any) -> Result:
    """post is sigmoid instead of 2 sigmoid."""
    u, post, comb = hc_pre(x, **params)
    return u, post / 2, comb


@fault(
    op="hc_pre",
    sites="L4/ffn/hc_pre",
    kinds="permuted transposed",
    why="the flattened streams are in another order: [d, hc] instead of [hc, d]",
    source="the release: flattened stream by stream",
)
def streams_flattened_d_major(x: Tensor, *, fn: Tensor, **params: Any) -> Result:
    """fn meets the streams interleaved, index d * hc + h."""
    n, hc, d = x.shape
    moved = fn.view(-1, d, hc).transpose(1, 2).reshape(fn.shape)
    return hc_pre(x, fn=moved, **params)


@fault(
    op="hc_pre",
    sites="L4/attn/hc_pre",
    kinds="unexplained constant_factor",
    why="rho is another number in each row, by a factor inside the sigmoids",
    source="the norm taken over one stream",
)
def rho_of_first_stream(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, **more: Any
) -> Result:
    """The inverse RMS comes from stream 0 alone."""
    flat = acc(x)
    ratio = torch.rsqrt(flat[:, 0].square().mean(-1, keepdim=True) + norm_eps) / torch.rsqrt(
        flat.flatten(1).square().mean(-1, keepdim=True) + norm_eps
    )
    rows = [
        hc_pre(x[i : i + 1], fn=fn, scale=scale * ratio[i], base=base, norm_eps=norm_eps, **more)
        for i in range(len(x))
    ]
    u, post, comb = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return u, post, comb


@fault(
    op="hc_post",
    sites="L3/ffn/hc_post",
    kinds="unexplained",
    source="the release: transformers casts post and comb to bfloat16",
)
def mixing_weights_in_bfloat16(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """post and comb are rounded to bfloat16 first."""
    return hc_post(y, x, rounded(post), rounded(comb))


@fault(
    op="hc_post",
    sites="L4/ffn/hc_post",
    kinds="stale columns constant_factor",
    why="one stream keeps its old value",
    source="in-place update, one stream missed",
)
def stream_3_kept(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Stream 3 is passed on unchanged."""
    mixed = hc_post(y, x, post, comb).clone()
    mixed[:, 3] = x[:, 3]
    return mixed


@fault(
    op="hc_post",
    sites="L1/attn/hc_post",
    kinds="permuted shifted",
    why="streams in another order, one further",
    source="post indexed by the wrong stream",
)
def post_of_next_stream(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Stream k gets the sublayer's output with the weight of stream k + 1."""
    return hc_post(y, x, post.roll(-1, 1), comb)


@fault(
    op="hc_head",
    sites="head/hc_head",
    kinds="unexplained",
    source="another model's collapse",
)
def head_collapsed_by_softmax(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """The final collapse weighs the streams by softmax instead of sigmoid."""
    pre = torch.softmax(mixes(x, fn, norm_eps) * acc(scale) + acc(base), -1) + eps
    return (pre.unsqueeze(-1) * acc(x)).sum(1).to(x.dtype)
