"""mHC: order of pre, post and comb, eps, Sinkhorn's start, rounds and axis, the norm of the mixes"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses.base import Hypothesis, Values, candidates

Sinkhorn = Callable[[Tensor, int, float], Tensor]
_PARTS = ("pre", "post", "comb")


@candidates("hc_pre")
def pre_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    yield from _orders(call)
    yield from _sinkhorns(call)
    yield from _coefficients(call)


def _orders(call: Captured) -> Iterator[Hypothesis]:
    """The rows of fn, base and scale taken for other parts than they are."""
    a = call.inputs
    hc = a["x"].shape[1]
    sizes = (hc, hc, hc * hc)
    for order in permutations(range(3)):
        if order == (0, 1, 2):
            continue
        first, begins = 0, [0, 0, 0]
        for part in order:  # where each part is read from
            begins[part], first = first, first + sizes[part]
        rows = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, sizes, strict=True)])
        rows = rows.to(a["fn"].device)
        places = torch.tensor([order.index(part) for part in range(3)], device=rows.device)
        words = "the mixes are read in the order " + ", ".join(_PARTS[p] for p in order)
        moved = {"fn": a["fn"][rows], "base": a["base"][rows]}
        yield Hypothesis("permuted", words, {**moved, "scale": a["scale"][places]})
        yield Hypothesis("permuted", f"{words} (not their scales)", moved)
    block = torch.arange(hc * hc).view(hc, hc).T.flatten()
    rows = torch.cat((torch.arange(2 * hc), 2 * hc + block)).to(a["fn"].device)
    words = "comb's logits are filled column by column"
    yield Hypothesis("transposed", words, {"fn": a["fn"][rows], "base": a["base"][rows]})
    words = "comb's base is added transposed"
    yield Hypothesis("transposed", words, {"base": a["base"][rows]})
    places = torch.tensor([1, 0, 2], device=rows.device)
    yield Hypothesis(
        "permuted", "the scales of pre and post are exchanged", {"scale": a["scale"][places]}
    )
    first_scale = a["scale"][:1].expand_as(a["scale"])
    yield Hypothesis("constant_factor", "one scale is used for all mixes", {"scale": first_scale})
    yield Hypothesis("permuted", "x is read with its streams in reverse", {"x": a["x"].flip(1)})
    yield _flattened(call)


def _flattened(call: Captured) -> Hypothesis:
    """fn's columns are stream-major; taken channel-major they meet other channels."""
    a = call.inputs
    hc, d = a["x"].shape[1:]
    columns = a["fn"].unflatten(1, (d, hc)).transpose(1, 2).flatten(1)
    return Hypothesis("transposed", "the streams are flattened channel by channel", {"fn": columns})


def _normalise(comb: Tensor, axis: int, eps: float) -> Tensor:
    return comb / (comb.sum(axis, keepdim=True) + eps)


def _rounds(comb: Tensor, axes: tuple[int, ...], rounds: int, eps: float) -> Tensor:
    for _ in range(rounds):
        for axis in axes:
            comb = _normalise(comb, axis, eps)
    return comb


def _sinkhorns(call: Captured) -> Iterator[Hypothesis]:
    """Other beginnings, ends and axes of the normalisation; [n, hc, hc] logits -> comb."""
    rows, columns = -1, -2

    def start(logits: Tensor, eps: float) -> Tensor:
        return logits.softmax(rows) + eps

    def exponential(logits: Tensor, iters: int, eps: float) -> Tensor:
        return _rounds(torch.exp(logits), (rows, columns), iters, eps)

    def exponential_from_columns(logits: Tensor, iters: int, eps: float) -> Tensor:
        comb = _normalise(torch.exp(logits), columns, eps)
        return _rounds(comb, (rows, columns), iters - 1, eps)

    def shifted_exponential(logits: Tensor, iters: int, eps: float) -> Tensor:
        comb = torch.exp(logits - logits.amax(rows, keepdim=True)) + eps
        comb = _normalise(comb, columns, eps)
        return _rounds(comb, (rows, columns), iters - 1, eps)

    def rows_last(logits: Tensor, iters: int, eps: float) -> Tensor:
        return _rounds(start(logits, eps), (columns, rows), iters, eps)

    def softmax_of_columns(logits: Tensor, iters: int, eps: float) -> Tensor:
        comb = _normalise(logits.softmax(columns) + eps, rows, eps)
        return _rounds(comb, (columns, rows), iters - 1, eps)

    def no_eps(logits: Tensor, iters: int, eps: float) -> Tensor:
        comb = _normalise(logits.softmax(rows), columns, 0.0)
        return _rounds(comb, (rows, columns), iters - 1, 0.0)

    def only_softmax(logits: Tensor, iters: int, eps: float) -> Tensor:
        return start(logits, eps)

    def sigmoid(logits: Tensor, iters: int, eps: float) -> Tensor:
        comb = _normalise(torch.sigmoid(logits) + eps, columns, eps)
        return _rounds(comb, (rows, columns), iters - 1, eps)

    variants: list[tuple[str, str, Sinkhorn]] = [
        (
            "unexplained",
            "Sinkhorn starts from exp, not from the rows' softmax",
            exponential_from_columns,
        ),
        ("unexplained", "Sinkhorn starts from exp, then rows and columns", exponential),
        ("unexplained", "Sinkhorn starts from exp(logit - max)", shifted_exponential),
        ("constant_factor", "Sinkhorn normalises rows last, not columns", rows_last),
        ("transposed", "Sinkhorn's softmax runs over columns", softmax_of_columns),
        ("constant_factor", "Sinkhorn leaves out eps", no_eps),
        ("unexplained", "comb is the softmax of its rows, without Sinkhorn", only_softmax),
        ("unexplained", "Sinkhorn starts from sigmoid", sigmoid),
    ]
    for kind, words, function in variants:
        yield Hypothesis(kind, words, predict=partial(_pre, call, comb=function))
    iters = call.inputs["iters"]
    for other in (iters - 1, iters + 1, *range(1, iters - 1)):
        if other > 0:
            words = f"Sinkhorn takes {other} rounds instead of {iters}"
            yield Hypothesis("unexplained", words, {"iters": other})


def _coefficients(call: Captured) -> Iterator[Hypothesis]:
    eps = call.inputs["eps"]
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("constant_factor", "eps is missing on pre", {"pre": torch.sigmoid}),
        ("constant_factor", "eps is added to post", {"post": lambda m: 2 * torch.sigmoid(m) + eps}),
        ("constant_factor", "post lacks its factor 2", {"post": torch.sigmoid}),
        (
            "constant_factor",
            "pre has post's factor 2",
            {"pre": lambda m: 2 * torch.sigmoid(m) + eps},
        ),
        (
            "unexplained",
            "pre is a softmax over the streams",
            {"pre": lambda m: m.softmax(-1) + eps},
        ),
        ("unexplained", "pre lacks its sigmoid", {"pre": lambda m: m + eps}),
        ("unexplained", "post lacks its sigmoid", {"post": lambda m: 2 * m}),
        ("unexplained", "post is a tanh", {"post": torch.tanh}),
        ("constant_factor", "the streams' norm is left out of the mixes", {"norm": False}),
    ]
    for kind, words, options in variants:
        yield Hypothesis(kind, words, predict=partial(_pre, call, **options))


def _mixes(call: Captured, norm: bool) -> Tensor:
    """[n, m] float64: fn times the flattened streams, divided by their root mean square."""
    a = call.inputs
    flat = a["x"].double().flatten(1)
    mixes = flat @ a["fn"].double().T
    if norm:
        mixes = mixes * torch.rsqrt(flat.square().mean(-1, keepdim=True) + a["norm_eps"])
    return mixes


def _pre(
    call: Captured,
    pre: Callable[[Tensor], Tensor] | None = None,
    post: Callable[[Tensor], Tensor] | None = None,
    comb: Sinkhorn | None = None,
    norm: bool = True,
) -> Values:
    """hc_pre in float64 with other functions of the mixes; None: as it should be."""
    a = call.inputs
    x = a["x"].double()
    n, hc, _ = x.shape
    parts = _mixes(call, norm).split([hc, hc, hc * hc], -1)
    bases = a["base"].double().split([hc, hc, hc * hc])
    scales = a["scale"].double()
    logits = [m * s + b for m, s, b in zip(parts, scales, bases, strict=True)]
    weights = (pre or (lambda m: torch.sigmoid(m) + a["eps"]))(logits[0])
    plain = _plain_sinkhorn if comb is None else comb
    return {
        "u": (weights.unsqueeze(-1) * x).sum(1),
        "post": (post or (lambda m: 2 * torch.sigmoid(m)))(logits[1]),
        "comb": plain(logits[2].view(n, hc, hc), a["iters"], a["eps"]),
    }


def _plain_sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    comb = _normalise(logits.softmax(-1) + eps, -2, eps)
    return _rounds(comb, (-1, -2), iters - 1, eps)


@candidates("hc_post")
def post_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    yield Hypothesis("transposed", "comb is read transposed", {"comb": a["comb"].transpose(1, 2)})
    yield Hypothesis("permuted", "x is read with its streams in reverse", {"x": a["x"].flip(1)})
    eye = torch.eye(a["x"].shape[1], device=a["x"].device).expand_as(a["comb"])
    yield Hypothesis(
        "unexplained", "the streams are not mixed (comb is the identity)", {"comb": eye}
    )
    zero = a["x"] * 0
    yield Hypothesis("constant_factor", "the residual streams are left out", {"x": zero})


@candidates("hc_head")
def head_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    yield _flattened(call)

    def with_pre(function: Callable[[Tensor], Tensor], norm: bool = True) -> Values:
        mixes = _mixes(call, norm) * a["scale"].double() + a["base"].double()
        return {"h": (function(mixes).unsqueeze(-1) * a["x"].double()).sum(1)}

    variants: list[tuple[str, str, Callable[[], Values]]] = [
        ("constant_factor", "eps is missing", lambda: with_pre(torch.sigmoid)),
        (
            "constant_factor",
            "the weights have post's factor 2",
            lambda: with_pre(lambda m: 2 * torch.sigmoid(m)),
        ),
        ("unexplained", "the weights are a softmax", lambda: with_pre(lambda m: m.softmax(-1))),
        ("unexplained", "the streams are averaged", lambda: {"h": a["x"].double().mean(1)}),
        ("constant_factor", "the streams are summed", lambda: {"h": a["x"].double().sum(1)}),
        ("rows", "only the first stream is taken", lambda: {"h": a["x"].double()[:, 0]}),
        (
            "constant_factor",
            "the streams' norm is left out of the mixes",
            lambda: with_pre(lambda m: torch.sigmoid(m) + a["eps"], norm=False),
        ),
    ]
    for kind, words, predict in variants:
        yield Hypothesis(kind, words, predict=predict)
