"""Changes that any op's arguments may suffer: transposed, shifted, exchanged, scaled, left out, misread"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.hypotheses.base import Hypothesis
from dsv4_bench.probes.hypotheses.weights import changed_weights

_UNORDERED = 16  # an axis up to this long counts streams, heads or experts, not a sequence


def changed_arguments(call: Captured) -> Iterator[Hypothesis]:
    """One argument changed, whatever the op; weights first, then the smallest: quickest to try."""
    inputs = call.inputs
    running = {n: v for n, v in inputs.items() if n not in call.site.params}
    yield from _exchanged(running)
    for name, value in inputs.items():
        if isinstance(value, Weight):
            for kind, words, weight in changed_weights(value):
                yield Hypothesis(kind, f"{name}: {words}", {name: weight})
    for name, value in sorted(inputs.items(), key=lambda item: _size(item[1])):
        if isinstance(value, Tensor) and value.numel():
            if value.is_floating_point():
                yield from _reordered(name, value)
                yield from _rescaled(name, value, inputs)
            else:
                yield from _integers(name, value)
        elif isinstance(value, bool):
            yield Hypothesis("positions", f"{name} is {not value}", {name: not value})
        elif isinstance(value, float):
            yield from _number(name, value)
        elif isinstance(value, int):
            kind = "decision_flip" if name == "k" else "unexplained"
            for step in (-1, 1):
                words = f"{name} is {value + step} instead of {value}"
                yield Hypothesis(kind, words, {name: value + step})
        elif isinstance(value, Step):
            yield from _steps(name, value)
        if isinstance(value, (Tensor, Weight)) and name in call.site.params:
            yield Hypothesis("decision_flip", f"{name} is ignored", {name: None})


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0


def _exchanged(running: dict[str, Any]) -> Iterator[Hypothesis]:
    tensors = [(n, v) for n, v in running.items() if isinstance(v, Tensor)]
    for (a, x), (b, y) in combinations(tensors, 2):
        if x.shape == y.shape and x.dtype == y.dtype:
            yield Hypothesis("permuted", f"{a} and {b} are exchanged", {a: y, b: x})


def _reordered(name: str, value: Tensor) -> Iterator[Hypothesis]:
    """The same numbers in another order."""
    if value.dim() >= 2 and value.shape[-1] == value.shape[-2] > 1:
        yield Hypothesis(
            "transposed", f"{name} is read transposed", {name: value.transpose(-1, -2)}
        )
    if value.dim() == 2 and min(value.shape) > 1:
        order = value.T.reshape(value.shape)
        yield Hypothesis("transposed", f"{name} is read column by column", {name: order})
    if value.dim() == 3 and min(value.shape[:2]) > 1:
        order = value.transpose(0, 1).reshape(value.shape)
        yield Hypothesis(
            "transposed", f"{name} is read with its first two axes exchanged", {name: order}
        )
    for axis in range(value.dim()):
        length = value.shape[axis]
        label = "row" if axis == 0 else "column" if axis == value.dim() - 1 else "head"
        if length < 2:
            continue
        # Heads and streams are no sequence: there the next one's is another's.
        kind = "permuted" if axis > 0 and length <= _UNORDERED else "shifted"
        for shift in (1, -1):
            yield Hypothesis(
                kind,
                f"{name} is read {abs(shift)} {label} too {'early' if shift > 0 else 'late'}",
                {name: value.roll(shift, axis)},
                edge=1 if axis == 0 else 0,
            )
        if 2 < length <= 512 or axis == value.dim() - 1:
            order = value.flip(axis)
            yield Hypothesis("permuted", f"{name}'s {label}s are read in reverse", {name: order})
    if value.dim() == 3 and value.shape[1] % 2 == 0 and value.shape[1] > 2:
        yield from _heads(name, value)
    width = value.shape[-1]
    if width % 2 == 0 and width > 2:
        a, b = value.chunk(2, -1)
        halves = {name: torch.cat((b, a), -1)}
        yield Hypothesis("halves_swapped", f"the halves of {name} are exchanged", halves)
        pairs = {name: value.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)}
        yield Hypothesis("permuted", f"neighbouring columns of {name} are exchanged", pairs)
        mixed = {name: value.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)}
        yield Hypothesis("halves_swapped", f"the halves of {name} are read interleaved", mixed)
        split = {name: value.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)}
        yield Hypothesis("halves_swapped", f"{name}'s even columns are read before the odd", split)
    if value.dim() >= 2:
        first = value[:1].expand_as(value)
        yield Hypothesis("rows", f"every row reads row 0 of {name}", {name: first}, edge=1)


def _heads(name: str, value: Tensor) -> Iterator[Hypothesis]:
    """The middle axis in another order: heads, streams."""
    numbers = torch.arange(value.shape[1], device=value.device)
    for words, order in (
        ("neighbouring heads exchanged", numbers ^ 1),
        ("its halves of the heads exchanged", numbers.roll(len(numbers) // 2)),
        ("its halves of the heads interleaved", numbers.view(2, -1).T.flatten()),
        ("even heads before odd ones", numbers.view(-1, 2).T.flatten()),
    ):
        yield Hypothesis("permuted", f"{name} is read with {words}", {name: value[:, order]})


def _rescaled(name: str, value: Tensor, inputs: dict[str, Any]) -> Iterator[Hypothesis]:
    """The same numbers times something, plus something, or cut."""
    yield Hypothesis("constant_factor", f"{name} is left out (taken as 0)", {name: value * 0.0})
    ones = torch.ones_like(value)
    yield Hypothesis("constant_factor", f"{name} is left out (taken as 1)", {name: ones})
    for words, changed in (
        ("added twice", value * 2.0),
        ("halved", value * 0.5),
        ("negated", -value),
        ("squared", value.square()),
        ("taken plus 1", value + 1.0),
        ("taken minus 1", value - 1.0),
    ):
        yield Hypothesis("constant_factor", f"{name} is {words}", {name: changed})
    for other, number in inputs.items():
        if isinstance(number, float) and number not in (0.0, 1.0):
            words = f"{name} is multiplied by {other}"
            yield Hypothesis("constant_factor", words, {name: value * number})
            words = f"{name} is divided by {other}"
            yield Hypothesis("constant_factor", words, {name: value / number})
    yield Hypothesis("flushed", f"negative values of {name} are taken as 0", {name: value.relu()})
    yield Hypothesis("flushed", f"{name} is read without its sign", {name: value.abs()})
    width = value.shape[-1]
    for tile in (128, 64, 32, 16):
        if width > tile:
            cut = value.clone()
            cut[..., -tile:] = 0.0
            yield Hypothesis(
                "tiles", f"the last {tile} columns of {name} are left out", {name: cut}
            )
            cut = value.clone()
            cut[..., :tile] = 0.0
            yield Hypothesis(
                "tiles", f"the first {tile} columns of {name} are left out", {name: cut}
            )
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        rounded = value.float().to(dtype).to(value.dtype)
        words = f"{name} is rounded to {str(dtype).removeprefix('torch.')}"
        yield Hypothesis("unexplained", words, {name: rounded})


def _integers(name: str, value: Tensor) -> Iterator[Hypothesis]:
    """Positions, indices, ids: off by a few; -1 stays -1."""
    present = value >= 0
    for shift in (1, -1):
        moved = torch.where(present, (value + shift).clamp(min=0), value)
        yield Hypothesis("shifted", f"{name} is {shift:+d}", {name: moved})
    if value.dim() >= 2:
        yield Hypothesis(
            "permuted", f"{name}'s columns are read in reverse", {name: value.flip(-1)}
        )
        for shift in (1, -1):
            words = f"{name} is read one row too {'early' if shift > 0 else 'late'}"
            yield Hypothesis("shifted", words, {name: value.roll(shift, 0)}, edge=1)
    else:
        for shift in (1, -1):
            words = f"{name} is read one place too {'early' if shift > 0 else 'late'}"
            yield Hypothesis("shifted", words, {name: value.roll(shift, 0)}, edge=1)
        yield Hypothesis("permuted", f"{name} is read in reverse", {name: value.flip(0)})
    kind = "positions" if name == "positions" else "rows"
    yield Hypothesis(kind, f"{name} is taken as 0", {name: value * 0})
    yield Hypothesis(kind, f"{name} is counted from 0 again", {name: value - value.min()})


def _number(name: str, value: float) -> Iterator[Hypothesis]:
    kind = "saturated" if name == "limit" else "constant_factor"
    for words, changed in (
        ("missing (0)", 0.0),
        ("missing (1)", 1.0),
        ("applied twice", value * value),
        ("doubled", 2 * value),
        ("halved", value / 2),
        ("its square root", abs(value) ** 0.5),
        ("inverted", 1 / value if value else 0.0),
        ("negative", -value),
        ("infinite", float("inf")),
    ):
        if changed != value:
            yield Hypothesis(kind, f"{name} is {words}", {name: changed})


def _steps(name: str, step: Step) -> Iterator[Hypothesis]:
    """The sequences stand elsewhere than they do."""
    for shift in (1, -1, -min(step.starts)):
        starts = tuple(start + shift for start in step.starts)
        if shift and min(starts) >= 0:
            words = "from 0 again" if min(starts) == 0 and shift < -1 else f"{shift:+d}"
            moved = replace(step, starts=starts)
            yield Hypothesis("shifted", f"positions are counted {words}", {name: moved})
