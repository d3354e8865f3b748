"""The `sm90` implementations of the hyper-connections: pre, post and head.

Contracts are those of the references in `ops`, with four streams. Nothing here synchronises with the
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    return _post_pre(_joined("hc_post_pre", y, x, post, comb, **pre))[:4]


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
        few = x.shape[0] <= _FEW_TOKENS
        op, norm = "hc_few" if few else "hc_post_pre", (weight, weight_eps)
        given = _joined(op, y, x, post, comb, norm, outs, **pre)
        return _few(given, parts, behind) if few else _post_pre(given)
    made = hc_post_pre(y, x, post, comb, **pre)
    results = outs or made
    for out, value in zip(results, made, strict=True):
        if out is not value:
            out.copy_(value)
    return *results, rms_norm(results[1], weight=weight, eps=weight_eps)


def _fuses(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[-1] == _FUSED_WIDTH


_NormedBy = tuple[int | None, int, float, int | None]
_WITHOUT_NORM: _NormedBy = (None, 0, 0.0, None)


class _Joined(NamedTuple):
    """What a launch of hc_post, hc_pre and perhaps a norm is given: dense tensors of shapes that fit.

    `normed_by`: the norm's weight, its dtype code, its eps and where its result goes; `keep` holds that weight.
    """

    x: Tensor
    y: Tensor
    gates: tuple[Tensor, Tensor]  # post, comb
    weights: tuple[Tensor, Tensor, Tensor]  # fn, scale, base
    iters: int
    eps: tuple[float, float]  # hc_pre's, and that of its norm
    outs: tuple[Tensor, Tensor, Tensor, Tensor]  # like x, y, post, comb
    normed: Tensor  # empty without the norm
    normed_by: _NormedBy
    keep: Tensor | None

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return *self.outs, self.normed


def _joined(
    op: str,
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
) -> _Joined:
    """DSV4Error in the name of `op` for what does not fit."""
    weights = _parameters(op, x, fn, scale, base, mixes=24, scales=3)
    (x, kind), (y, y_kind) = activation(op, x), activation(op, y)
    n, hc, d = x.shape
    if (y.shape, post.shape, comb.shape, kind) != ((n, d), (n, hc), (n, hc, hc), y_kind):
        wrong(op, f"y {list(y.shape)} {y.dtype}, post {list(post.shape)}, comb {list(comb.shape)}")
    gates = floats(op, post), floats(op, comb)
    if outs is None:
        new, u, new_post, new_comb = (torch.empty_like(t) for t in (x, y, *gates))
        outs = new, u, new_post, new_comb
    weight, normed, normed_by = None, y.new_empty(0), _WITHOUT_NORM
    if norm is not None:
        weight, weight_kind = activation(op, norm[0])
        if weight.shape != (d,):
            wrong(op, f"x {list(x.shape)}, the norm's weight {list(weight.shape)}")
        normed = torch.empty_like(y)
        normed_by = (weight.data_ptr(), weight_kind, norm[1], normed.data_ptr())
    return _Joined(x, y, gates, weights, iters, (eps, norm_eps), outs, normed, normed_by, weight)


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _few(
    given: _Joined, parts: tuple[Tensor, Tensor] | None, behind: list[Behind] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernels for few tokens, of width 4096."""
    x, n, (new, u, new_post, new_comb) = given.x, len(given.x), given.outs
    (fn, scale, base), iters, eps = given.weights, given.iters, given.eps
    sums = x.new_empty(n, *_SUMS, dtype=torch.float32)
    summed = (None, None) if parts is None else _addresses(parts)
    inputs = (given.y.data_ptr(), *summed, *_addresses((x, *given.gates)), n)
    weights = (*_addresses((fn, scale, base)), *eps)
    outputs = (*_addresses((new, u)), *given.normed_by, sums.data_ptr())
    HYPER.call("hc_few", x, *inputs, *weights, *outputs)

    def gates() -> None:
        constants = (*_addresses((scale, base)), iters, *eps)
        outputs = _addresses((new_post, new_comb))
        HYPER.call("hc_gates", sums, sums.data_ptr(), n, *constants, *outputs)

    if behind is None:
        gates()
    else:
        behind.append(Behind(gates, (sums,), (new_post, new_comb)))
    return given.results


def _post_pre(given: _Joined) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused kernel."""
    n, _, d = given.x.shape
    inputs = _addresses((given.y, given.x, *given.gates))
    weights = (*_addresses(given.weights), given.iters, *given.eps)
    outputs = (*_addresses(given.outs), *given.normed_by)
    HYPER.call("hc_post_pre", given.x, *inputs, n, d, *weights, *outputs)
    return given.results
