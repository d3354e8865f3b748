"""Sparse attention and rope: padding, sink, window, scale, softmax; bases, pairs and positions"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.config import CSA_RATIO, Config
from dsv4_bench.engine.ops.attention import gather_rows
from dsv4_bench.engine.ops.rope import rope_frequencies
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses.base import Hypothesis, Values, candidates


@candidates("attention")
def attention_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    """What kernels of this shape get wrong, most specific first."""
    yield from _padding(call)
    yield from _sink(call)
    yield from _window(call)
    yield from _entries(call)
    yield from _scale(call, 64 if config is None else config.qk_rope_head_dim)
    yield from _softmax(call)


# ------------------------------------------------------------------------------ arguments


def _padding(call: Captured) -> Iterator[Hypothesis]:
    """Index -1: it has no key, no weight, and is no row."""
    a = call.inputs
    indices = {name: a[name] for name in ("window_index", "entry_index") if a[name] is not None}
    indices = {name: index for name, index in indices.items() if bool((index < 0).any())}
    if not indices:
        return

    def pointing(to: int | None, which: dict[str, Tensor]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for name, index in which.items():
            pool = "window" if name == "window_index" else "entries"
            row = len(a[pool]) if to is None else to % len(a[pool])
            if to is None:  # a row of zeros, added at the end
                changed[pool] = torch.cat((a[pool], a[pool].new_zeros(1, a[pool].shape[1])))
            changed[name] = torch.where(index >= 0, index, row)
        return changed

    subsets = [indices] + [{n: i} for n, i in indices.items() if len(indices) > 1]
    for subset in subsets:
        of = "" if subset is indices else f" of {next(iter(subset))}"
        for words, to in (
            ("is counted as keys: it takes part in the softmax with logit 0", None),
            ("is read as row 0 of the pool", 0),
            ("is read as the last row of the pool", -1),
        ):
            yield Hypothesis("padding", f"padding{of} {words}", pointing(to, subset))
    mean = "padding is counted as keys: the sum is divided by all of them"
    yield Hypothesis("padding", mean, predict=partial(_divided, call))


def _divided(call: Captured) -> Values:
    """Each row weighted with the share of its index entries that are keys."""
    a, truth = call.inputs, call.truth
    valid = [a[n] >= 0 for n in ("window_index", "entry_index") if a[n] is not None]
    share = torch.cat(valid, 1).double().mean(1)
    return {**truth, "o": truth["o"] * share[:, None, None]}


def _sink(call: Captured) -> Iterator[Hypothesis]:
    a = call.inputs
    sink, scale = a["sink"].double(), a["scale"]
    for words, value in (
        ("left out", torch.full_like(sink, -math.inf)),
        ("multiplied by the softmax scale", sink * scale),
        ("divided by the softmax scale", sink / scale),
        ("added twice", sink + math.log(2)),
        ("added as it is, not as its exponential", sink.clamp(min=1e-30).log()),
        ("that of head 0 in every head", sink[:1].expand_as(sink)),
        ("taken as 0", sink * 0),
        ("negated", -sink),
        ("in base 2", sink * math.log(2)),
    ):
        yield Hypothesis("constant_factor", f"the sink is {words}", {"sink": value})
    yield Hypothesis(
        "constant_factor",
        "lse leaves the sink out",
        predict=partial(_lse_without_sink, call, False),
    )
    yield Hypothesis(
        "constant_factor", "o leaves the sink out", predict=partial(_lse_without_sink, call, True)
    )


def _lse_without_sink(call: Captured, of_output: bool) -> Values:
    without = call.oracle(sink=torch.full_like(call.inputs["sink"], -math.inf))
    name = "o" if of_output else "lse"
    return {**call.truth, name: without[name]}


def _window(call: Captured) -> Iterator[Hypothesis]:
    """One key more or less at either end of the window."""
    index = call.inputs["window_index"]
    width, rows = index.shape[1], len(call.inputs["window"])
    if not width:
        return
    for words, column in (("oldest", 0), ("newest", width - 1)):
        for count in (1, 2):
            short = index.clone()
            part = slice(0, count) if column == 0 else slice(width - count, width)
            short[:, part] = -1
            keys = f"{words} {count} keys" if count > 1 else f"{words} key"
            yield Hypothesis(
                "shifted", f"the window leaves out its {keys}", {"window_index": short}
            )
    newest = index[:, -1:]
    after = torch.where(newest + 1 < rows, newest + 1, -1)
    longer = {"window_index": torch.cat((index, after), 1)}
    yield Hypothesis("shifted", "the window shows the next token (causal mask off by one)", longer)
    oldest = index[:, :1]
    before = torch.where(oldest > 0, oldest - 1, -1)
    longer = {"window_index": torch.cat((before, index), 1)}
    yield Hypothesis("shifted", "the window is one key too long at its old end", longer)
    for tile in (64, 32, 16, 8):
        if width > tile:
            for words, part in (("last", slice(width - tile, width)), ("first", slice(0, tile))):
                cut = index.clone()
                cut[:, part] = -1
                text = f"the {words} {tile} columns of the window are left out"
                yield Hypothesis("tiles", text, {"window_index": cut})
    none = {"window_index": torch.full_like(index, -1)}
    yield Hypothesis("tiles", "the window is left out", none)


def _entries(call: Captured) -> Iterator[Hypothesis]:
    a = call.inputs
    pool, index = a["entries"], a["entry_index"]
    if pool is None or index is None or not index.shape[1]:
        return
    yield Hypothesis("positions", "compressed entries are left out", {"entries": None})
    twice = {"entry_index": torch.cat((index, index), 1)}
    yield Hypothesis("constant_factor", "every entry is counted twice", twice)
    last = index.max(1, keepdim=True).values
    more = torch.where((last >= 0) & (last + 1 < len(pool)), last + 1, -1)
    shown = {"entry_index": torch.cat((index, more), 1)}
    yield Hypothesis("shifted", "one entry too many is visible", shown)
    less = torch.where(index == last, -1, index)
    yield Hypothesis("shifted", "the newest entry is left out", {"entry_index": less})
    early = torch.where(index == 0, -1, index)
    yield Hypothesis("shifted", "the first entry is left out", {"entry_index": early})
    for words, part in (("first", slice(0, 1)), ("last", slice(-1, None))):
        cut = index.clone()
        cut[:, part] = -1
        yield Hypothesis("tiles", f"the {words} selected entry is left out", {"entry_index": cut})
    for tile in (64, 32, 16, 8):
        if index.shape[1] > tile:
            cut = index.clone()
            cut[:, -tile:] = -1
            text = f"the last {tile} selected entries are left out"
            yield Hypothesis("tiles", text, {"entry_index": cut})
    if len(a["window"]) >= len(pool):
        other = {"entries": a["window"]}
        yield Hypothesis("permuted", "entries are read from the window's pool", other)


def _scale(call: Captured, rotated: int) -> Iterator[Hypothesis]:
    scale, width = call.inputs["scale"], call.inputs["q"].shape[-1]
    for words, value in (
        ("left out", 1.0),
        ("applied twice", scale * scale),
        ("1 / head width", 1 / width),
        ("that of the rotated dims", rotated**-0.5),
        ("that of the dims that are not rotated", max(width - rotated, 1) ** -0.5),
        ("in base 2 (exp for exp2)", scale * math.log(2)),
        ("in base 2 (exp2 for exp)", scale / math.log(2)),
    ):
        yield Hypothesis("constant_factor", f"the softmax scale is {words}", {"scale": value})


# ------------------------------------------------------------------------------ formulas


def attend(
    call: Captured, weigh: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Values:
    """Attention in float64 with another softmax.

    `weigh(logits [n, h, w + k], valid [n, w + k], sink [h])` gives weights p and lse; hidden logits
    are -inf.
    """
    a = {n: v.double() if n in ("q", "sink") else v for n, v in call.inputs.items()}
    pools = [("window", "window_index"), ("entries", "entry_index")]
    used = [(a[p], a[i]) for p, i in pools if a[p] is not None and a[i] is not None]
    keys = torch.cat([gather_rows(pool.double(), index).double() for pool, index in used], 1)
    valid = torch.cat([index >= 0 for _, index in used], 1)
    logits = (a["q"] @ keys.transpose(1, 2)) * a["scale"]
    p, lse = weigh(logits.masked_fill(~valid[:, None], -math.inf), valid, a["sink"])
    return {"o": p @ keys, "lse": lse}


def _with_lse(logits: Tensor, sink: Tensor) -> Tensor:
    total = torch.cat((logits, sink.expand(len(logits), -1)[..., None]), -1)
    return torch.logsumexp(total, -1)


def _softmax(call: Captured) -> Iterator[Hypothesis]:
    def unnormalised(logits: Tensor, valid: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        lse = _with_lse(logits, sink)
        top = logits.amax(-1, keepdim=True)
        return torch.exp(logits - top), lse

    def per_part(logits: Tensor, valid: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        """Window and entries normalised apart and added: the sink counted in both."""
        width = call.inputs["window_index"].shape[1]
        parts = [logits[..., :width], logits[..., width:]]
        p = [torch.exp(x - _with_lse(x, sink)[..., None]) for x in parts]
        return torch.cat(p, -1), _with_lse(logits, sink)

    def sink_per_part(logits: Tensor, valid: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(_with_lse(logits, sink), sink.expand(len(logits), -1))
        return torch.exp(logits - lse[..., None]), lse

    def base_two(logits: Tensor, valid: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        lse = _with_lse(logits, sink)
        return torch.exp(logits - lse[..., None]), lse / math.log(2)

    def sigmoid(logits: Tensor, valid: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(logits), _with_lse(logits, sink)

    variants: list[tuple[str, str, Any]] = [
        ("constant_factor", "the sum is not divided by the softmax's denominator", unnormalised),
        ("constant_factor", "window and entries are normalised apart", per_part),
        ("constant_factor", "the sink is added by each of two parts", sink_per_part),
        ("constant_factor", "lse is in base 2", base_two),
        ("unexplained", "a sigmoid is taken instead of the softmax", sigmoid),
    ]
    for kind, words, weigh in variants:
        yield Hypothesis(kind, words, predict=partial(attend, call, weigh))


# ------------------------------------------------------------------------------ rope


@candidates("rope")
def rope_variants(call: Captured, config: Config | None) -> Iterator[Hypothesis]:
    a = call.inputs
    freqs, positions, inverse = a["freqs"], a["positions"], a["inverse"]
    yield Hypothesis("positions", "it rotates the other way round", {"inverse": not inverse})
    yield Hypothesis("positions", "the rotation is left out", {"freqs": freqs * 0})
    yield Hypothesis("positions", "it is rotated twice", {"freqs": freqs * 2})
    if config is not None:
        for words, other in other_frequencies(config, freqs):
            yield Hypothesis("positions", f"it uses {words}", {"freqs": other})
    for ratio in (4, 128):
        words = f"positions are counted in windows of {ratio}"
        yield Hypothesis("positions", words, {"positions": positions // ratio})
        words = f"window numbers are multiplied by {ratio}"
        yield Hypothesis("positions", words, {"positions": positions * ratio})
        words = f"positions are counted within {ratio}"
        yield Hypothesis("positions", words, {"positions": positions % ratio})
        for shift in (ratio - 1, ratio):
            words = f"positions are {shift} too high"
            yield Hypothesis("shifted", words, {"positions": positions + shift})
    ramp = torch.arange(len(positions), device=positions.device)
    yield Hypothesis("positions", "rows are numbered from 0", {"positions": ramp})
    halves = "halves_swapped"
    yield Hypothesis(
        halves, "halves are paired instead of neighbours (NeoX)", predict=partial(_neox, call)
    )
    yield Hypothesis(
        halves,
        "even and odd columns are exchanged in every pair",
        predict=partial(_pairs_exchanged, call),
    )
    yield Hypothesis(
        "columns", "the first dims are rotated instead of the last", predict=partial(_first, call)
    )
    yield Hypothesis("unexplained", "only the cosine is applied", predict=partial(_cosine, call))


def other_frequencies(config: Config, freqs: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Frequencies of the other layer kinds, and of a YaRN left out."""
    plain = replace(config, num_hidden_layers=1, compress_ratios=(0,))
    compressed = replace(plain, compress_ratios=(CSA_RATIO,))
    named = [
        (f"the sliding layers' base {config.rope_theta:g}", plain),
        (f"the compressed layers' base {config.compress_rope_theta:g} with YaRN", compressed),
        ("compressed layers' base without YaRN", replace(compressed, rope_scaling=None)),
        (
            "the sliding layers' base with YaRN",
            replace(compressed, compress_rope_theta=config.rope_theta),
        ),
    ]
    for words, changed in named:
        other = rope_frequencies(changed, 0).to(freqs.device)
        if other.shape == freqs.shape and not torch.equal(other, freqs):
            yield words, other
    if config.rope_scaling is not None:
        scaled = freqs / config.rope_scaling.factor
        yield "frequencies divided by YaRN's factor throughout", scaled


def _angles(call: Captured) -> tuple[Tensor, Tensor, Tensor]:
    """x in float64, and cos and sin [n, (1,) rd/2] as the op has them."""
    a = call.inputs
    angle = (a["positions"].float()[:, None] * a["freqs"]).double()
    if a["x"].dim() == 3:
        angle = angle[:, None]
    return a["x"].double(), angle.cos(), angle.sin() * (-1.0 if a["inverse"] else 1.0)


def _neox(call: Captured) -> Values:
    x, cos, sin = _angles(call)
    half = cos.shape[-1]
    kept, first, second = x[..., : -2 * half], x[..., -2 * half : -half], x[..., -half:]
    return {"y": torch.cat((kept, first * cos - second * sin, first * sin + second * cos), -1)}


def _pairs_exchanged(call: Captured) -> Values:
    x, cos, sin = _angles(call)
    rd = 2 * cos.shape[-1]
    even, odd = x[..., -rd::2], x[..., -rd + 1 :: 2]
    rotated = torch.stack((even * sin + odd * cos, even * cos - odd * sin), -1).flatten(-2)
    return {"y": torch.cat((x[..., :-rd], rotated), -1)}


def _first(call: Captured) -> Values:
    x, cos, sin = _angles(call)
    rd = 2 * cos.shape[-1]
    even, odd = x[..., :rd:2], x[..., 1:rd:2]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return {"y": torch.cat((rotated, x[..., rd:]), -1)}


def _cosine(call: Captured) -> Values:
    x, cos, _ = _angles(call)
    rd = 2 * cos.shape[-1]
    rotated = x[..., -rd:] * cos.repeat_interleave(2, -1)
    return {"y": torch.cat((x[..., :-rd], rotated), -1)}
