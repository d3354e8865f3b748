"""Ops that move or normalise rows, and matrix products: slots, pools, norms, groups"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses.base import Hypothesis, Values, candidates


@candidates("cache_write")
def write_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    rows, slots, cache = a["rows"], a["slots"], a["cache"]
    length = len(cache)

    def written(to: Tensor, what: Tensor = rows) -> Values:
        result = cache.double().clone()
        keep = (to >= 0) & (to < length)
        result[to[keep]] = what.double()[keep]
        return {"cache": result}

    nothing = {"cache": cache.double()}
    yield Hypothesis("stale", "nothing is written", predict=partial(dict, nothing))
    for shift in (1, -1):
        moved = torch.where(slots >= 0, (slots + shift) % length, slots)
        yield Hypothesis("shifted", f"slots are {shift:+d}", predict=partial(written, moved))
        words = f"rows are written {abs(shift)} place too {'late' if shift > 0 else 'early'}"
        other = rows.roll(shift, 0)
        yield Hypothesis("shifted", words, predict=partial(written, slots, other))
    reverse = rows.flip(0)
    words = "rows are written in reverse"
    yield Hypothesis("permuted", words, predict=partial(written, slots, reverse))
    in_order = torch.arange(len(rows), device=slots.device)
    words = "rows are written one after another, slots are ignored"
    yield Hypothesis("permuted", words, predict=partial(written, in_order))
    if bool((slots < 0).any()):
        last = torch.where(slots >= 0, slots, length - 1)
        words = "rows without a slot (-1) are written to the last row"
        yield Hypothesis("padding", words, predict=partial(written, last))
        first = slots.clamp(min=0)
        words = "rows without a slot (-1) are written to row 0"
        yield Hypothesis("padding", words, predict=partial(written, first))
    for count in (1, 2, 4, 8, 16, 32, 64):
        if count < len(rows):
            for words, part in (("last", slice(-count, None)), ("first", slice(0, count))):
                cut = slots.clone()
                cut[part] = -1
                text = f"the {words} {count} rows are not written"
                yield Hypothesis("rows", text, predict=partial(written, cut))


@candidates("gather_swa")
def gather_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    ring, kv = a["ring"], a["kv"]
    yield Hypothesis("permuted", "new rows come before the ring", {"ring": kv, "kv": ring})
    zero = {"ring": ring * 0}
    yield Hypothesis("flushed", "the ring is taken as 0", zero)
    for shift in (1, -1):
        words = f"the ring is read {shift:+d} slots away"
        yield Hypothesis("shifted", words, {"ring": ring.roll(-shift, 0)})


@candidates("rms_norm")
def norm_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    x, weight, eps = a["x"].double(), a["weight"], a["eps"]
    scale = 1.0 if weight is None else weight.double()

    def normed(centred: Tensor, variance: Tensor, factor: Tensor | float = scale) -> Values:
        return {"y": centred * torch.rsqrt(variance + eps) * factor}

    mean_square = x.square().mean(-1, keepdim=True)
    whole = tuple(range(1, x.dim()))
    variants: list[tuple[str, str, Values]] = [
        (
            "constant_factor",
            "the sum of squares is taken, not their mean",
            normed(x, x.square().sum(-1, keepdim=True)),
        ),
        ("constant_factor", "x is not normalised", {"y": x * scale}),
        (
            "constant_factor",
            "eps is added outside the root",
            {"y": x / (mean_square.sqrt() + eps) * scale},
        ),
        (
            "constant_factor",
            "x is divided by its mean square (no root)",
            {"y": x / (mean_square + eps) * scale},
        ),
        (
            "constant_factor",
            "all heads are normalised together",
            normed(x, x.square().mean(whole, keepdim=True)),
        ),
        (
            "constant_factor",
            "the heads are normalised across, not within",
            normed(x, x.square().mean(0, keepdim=True)),
        ),
        (
            "unexplained",
            "the mean is subtracted (a layer norm)",
            normed(x - x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)),
        ),
    ]
    if weight is not None:
        variants += [
            ("constant_factor", "the weight is left out", normed(x, mean_square, 1.0)),
            ("constant_factor", "the weight is taken plus 1", normed(x, mean_square, 1.0 + scale)),
            ("constant_factor", "the weight divides", normed(x, mean_square, 1.0 / scale)),
        ]
    for kind, words, values in variants:
        yield Hypothesis(kind, words, predict=partial(dict, values))


@candidates("grouped_linear")
def grouped_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    o, groups = a["o"], a["groups"]
    if groups < 2:
        return
    parts = o.unflatten(-1, (groups, -1))

    def output_order() -> Values:
        z = call.truth["z"].unflatten(-1, (groups, -1))
        return {"z": z.transpose(1, 2).flatten(1)}

    for shift in range(1, min(groups, 4)):
        moved = {"o": parts.roll(shift, 1).flatten(1)}
        words = f"groups take the columns of the group {shift} before"
        yield Hypothesis("permuted", words, moved)
    reverse = {"o": parts.flip(1).flatten(1)}
    yield Hypothesis("permuted", "groups are read in reverse", reverse)
    mixed = {"o": o.unflatten(-1, (-1, groups)).transpose(1, 2).flatten(1)}
    yield Hypothesis("transposed", "groups are taken to be interleaved", mixed)
    first = {"o": parts[:, :1].expand_as(parts).flatten(1)}
    yield Hypothesis("columns", "every group reads the columns of group 0", first)
    words = "outputs of the groups are interleaved"
    yield Hypothesis("transposed", words, predict=output_order)


@candidates("moe_sum")
def sum_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    for name, label in (("shared", "the shared expert"), ("routed", "the routed experts")):
        yield Hypothesis("constant_factor", f"{label} left out", {name: a[name] * 0})
        yield Hypothesis("constant_factor", f"{label} added twice", {name: a[name] * 2})
    lower: dict[str, Tensor] = {n: a[n].bfloat16().to(a[n].dtype) for n in ("shared", "routed")}
    yield Hypothesis("unexplained", "both parts are rounded to bfloat16 first", lower)


@candidates("embed")
def embed_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs

    def only(stream: int) -> Values:
        x = call.truth["x"].clone()
        x[:, :stream] = 0
        x[:, stream + 1 :] = 0
        return {"x": x}

    for stream in range(a["hc"]):
        words = f"only stream {stream} is filled"
        yield Hypothesis("columns", words, predict=partial(only, stream))
