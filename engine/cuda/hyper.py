"""The `sm90` implementations of the hyper-connections: pre, post and head.

Contracts are those of the references in `ops`, with four streams. Nothing here synchronises with the
GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import (
    F,
    I,
    Library,
    N,
    P,
    activation,
    floats,
    sm90,
    wrong,
)
from dsv4_bench.engine.cuda.rows import rms_norm

_STREAMS = 4
_FUSED_WIDTH, _NORMED_TOKENS = 4096, 64  # of the kernel that fuses ops
_FEW_TOKENS, _SUMS = 8, (64, 32)  # of the kernels for few tokens; sums that they leave of a token
HYPER = Library(
    "hyper",
    {
        "hc_pre": (P, I, N, N, P, P, P, N, F, F, P, P, P),
        "hc_head": (P, I, N, N, P, P, P, F, F, P),
        "hc_post_pre": (P, P, P, P, N, N, P, P, P, N, F, F, P, P, P, P, P, I, F, P),
        "hc_few": (P, P, P, P, P, P, N, P, P, P, F, F, P, P, P, I, F, P, P),
        "hc_gates": (P, N, P, P, N, F, F, P, P),
    },
)
HYPER_POST = Library("hyper_post", {"hc_post": (P, P, P, P, I, N, N, P)})


@sm90("hc_pre", HYPER)
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
    op = "hc_pre"
    x, kind = activation(op, x)
    fn, scale, base = _parameters(op, x, fn, scale, base, mixes=24, scales=3)
    n, hc, d = x.shape
    u = x.new_empty(n, d)
    post = x.new_empty(n, hc, dtype=torch.float32)
    comb = x.new_empty(n, hc, hc, dtype=torch.float32)
    HYPER.call(
        op,
        x,
        x.data_ptr(),
        kind,
        n,
        d,
        fn.data_ptr(),
        scale.data_ptr(),
        base.data_ptr(),
        iters,
        eps,
        norm_eps,
        u.data_ptr(),
        post.data_ptr(),
        comb.data_ptr(),
    )
    return u, post, comb


@sm90("hc_head", HYPER)
def hc_head(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float
) -> Tensor:
    op = "hc_head"
    x, kind = activation(op, x)
    fn, scale, base = _parameters(op, x, fn, scale, base, mixes=4, scales=1)
    n, _, d = x.shape
    h = x.new_empty(n, d)
    weights = (fn.data_ptr(), scale.data_ptr(), base.data_ptr())
    HYPER.call(op, x, x.data_ptr(), kind, n, d, *weights, eps, norm_eps, h.data_ptr())
    return h


def _parameters(
    op: str, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, mixes: int, scales: int
) -> tuple[Tensor, Tensor, Tensor]:
    """fn, scale and base as dense float32, once their shapes fit x [n, 4, d]."""
    if x.dim() != 3 or x.shape[1] != _STREAMS:
        wrong(op, f"x is {list(x.shape)}, the kernel takes [n, {_STREAMS}, d]")
    shapes = (mixes, _STREAMS * x.shape[2]), (scales,), (mixes,)
    if (fn.shape, scale.shape, base.shape) != shapes:
        given = ", ".join(str(list(tensor.shape)) for tensor in (fn, scale, base))
        wrong(op, f"fn, scale and base are {given} for x {list(x.shape)}")
    return floats(op, fn), floats(op, scale), floats(op, base)


@sm90("hc_post", HYPER_POST)
def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    op = "hc_post"
    (x, kind), (y, y_kind) = activation(op, x), activation(op, y)
    if x.dim() != 3 or x.shape[1] != _STREAMS or y.shape != (x.shape[0], x.shape[2]):
        wrong(op, f"y {list(y.shape)}, x {list(x.shape)}, the kernel takes x [n, {_STREAMS}, d]")
    n, hc, d = x.shape
    if post.shape != (n, hc) or comb.shape != (n, hc, hc) or kind != y_kind:
        wrong(op, f"post {list(post.shape)}, comb {list(comb.shape)}, y {y.dtype}, x {x.dtype}")
    post, comb = floats(op, post), floats(op, comb)
    out = torch.empty_like(x)
    gates = (post.data_ptr(), comb.data_ptr())
    HYPER_POST.call(op, x, y.data_ptr(), x.data_ptr(), *gates, kind, n, d, out.data_ptr())
    return out


def hc_post_pre(
    y: Tensor, x: Tensor, post: Tensor, comb: Tensor, **pre: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hc_post(y, x, post, comb)`, then `hc_pre(..., **pre)` of the result, which is returned first.

    One kernel that reads the streams once, for bfloat16 of width 4096; two elsewhere. The same bits.
    """
    if not _fuses(x):
        new = hc_post(y, x, post, comb)
        return new, *hc_pre(new, **pre)
    return _post_pre(y, x, post, comb, **pre)[:4]


def joins_norm(x: Tensor) -> bool:
    """Whether `hc_post_pre_norm` takes streams like x [n, 4, d] in one kernel: bfloat16, n to 64, d 4096."""
    return _fuses(x) and x.shape[0] <= _NORMED_TOKENS


def joins_sum(routed: Tensor, shared: Tensor, dtype: torch.dtype) -> bool:
    """Whether `hc_post_pre_norm` takes these as `parts`, to be added up in `dtype`: 8 tokens, d 4096."""
    return (
        dtype == torch.bfloat16
        and routed.shape == shared.shape
        and 0 < len(routed) <= _FEW_TOKENS
        and routed.shape[1:] == (_FUSED_WIDTH,)
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in (routed, shared))
        and all(t.data_ptr() % 8 == 0 for t in (routed, shared))
    )


class Behind(NamedTuple):
    """A launch that only those have to wait for who read what it writes."""

    run: Callable[[], None]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]


def hc_post_pre_norm(
    y: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    *,
    weight: Tensor,
    weight_eps: float,
    outs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    parts: tuple[Tensor, Tensor] | None = None,
    behind: list[Behind] | None = None,
    **pre: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`hc_post_pre` and, last, `rms_norm` of its u with `weight` [d]; see `joins_norm`.

    The new streams, u, post and comb go to `outs`, dense and like x, y, post and comb, if given.
    With `parts`, which `joins_sum` takes, their `moe_sum` goes to y first. Up to 8 tokens are collapsed by
    kernels of their own, within rounding of `hc_pre`; the launch that makes post and comb is left to who gives
    the list `behind`.
    """
    if joins_norm(x):
        fused = _few if x.shape[0] <= _FEW_TOKENS else _post_pre
        by: dict[str, Any] = {"parts": parts, "behind": behind} if fused is _few else {}
        return fused(y, x, post, comb, (weight, weight_eps), outs, **by, **pre)
    made = hc_post_pre(y, x, post, comb, **pre)
    given = outs or made
    for out, value in zip(given, made, strict=True):
        if out is not value:
            out.copy_(value)
    return *given, rms_norm(given[1], weight=weight, eps=weight_eps)


def _few(
    y: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    norm: tuple[Tensor, float],
    outs: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    parts: tuple[Tensor, Tensor] | None,
    behind: list[Behind] | None,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernels for few tokens, of width 4096."""
    op = "hc_few"
    fn, scale, base = _parameters(op, x, fn, scale, base, mixes=24, scales=3)
    x, y, post, comb = _sublayer(op, x, y, post, comb)
    (weight, eps_of_weight), n = norm, len(x)
    weight, kind = activation(op, weight)
    if weight.shape != y.shape[1:]:
        wrong(op, f"x {list(x.shape)}, the norm's weight {list(weight.shape)}")
    new, u, new_post, new_comb = outs or tuple(torch.empty_like(t) for t in (x, y, post, comb))
    normed, sums = torch.empty_like(y), x.new_empty(n, *_SUMS, dtype=torch.float32)
    summed = (None, None) if parts is None else tuple(part.data_ptr() for part in parts)
    given = (y.data_ptr(), *summed, x.data_ptr(), post.data_ptr(), comb.data_ptr(), n)
    weights = (fn.data_ptr(), scale.data_ptr(), base.data_ptr(), eps, norm_eps)
    normed_by = (weight.data_ptr(), kind, eps_of_weight, normed.data_ptr())
    HYPER.call(op, x, *given, *weights, new.data_ptr(), u.data_ptr(), *normed_by, sums.data_ptr())

    def gates() -> None:
        constants = (scale.data_ptr(), base.data_ptr(), iters, eps, norm_eps)
        HYPER.call(
            "hc_gates",
            sums,
            sums.data_ptr(),
            n,
            *constants,
            new_post.data_ptr(),
            new_comb.data_ptr(),
        )

    if behind is None:
        gates()
    else:
        behind.append(Behind(gates, (sums,), (new_post, new_comb)))
    return new, u, new_post, new_comb, normed


def _fuses(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[-1] == _FUSED_WIDTH


def _sublayer(
    op: str, x: Tensor, y: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What hc_post reads, dense, once their shapes fit x [n, 4, d]."""
    (x, kind), (y, y_kind) = activation(op, x), activation(op, y)
    n, hc, d = x.shape
    if (y.shape, post.shape, comb.shape, kind) != ((n, d), (n, hc), (n, hc, hc), y_kind):
        wrong(op, f"y {list(y.shape)} {y.dtype}, post {list(post.shape)}, comb {list(comb.shape)}")
    return x, y, floats(op, post), floats(op, comb)


def _post_pre(
    y: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    norm: tuple[Tensor, float] | None = None,
    outs: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused kernel; the last output is empty without `norm`."""
    op = "hc_post_pre"
    fn, scale, base = _parameters(op, x, fn, scale, base, mixes=24, scales=3)
    x, y, post, comb = _sublayer(op, x, y, post, comb)
    n, _, d = x.shape
    new, u, new_post, new_comb = outs or tuple(torch.empty_like(t) for t in (x, y, post, comb))
    normed = y.new_empty(0)
    inputs = (y.data_ptr(), x.data_ptr(), post.data_ptr(), comb.data_ptr(), n, d)
    weights = (fn.data_ptr(), scale.data_ptr(), base.data_ptr())
    outputs = (new.data_ptr(), u.data_ptr(), new_post.data_ptr(), new_comb.data_ptr())
    normed_by: tuple[Any, ...] = (None, 0, 0.0, None)
    if norm is not None:
        weight, weight_kind = activation(op, norm[0])
        if weight.shape != (d,):
            wrong(op, f"x {list(x.shape)}, the norm's weight {list(weight.shape)}")
        normed = torch.empty_like(y)
        normed_by = (weight.data_ptr(), weight_kind, norm[1], normed.data_ptr())
    HYPER.call(op, x, *inputs, *weights, iters, eps, norm_eps, *outputs, *normed_by)
    return new, u, new_post, new_comb, normed
