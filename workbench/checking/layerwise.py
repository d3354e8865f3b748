"""Teacher-forced runs layer by layer: every forward call through one layer, then through the next

A layer depends on the streams it is given and on its own cache, so running all calls of a layer before
the next layer gives the numbers of the usual order. It lets a run begin at any layer from the
streams that entered it, without any cache kept, and lets several runs go side by side while only
one layer's tensors are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dsv4_bench.engine.cache import LayerCache
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import split
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Implementation, RouteEntry, Site
from dsv4_bench.engine.step import Step
from dsv4_bench.engine.tokens import check_token_ids
from dsv4_bench.probes import nvtx

Streams = list[Tensor]  # one tensor [n, hc, d] for each forward call


def forward_calls(
    model: Transformer, sequences: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]]
) -> list[Step]:
    """The steps that feed `sequences[b]` in pieces of the sizes `chunks[b]` (the last one repeats).

    Every sequence must come in the same number of pieces. Raises DSV4Error otherwise, and for ids
    outside the vocabulary.
    """
    spans = []
    for tokens, sizes in zip(sequences, chunks, strict=True):
        check_token_ids(tokens, model.config.vocab_size)
        spans.append(split(len(tokens), sizes))
    counts = {len(pieces) for pieces in spans}
    if counts != {len(spans[0])} or not spans[0]:
        raise DSV4Error(f"sequences come in {sorted(counts)} pieces, they must be equally many")
    steps = []
    for pieces in zip(*spans, strict=True):
        flat = [t for tokens, (a, b) in zip(sequences, pieces, strict=True) for t in tokens[a:b]]
        starts = tuple(start for start, _ in pieces)
        lengths = tuple(stop - start for start, stop in pieces)
        device_tokens = torch.tensor(flat, device=model.device)
        steps.append(Step(device_tokens, starts, lengths, model.config.sliding_window))
    return steps


def part_names(model: Transformer) -> list[str]:
    """The parts of a run, in order: ``embed``, ``L0`` ..., ``head``."""
    return ["embed", *(f"L{layer}" for layer in range(len(model.layers))), "head"]


def part_of(model: Transformer, site: Site) -> int:
    """The number of the part that runs `site`."""
    if site.layer is not None:
        return site.layer + 1
    return 0 if site.path == "embed" else len(model.layers) + 1


@torch.inference_mode()
def run_part(model: Transformer, part: int, streams: Streams, steps: Sequence[Step]) -> Streams:
    """All forward calls through one part: streams [n, hc, d] of each call -> those that leave it.

    The embedding ignores `streams`; the head returns logits [n, v] float32.
    """
    if part == 0:
        return [model.embed(nvtx.begin(step).tokens) for step in steps]
    if part > len(model.layers):
        return [model.head(x) for x, _ in zip(streams, map(nvtx.begin, steps), strict=True)]
    batch = len(steps[0].starts)
    cache = LayerCache(model.config, part - 1, batch, model.dtype, model.device)
    outputs = []
    for x, step in zip(streams, steps, strict=True):
        cache.reserve(max(a + b for a, b in zip(step.starts, step.lengths, strict=True)))
        outputs.append(model.layers[part - 1](x, cache, nvtx.begin(step)))
    return outputs


def run(model: Transformer, steps: Sequence[Step]) -> Tensor:
    """All parts on the model's present route: logits [tokens, v] of all calls, one after another."""
    streams: Streams = []
    for part in range(len(model.layers) + 2):
        streams = run_part(model, part, streams, steps)
    return torch.cat(streams)


# ------------------------------------------------------------------------------ routes

Chosen = Mapping[str, Implementation]


def references(model: Transformer) -> dict[str, Implementation]:
    """Every site on its reference."""
    return {path: IMPLEMENTATIONS[site.op]["reference"] for path, site in model.sites.items()}


def chosen_by(model: Transformer, route: Sequence[RouteEntry]) -> dict[str, Implementation]:
    """What `route` chooses at every site; the model's own route stays. Raises as `set_route` does."""
    with kept_route(model):
        model.set_route(list(route))
        return {path: site.impl for path, site in model.sites.items()}


def use(model: Transformer, chosen: Chosen) -> None:
    """Give every site its implementation of `chosen`; sites that have it already keep their stamp."""
    for path, site in model.sites.items():
        if site.impl is not chosen[path]:
            site.use(chosen[path])


@contextmanager
def kept_route(model: Transformer) -> Iterator[None]:
    """Whatever is done inside, the model's route and stamps are as before afterwards."""
    route = model.route
    before = {path: (site.impl, site.stamp) for path, site in model.sites.items()}
    try:
        yield
    finally:
        model.route = route
        for path, site in model.sites.items():
            site.put_back(*before[path])
