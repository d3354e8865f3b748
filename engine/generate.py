"""Prefill, teacher-forced logits and decoding, on top of `Transformer.forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.graph import DecodeGraph
from dsv4_bench.engine.graph_branches import Observer
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.tokens import check_token_ids

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


def split(count: int, chunks: Sequence[int]) -> list[tuple[int, int]]:
    """[0, count) in pieces of the given sizes, the last size repeating; no sizes: one piece."""
    if any(size < 1 for size in chunks):
        raise DSV4Error(f"chunk sizes must be positive, found {min(chunks)}")
    sizes = list(chunks) or [count]
    spans: list[tuple[int, int]] = []
    start = 0
    while start < count:
        size = sizes[min(len(spans), len(sizes) - 1)]
        spans.append((start, min(start + size, count)))
        start += size
    return spans


def teacher_forced_logits(
    model: Transformer,
    tokens: Sequence[int],
    chunks: Sequence[int] = (),
    progress: Progress | None = None,
    graph: bool = False,
    note: Note = lambda text: None,
) -> Tensor:
    """Logits of every position of `tokens`, fed in pieces: float32 [T, v] on the CPU.

    With `graph` pieces of one token, but for a first one, are decoded as `generate` does it.
    """
    check_token_ids(tokens, model.config.vocab_size)
    cache = model.new_cache()
    logits = torch.empty(len(tokens), model.config.vocab_size)
    decode = None
    for start, stop in split(len(tokens), chunks):
        if graph and start > 0 and stop - start == 1:
            decode = decode or decoder(model, cache, graph, note)
            logits[start] = decode(tokens[start])
        else:
            logits[start:stop] = model.forward(cache.step([tokens[start:stop]]), cache)
        if progress:
            progress(stop, len(tokens))
    return logits


def prefill(
    model: Transformer, cache: Cache, tokens: Sequence[int], chunks: Sequence[int]
) -> Tensor:
    """Feed `tokens`; the last position's logits, float32 [v]."""
    logits = torch.empty(0)
    for start, stop in split(len(tokens), chunks):
        logits = model.forward(cache.step([tokens[start:stop]]), cache, last_only=True)
    return logits[0]


def generate(
    model: Transformer,
    tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    chunks: Sequence[int] = (),
    graph: bool = True,
    note: Note = lambda text: None,
    observer: Observer | None = None,
) -> Iterator[int]:
    """Yield new token ids until end-of-sentence or `max_new_tokens`; temperature 0 is greedy.

    On a GPU with kernels the decode steps come from a CUDA graph if `graph` says so; `note` hears
    whether they do, or why not, and `observer` sees it captured.
    """
    if not tokens:
        raise DSV4Error("the prompt is empty", "give at least one token")
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache()
    logits = prefill(model, cache, tokens, chunks)
    decode = None
    for number in range(max_new_tokens):
        token = sample(logits, temperature, generator)
        yield token
        if token == model.config.eos_token_id or number + 1 == max_new_tokens:
            return
        decode = decode or decoder(model, cache, graph, note, observer)
        logits = decode(token)


def decoder(
    model: Transformer,
    cache: Cache,
    graph: bool,
    note: Callable[[str], None],
    observer: Observer | None = None,
) -> Callable[[int], Tensor]:
    """What appends a token to the cache's only sequence and gives the next logits, float32 [v]."""
    if graph and can_use_graph(model):
        try:
            captured = DecodeGraph(model, cache, observer=observer)
            note("decoding from a CUDA graph")
            return lambda token: captured.forward([token])[0]
        except CannotAnswer as error:
            note(f"decoding without a CUDA graph: {error}")
    return lambda token: model.forward(cache.step([[token]]), cache, last_only=True)[0]


def can_use_graph(model: Transformer) -> bool:
    """Whether decoding from a CUDA graph makes sense: on a GPU, with a kernel somewhere, unobserved."""
    sites = model.sites.values()
    on_gpu = model.device.type == "cuda"
    kernels = any(site.stamp.implementation != "reference" for site in sites)
    return on_gpu and kernels and all(site.tap is None for site in sites)


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One id from logits [v]. Raises DSV4Error if they are not finite: nothing to choose from."""
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).sum())
        raise DSV4Error(
            f"{bad} of {len(logits)} logits are NaN or infinite",
            "`dsv4-bench tui`, then `break nan > 0` and `continue`, shows where it begins",
            5,
        )
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    weights = ((logits - logits.max()) / temperature).softmax(-1)  # cannot overflow
    return int(torch.multinomial(weights, 1, generator=generator))
