"""A ragged batch for tests of decoding: its texts, a cache that has read their beginnings, one step."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.model import Transformer


def texts(count: int, *, lengths: tuple[int, ...]) -> list[list[int]]:
    """Random tokens for every sequence of `lengths`, `count` more than its length."""
    rng = torch.Generator().manual_seed(count)
    return [torch.randint(2, 512, (length + count,), generator=rng).tolist() for length in lengths]


def prefilled(model: Transformer, ids: list[list[int]], *, lengths: tuple[int, ...]) -> Cache:
    """A cache that holds the first `lengths` tokens of `ids`."""
    cache = model.new_cache(len(ids))
    pieces = [text[:length] for text, length in zip(ids, lengths, strict=True)]
    model.forward(cache.step(pieces), cache)
    return cache


def token_of(ids: list[list[int]], number: int, *, lengths: tuple[int, ...]) -> list[int]:
    """Each sequence's token `number` after its first `lengths`."""
    return [text[length + number] for text, length in zip(ids, lengths, strict=True)]


@torch.inference_mode()
def run_step(model: Transformer, cache: Cache, step: FixedStep) -> Tensor:
    """What a graph captures, op by op: logits [b, v]."""
    step.advance()
    x = model.embed(step.tokens)
    for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
        x = layer(x, layer_cache, step)
    return model.head(x)
