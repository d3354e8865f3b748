"""KL of the logits split into arithmetic and flipped decisions, beside a check or on its own

The route runs twice more beside the reference, part by part: once as it is, once with the reference's
decisions replayed. See probes/decisions.py for what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation
from dsv4_bench.engine.step import Step
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.decisions import KLMeter, Record, Replay
from dsv4_bench.workbench.checking import layerwise
from dsv4_bench.workbench.checking.baseline import Baseline, Piece
from dsv4_bench.workbench.checking.calibration import tapped

_PASS_TOKENS = 12  # tokens whose check takes as long as what a forward pass costs by itself


class _Follower:
    """One more run of the route, in step with the reference's pieces."""

    def __init__(self, model: Transformer, tolerance: float) -> None:
        self.model = model
        self.replay = Replay(Record(), tolerance)
        self.cache: Cache = model.new_cache()
        self.step: Step | None = None
        self.x = torch.empty(0)

    def run(self, piece: Piece, record: Record) -> Tensor:
        if piece.begins:
            self.cache = self.model.new_cache(len(piece.tokens))
        if piece.name == "embed":
            self.step = self.cache.step(piece.tokens)
        assert self.step is not None
        self.replay.follow(record)
        with tapped(self.model, self.replay):
            self.x = piece.part(self.x, self.cache, nvtx.begin(self.step))
        if piece.ends:
            self.cache.advance(self.step)
        return self.x


class SplitBaseline(Baseline):
    """A reference run for `Checker.against` that splits the KL of route `chosen` on its way.

    `problem` says why there is no split: an implementation raised, as a check will report.
    """

    def __init__(
        self,
        model: Transformer,
        tokens: Sequence[int],
        chunks: Sequence[int],
        chosen: Mapping[str, Implementation],
    ) -> None:
        super().__init__(model, tokens, chunks, keep=False)
        self.chosen = chosen
        self.meter = KLMeter()
        self.problem = ""
        self._free = _Follower(model, -1.0)
        self._replayed = _Follower(model, float("inf"))
        self._calls = len(self.scenarios[0].steps())  # of the tokens given; not of the extra batch

    def work_before(self) -> list[float]:
        """How much of the check is done before each piece, and after the last: for a progress that
        knows what is left. A forward pass costs as much as its tokens, and something by itself."""
        parts, done = len(self.model.layers) + 2, [0.0]
        for scenario in self.scenarios:
            for pieces in scenario.steps():
                cost = _PASS_TOKENS + sum(len(piece) for piece in pieces)
                done += [done[-1] + cost * (part + 1) / parts for part in range(parts)]
        return done

    def pieces(self) -> Iterator[Piece]:
        for piece in super().pieces():
            if piece.forward < self._calls and not self.problem:
                try:
                    self._follow(piece)
                except Exception as error:  # of somebody's kernel: it may raise anything
                    self.problem = f"{type(error).__name__}: {error}"
            yield piece

    def _follow(self, piece: Piece) -> None:
        record = Record.of(piece.calls)
        layerwise.use(self.model, self.chosen)
        free = self._free.run(piece, record)
        replayed = self._replayed.run(piece, record)
        if piece.ends:
            self.meter.add(piece.x, free, replayed)

    def to_dict(self) -> dict[str, Any]:
        """`kl` and `decisions` for the report; `kl` is None, with `kl_problem`, where there is none.

        Decisions are those of the replayed run, so that no flip is the consequence of another;
        `flipped_unreplayed` counts the flips of the run without replay.
        """
        if self.problem:
            return {"kl": None, "kl_problem": self.problem, "decisions": []}
        free = self._free.replay.flips
        rows = [
            {**flips.to_dict(), "flipped_unreplayed": free[path].flipped}
            for path, flips in self._replayed.replay.flips.items()
        ]
        return {"kl": self.meter.split().to_dict(), "kl_problem": "", "decisions": rows}
