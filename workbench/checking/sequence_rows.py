"""The rows of one sequence at every site of a run, whatever else is in the batch and however it is cut"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.decisions import (
    DECIDERS,
    Choice,
    choice_of,
    differing_rows,
    replayed,
    spread,
)
from dsv4_bench.probes.noise import Noise


def rows_at(site: Site, step: Step, ours: int, count: int, ratio: int) -> slice | None:
    """Which of the `count` rows of an output belong to sequence `ours`; None if rows are no tokens.

    Rows are tokens, or, behind a compressor's pool, the entries that close in this step.
    """
    if site.op in ("gather_swa", "cache_write"):
        return None
    if count == len(step.tokens):
        return step.rows()[ours]
    if ratio:
        closed = [step.entries_of(b, ratio) - s // ratio for b, s in enumerate(step.starts)]
        if count == sum(closed):
            first = sum(closed[:ours])
            return slice(first, first + closed[ours])
    return None


class Rows:
    """A tap's observer that keeps the rows of sequence `ours`, and settles near ties as `base` did.

    `noise`, if given, moves every output first. ties: by site, how far apart scores of a near tie may
    be; inf replays all decisions of `base`.
    """

    def __init__(
        self,
        model: Transformer,
        steps: Sequence[Step],
        ours: int,
        noise: Noise | None = None,
        base: Rows | None = None,
        ties: Mapping[str, float] | None = None,
    ) -> None:
        self.config = model.config
        self.steps = steps
        self.ours = ours
        self.noise = noise
        self.base = base
        self.ties = ties
        self.forget()

    def forget(self) -> None:
        """Drop what was kept: the next part begins."""
        self.kept: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.choices: dict[str, list[Choice]] = defaultdict(list)
        self._calls: Counter[str] = Counter()

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        step = self._step_of(site)
        result = site.run(args)
        if self.noise is not None:
            result = self.noise.moved(site, result)
        named = site.spec.name_outputs(result)
        ratio = 0 if site.layer is None else self.config.ratio(site.layer)
        for name, value in named.items():
            rows = rows_at(site, step, self.ours, len(value), ratio)
            if rows is not None:
                self.kept[site.path][name].append(value[rows].clone())
        if site.op not in DECIDERS:
            return result
        return self._decide(site, args, result, step.rows()[self.ours])

    def _step_of(self, site: Site) -> Step:
        """The step of this call. Behind a pool only steps run that close an entry of some sequence."""
        call = self._calls[site.path]
        self._calls[site.path] += 1
        if "/compressor/" in site.path and site.path.endswith(("/norm", "/rope", "/write")):
            assert site.layer is not None
            ratio = self.config.ratio(site.layer)
            closing = [
                step
                for step in self.steps
                if any(step.entries_of(b, ratio) > s // ratio for b, s in enumerate(step.starts))
            ]
            return closing[call]
        return self.steps[call]

    def _decide(self, site: Site, args: tuple[Any, ...], result: Any, rows: slice) -> Any:
        inputs, outputs = site.spec.bind(args, site.params), site.spec.name_outputs(result)
        choice = choice_of(site, inputs, outputs)
        scores = None if choice.scores is None else choice.scores[rows]
        ours = Choice(choice.chosen[rows], scores, choice.options)
        done = sum(len(kept.chosen) for kept in self.choices[site.path])
        self.choices[site.path].append(ours)
        if self.base is None:
            return result
        theirs = joined([kept.chosen for kept in self.base.choices[site.path]], -1)
        theirs = fitted(theirs[done : done + len(ours.chosen)], ours.chosen.shape[1], -1)
        tie = float("inf") if self.ties is None else self.ties.get(site.path, -1.0)
        settled = differing_rows(ours.chosen, theirs)
        settled &= spread(ours.chosen, theirs, ours.scores) <= tie
        if not bool(settled.any()):
            return result
        mask = torch.zeros(len(choice.chosen), dtype=torch.bool, device=settled.device)
        mask[rows] = settled
        chosen = choice.chosen.clone()
        chosen[rows] = theirs
        return replayed(site, args, result, mask, chosen)


def fitted(value: Tensor, width: int, fill: float) -> Tensor:
    """[n, w] -> [n, width]: columns cut, or filled up with `fill`."""
    missing = width - value.shape[1]
    return F.pad(value, (0, missing), value=fill) if missing > 0 else value[:, :width]


def joined(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Rows one after another; two-dimensional parts of different widths are filled up."""
    widths = {part.shape[1] for part in parts if part.dim() == 2}
    if len(widths) > 1:
        parts = [fitted(part, max(widths), fill) for part in parts]
    return torch.cat(list(parts))


def aligned(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two runs' rows of one output: scores are filled up with -inf, picks with -1."""
    fill = -torch.inf if a[0].is_floating_point() else -1
    x, y = joined(a, fill), joined(b, fill)
    if x.dim() == 2 and x.shape[1] != y.shape[1]:
        width = max(x.shape[1], y.shape[1])
        x, y = fitted(x, width, fill), fitted(y, width, fill)
    return x, y


def aligned_choices(choices: Sequence[Choice]) -> Choice:
    """The choices of all calls as one."""
    chosen = joined([choice.chosen for choice in choices], -1)
    scores = [choice.scores for choice in choices if choice.scores is not None]
    joint = joined(scores, -torch.inf) if scores else None
    return Choice(chosen, joint, max(choice.options for choice in choices))
