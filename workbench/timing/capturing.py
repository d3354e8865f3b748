"""Ops of chosen layers as a real forward pass ran them, and the layers' own inputs"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.probes.tap import set_taps

Say = Callable[[str], None]
Part = Callable[[Tensor, Cache, Step], Tensor]


@dataclass
class LayerInput:
    """What one layer was given: its streams [n, hc, d] and its cache as it was before."""

    layer: int
    x: Tensor
    cache: dict[str, Tensor]


@dataclass
class Pass:
    """One captured forward pass: its ops, what every wanted layer was given, and its step."""

    step: Step
    cache: Cache
    calls: list[Captured] = field(default_factory=list)
    layers: list[LayerInput] = field(default_factory=list)


def sequences(prompt: list[int], context: int | None, batch: int) -> list[list[int]]:
    """`batch` token lists of `context` tokens (the prompt's own length when None).

    The prompt is repeated or cut; sequence b starts at its b-th token, so that batch rows differ.
    """
    length = context or len(prompt)
    repeated = prompt * (-(-(length + batch) // len(prompt)) + 1)
    return [repeated[b : b + length] for b in range(batch)]


def parse_layers(text: str, count: int) -> list[int]:
    """``12`` or ``10-12`` -> layer numbers. Raises DSV4Error."""
    first, dash, last = text.partition("-")
    try:
        low, high = int(first), int(last if dash else first)
    except ValueError:
        raise DSV4Error(f"layers {text!r} are not N or A-B", "e.g. --layers 10-12") from None
    if not 0 <= low <= high < count:
        what = f"layer {low}" if low == high else f"layers {text}"
        raise DSV4Error(f"{what} does not exist", f"layers are 0 to {count - 1}")
    return list(range(low, high + 1))


@torch.inference_mode()
def capture_pass(
    model: Transformer,
    wanted: Callable[[Site], bool],
    tokens: Sequence[list[int]],
    phase: str,
    say: Say,
    adapt: Callable[[Step, Cache], Step] = lambda step, cache: step,
) -> Pass:
    """Run `tokens` (one list a sequence) and keep the wanted sites' ops of the last pass.

    Phase ``prefill`` captures one pass over all tokens; ``decode`` the pass of every sequence's last
    token, after the others have been prefilled; `adapt` may put another step in the place of that
    pass's. Nothing after the last wanted site is run. Raises DSV4Error for a decode of fewer than two
    tokens.
    """
    if phase == "decode" and len(tokens[0]) < 2:
        raise DSV4Error("decode needs at least 2 tokens of context", "--context or a longer prompt")
    cache = model.new_cache(len(tokens))
    cached = len(tokens[0]) - 1 if phase == "decode" else 0
    if cached:
        say(f"prefill of {cached} tokens")
        model.forward(cache.step([t[:cached] for t in tokens]), cache, last_only=True)
    step = adapt(cache.step([t[cached:] for t in tokens]), cache)
    kept = Pass(step, cache)
    observer = Capture(wanted, lambda: [t for c in cache.layers for t in c.tensors().values()])
    x = torch.empty(0)
    for name, sites, run in _parts(model, wanted):
        say(f"capture {name}")
        layer = sites[0].layer
        if layer is not None and any(map(wanted, sites)):
            kept.layers.append(LayerInput(layer, x.clone(), cache.layers[layer].snapshot()))
        set_taps(sites, observer)
        try:
            x = run(x, cache, step)
        finally:
            set_taps(sites, None)
    kept.calls = observer.calls
    return kept


def _parts(
    model: Transformer, wanted: Callable[[Site], bool]
) -> Iterator[tuple[str, list[Site], Part]]:
    """The forward pass in pieces (name, sites, function), up to the last with a wanted site."""
    table = list(model.sites.values())
    pieces: list[tuple[str, list[Site], Part]] = [
        ("embed", [table[0]], lambda x, cache, step: model.embed(step.tokens))
    ]
    for index in range(len(model.layers)):
        sites = [site for site in table if site.layer == index]
        pieces.append((f"L{index}", sites, _layer(model, index)))
    head = [site for site in table[1:] if site.layer is None]
    pieces.append(("head", head, lambda x, cache, step: model.head(x)))
    last = max((i for i, (_, sites, _) in enumerate(pieces) if any(map(wanted, sites))), default=-1)
    yield from pieces[: last + 1]


def _layer(model: Transformer, index: int) -> Part:
    return lambda x, cache, step: model.layers[index](x, cache.layers[index], step)


def run_layer(model: Transformer, kept: Pass, given: LayerInput) -> Any:
    """Run one captured layer whole, on its own inputs; its cache is put back before."""
    cache = kept.cache.layers[given.layer]
    cache.restore(given.cache)
    return model.layers[given.layer](given.x, cache, kept.step)
