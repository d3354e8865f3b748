"""The reference run that a route is checked against, part by part; kept, it serves many routes"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import split
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS
from dsv4_bench.engine.step import Step
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.probes.limits import Limits
from dsv4_bench.probes.tap import set_taps

Part = Callable[[Tensor, Cache, Step], Tensor]
_PAIR = (11, 6)  # lengths of the second scenario's two sequences


@dataclass
class Piece:
    """One part of one forward pass (embedding, a layer, the head) as the reference ran it."""

    forward: int
    name: str
    part: Part
    tokens: list[list[int]]  # what this forward pass appends, a list a sequence
    positions: Tensor
    calls: list[Captured]
    x: Tensor  # what the part returned
    scenario: int = 0
    begins: bool = False  # the scenario starts here, with an empty cache
    ends: bool = False  # the forward pass is complete
    last: bool = False  # and with it the scenario


@dataclass(frozen=True)
class Scenario:
    """Sequences that run together, and in which pieces; shorter ones have a shorter first piece."""

    sequences: tuple[tuple[int, ...], ...]
    chunks: tuple[int, ...]

    def steps(self) -> list[list[list[int]]]:
        """For each forward pass what every sequence brings. Raises DSV4Error for a too short one."""
        longest = max(len(tokens) for tokens in self.sequences)
        passes = []
        for start, stop in split(longest, self.chunks):
            pieces = []
            for tokens in self.sequences:
                behind = longest - len(tokens)
                pieces.append(list(tokens[max(start - behind, 0) : max(stop - behind, 0)]))
            passes.append(pieces)
        if any(not piece for piece in passes[0]):
            raise DSV4Error(
                f"sequences of {[len(t) for t in self.sequences]} tokens do not fit chunks {self.chunks}",
                "the first chunk must be longer than the difference in length",
            )
        return passes


def pair_of(tokens: Sequence[int]) -> Scenario | None:
    """Two short sequences out of `tokens`, in one batch: kernels that mix up sequences show here.

    None if there are too few tokens.
    """
    first, second = _PAIR
    if len(tokens) < first + second:
        return None
    sequences = (tuple(tokens[:first]), tuple(tokens[first : first + second]))
    return Scenario(sequences, (first - 2, 1, 1))


class Baseline:
    """The reference's run of `model` over `tokens` fed in `chunks`, with float64 truths and limits.

    `tokens` is one sequence, or several that run as one batch. `pair` adds a short batch of two
    sequences at the end. With `keep` (the default) what was computed stays in memory for the next
    route; without, each part is dropped once it was looked at.
    """

    def __init__(
        self,
        model: Transformer,
        tokens: Sequence[int] | Sequence[Sequence[int]],
        chunks: Sequence[int] = (),
        *,
        keep: bool = True,
        pair: bool = True,
    ) -> None:
        self.model = model
        self.keep = keep
        self.limits = Limits(model.dtype)
        sequences = [tokens] if not tokens or isinstance(tokens[0], int) else tokens
        main = Scenario(tuple(tuple(t) for t in sequences), tuple(chunks))  # type: ignore[arg-type]
        extra = pair_of(main.sequences[0]) if pair and len(sequences) == 1 else None
        self.scenarios = [main] if extra is None else [main, extra]
        self._kept: list[Piece] | None = None

    def pieces(self) -> Iterator[Piece]:
        """Every part of every forward pass, in order; the model's sites are left on the reference."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for piece in self._run():
            if self.keep:
                kept.append(piece)
            yield piece
        if self.keep:
            self._kept = kept

    @property
    def count(self) -> int:
        """How many pieces there are."""
        parts = len(self.model.layers) + 2
        return parts * sum(len(scenario.steps()) for scenario in self.scenarios)

    def _run(self) -> Iterator[Piece]:
        forward = 0
        parts = parts_of(self.model)
        for index, scenario in enumerate(self.scenarios):
            passes = scenario.steps()
            cache = self.model.new_cache(len(scenario.sequences))
            for number, tokens in enumerate(passes):
                step = cache.step(tokens)
                x = torch.empty(0)
                for name, part in parts:
                    x, calls = self._capture(part, x, cache, step)
                    begins, ends = name == parts[0][0], name == parts[-1][0]
                    yield Piece(
                        forward, name, part, tokens, step.positions, calls, x, index,
                        begins and number == 0, ends, ends and number == len(passes) - 1,
                    )  # fmt: skip
                cache.advance(step)
                forward += 1

    def _capture(
        self, part: Part, x: Tensor, cache: Cache, step: Step
    ) -> tuple[Tensor, list[Captured]]:
        sites = self.model.sites.values()
        for site in sites:
            reference = IMPLEMENTATIONS[site.op]["reference"]
            if site.impl is not reference:
                site.use(reference)
        capture = Capture()
        set_taps(sites, capture)
        try:
            return part(x, cache, nvtx.begin(step)), capture.calls
        finally:
            set_taps(sites, None)


def parts_of(model: Transformer) -> list[tuple[str, Part]]:
    """The forward pass in parts that can be run one at a time, in order."""

    def layer(index: int) -> Part:
        return lambda x, cache, step: model.layers[index](x, cache.layers[index], step)

    return [
        ("embed", lambda x, cache, step: model.embed(step.tokens)),
        *((f"L{index}", layer(index)) for index in range(len(model.layers))),
        ("head", lambda x, cache, step: model.head(x)),
    ]


def default_chunks(tokens: int) -> tuple[int, ...]:
    """Pieces that meet every mode of the engine: a prefill up to just before a window of 128 closes,
    five decode steps across it, a prefill on a filled cache (if tokens are left), a decode step.

    Fewer than 9 tokens: a prefill and one decode step.
    """
    if tokens < 9:
        return (tokens - 1, 1) if tokens > 1 else (tokens,)
    boundary = (tokens - 2) // 128 * 128
    first = boundary - 2 if boundary else max(tokens // 2, tokens - 12)
    rest = tokens - first - 5 - 1
    return (first, 1, 1, 1, 1, 1, *((rest,) if rest > 0 else ()), 1)
