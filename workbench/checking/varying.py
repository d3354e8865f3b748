"""`check --vary`: what changes the bits of a route although it should not matter, where, and by how much

The same tokens run again, repeated, cut into other chunks, beside other sequences, with other thread
counts. All runs go side by side, layer by layer, and the rows of the tokens are compared with the
first run's at every site. Bits may differ within rounding: a matrix product of other row
counts adds in another order. How far rounding goes is measured: on the reference, by runs with noise
of the size of its own error (probes/noise.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.engine.generate import split
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.capture import Capture
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.decisions import differing_rows, row_moves, spread
from dsv4_bench.probes.metrics import masks_differ, tensor_and_row_error
from dsv4_bench.probes.noise import HonestErrors, Noise, sampled_sites
from dsv4_bench.workbench.checking import layerwise
from dsv4_bench.workbench.checking.calibration import MARGIN, Progress, tapped
from dsv4_bench.workbench.checking.layerwise import Chosen, Streams
from dsv4_bench.workbench.checking.sequence_rows import Rows, aligned, aligned_choices, fitted

_NOISE_RUNS = 2
_LONGER = 37  # tokens that the longer companion has more


@dataclass(frozen=True)
class Variation:
    """One way to run the same tokens: they are sequence `ours` of `sequences`."""

    variable: str
    label: str
    sequences: tuple[tuple[int, ...], ...]
    chunks: tuple[tuple[int, ...], ...]
    ours: int = 0
    threads: int | None = None


def standard_variations(
    tokens: Sequence[int], chunks: Sequence[int], repeats: int = 2
) -> list[Variation]:
    """The first is the base: `tokens` alone in `chunks`. Every other one changes one variable."""
    ours, count = tuple(tokens), len(tokens)
    sizes = tuple(stop - start for start, stop in split(count, chunks))
    base = Variation("base", "", (ours,), (sizes,))
    found = [base]
    found += [
        Variation("repeat", f"run {number + 2}", (ours,), (sizes,)) for number in range(repeats)
    ]
    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2
    label = f"{threads} -> {other} threads"
    found.append(Variation("threads", label, (ours,), (sizes,), threads=other))
    pieces = {
        "one piece": (count,),
        "pieces of 64": (64,),
        "8 decode steps at the end": (count - 8, 1) if count > 8 else (1,),
    }
    seen = [split(count, sizes)]
    for label, piece in pieces.items():
        if split(count, piece) not in seen:
            seen.append(split(count, piece))
            found.append(Variation("chunks", label, (ours,), (piece,)))
    found.append(Variation("batch", "4 copies", (ours,) * 4, (sizes,) * 4, ours=2))
    short = tuple(reversed(ours))[: len(sizes)]
    longer = (ours * 2)[count // 2 : count // 2 + count] + ours[:_LONGER]
    longer = longer[: count + _LONGER]
    more = len(longer) - count
    for label, neighbour, cut, first in (
        (f"a sequence of {len(short)} after it", short, (1,) * len(sizes), False),
        (f"a sequence of {len(longer)} before it", longer, (sizes[0] + more, *sizes[1:]), True),
    ):
        both = (neighbour, ours) if first else (ours, neighbour)
        cuts = (cut, sizes) if first else (sizes, cut)
        found.append(Variation("companions", label, both, cuts, ours=int(first)))
    return found


# ------------------------------------------------------------------------------ what changed


@dataclass(frozen=True)
class Change:
    """How one output at one site differs from the base run's, against what rounding does there."""

    site: str
    output: str
    error: float
    limit: float
    over: bool

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Effect:
    """What one variation did. verdict: same (bits), rounding, over (beyond what rounding does)."""

    variable: str
    label: str
    first: Change | None = None
    first_over: Change | None = None
    logits: Change | None = None
    raised: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        if self.raised or self.first_over:
            return "over"
        return "rounding" if self.first else "same"

    @property
    def sentence(self) -> str:
        what = f"{self.variable} ({self.label})"
        if self.raised:
            return f"{what}: raises {self.raised}"
        if self.first is None:
            return f"{what}: the same bits everywhere"
        if self.first_over is not None:
            over = self.first_over
            return f"{what}: {over.site} {over.output} differs by {over.error:.2g}, rounding explains {over.limit:.2g}"
        where = f"{what}: bits differ from {self.first.site} on, within rounding"
        if self.variable in ("repeat", "threads"):
            return f"{where}; the order of its sums is not fixed"
        return f"{where}; other row counts take other orders of summation"

    def to_dict(self) -> dict[str, Any]:
        changes = {
            name: change.to_dict() if change else None
            for name, change in (
                ("first", self.first),
                ("first_over", self.first_over),
                ("logits", self.logits),
            )
        }
        return {
            "variable": self.variable,
            "label": self.label,
            "verdict": self.verdict,
            "sentence": self.sentence,
            **changes,
            "raised": self.raised,
            "seconds": self.seconds,
        }


@dataclass
class Varied:
    """All variations of one route."""

    effects: list[Effect] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        return "found" if any(effect.verdict == "over" for effect in self.effects) else "clean"

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "variations": [effect.to_dict() for effect in self.effects],
            "seconds": self.seconds,
        }


class _Run:
    """One variation on its way through the parts."""

    def __init__(
        self,
        model: Transformer,
        chosen: Chosen,
        variation: Variation,
        make: Callable[[Sequence[Step]], Rows],
    ) -> None:
        self.model = model
        self.chosen = chosen
        self.variation = variation
        self.steps = layerwise.forward_calls(model, variation.sequences, variation.chunks)
        self.rows = make(self.steps)
        self.streams: Streams = []
        self.effect = Effect(variation.variable, variation.label)

    def part(self, part: int) -> None:
        started = time.perf_counter()
        self.rows.forget()
        layerwise.use(self.model, self.chosen)
        with _threads(self.variation.threads), tapped(self.model, self.rows):
            self.streams = layerwise.run_part(self.model, part, self.streams, self.steps)
        self.effect.seconds += time.perf_counter() - started


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Moves = dict[
    tuple[str, str], tuple[float, float]
]  # (site, output): of the tensor, of the worst row


class Varying:
    """Runs variations of the model's present route side by side; the first one is the base."""

    def __init__(
        self, model: Transformer, variations: Sequence[Variation], progress: Progress
    ) -> None:
        self.model = model
        self.variations = variations
        self.progress = progress
        self.chosen = {path: site.impl for path, site in model.sites.items()}
        self.references = layerwise.references(model)
        self.moves: Moves = {}
        self.ties: dict[str, float] = {}

    @torch.inference_mode()
    def run(self) -> Varied:
        """Raises DSV4Error with exit code 5 if an implementation fails in the base run."""
        started = time.perf_counter()
        model, first = self.model, self.variations[0]
        errors = self._honest_errors(first)

        def plain(steps: Sequence[Step]) -> Rows:
            return Rows(model, steps, first.ours)

        right = _Run(model, self.references, first, plain)
        noises = [
            _Run(model, self.references, first, self._noisy(errors, seed, right))
            for seed in range(_NOISE_RUNS)
        ]
        base = _Run(model, self.chosen, first, plain)
        runs = [_Run(model, self.chosen, v, self._settled(v, base)) for v in self.variations[1:]]
        names = layerwise.part_names(model)
        for part, name in enumerate(names):
            self.progress(f"vary {name}, {len(runs)} variations", part, len(names))
            right.part(part)
            for noise in noises:
                noise.part(part)
                self._learn(right.rows, noise.rows)
            self._base_part(base, part)
            for run in runs:
                self._advance(run, part, base)
        self.progress("vary", len(names), len(names))
        return Varied([run.effect for run in runs], time.perf_counter() - started)

    def _base_part(self, base: _Run, part: int) -> None:
        try:
            base.part(part)
        except DSV4Error:
            raise
        except Exception as error:
            raise DSV4Error(
                f"the route raises {type(error).__name__}: {error}",
                "`dsv4-bench check` names the site",
                ExitCode.CRASHED,
            ) from error

    def _honest_errors(self, first: Variation) -> HonestErrors:
        model = self.model
        sampled = sampled_sites(model.sites.values())
        capture = Capture(lambda site: site.path in sampled)
        steps = layerwise.forward_calls(model, first.sequences, first.chunks)
        self.progress("vary: reference", 0, 1)
        layerwise.use(model, self.references)
        with tapped(model, capture):
            layerwise.run(model, steps)
        errors = HonestErrors()
        for call in capture.calls:
            errors.learn(call)
        return errors

    def _noisy(
        self, errors: HonestErrors, seed: int, right: _Run
    ) -> Callable[[Sequence[Step]], Rows]:
        noise = Noise(errors.amplitudes, seed)
        return lambda steps: Rows(self.model, steps, right.variation.ours, noise, right.rows)

    def _settled(self, variation: Variation, base: _Run) -> Callable[[Sequence[Step]], Rows]:
        return lambda steps: Rows(self.model, steps, variation.ours, base=base.rows, ties=self.ties)

    # -- one part

    def _learn(self, base: Rows, noise: Rows) -> None:
        """How far noise moves every output, and the scores of decisions."""
        for path, outputs in base.kept.items():
            for name, values in outputs.items():
                a, b = aligned(noise.kept[path][name], values)
                if a.is_floating_point():
                    moved, before = tensor_and_row_error(a, b), self.moves.get((path, name), (0, 0))
                    self.moves[path, name] = (max(moved[0], before[0]), max(moved[1], before[1]))
        for path, choices in base.choices.items():
            pairs = zip(choices, noise.choices[path], strict=True)
            rows = [
                row_moves(n.scores, b.scores)
                for b, n in pairs
                if b.scores is not None and n.scores is not None
            ]
            if rows and len(torch.cat(rows)):
                # Two scores may each move by MARGIN times what is typical, in opposite directions.
                tie = 2 * MARGIN * float(torch.cat(rows).median())
                self.ties[path] = max(tie, self.ties.get(path, 0.0))

    def _advance(self, run: _Run, part: int, base: _Run) -> None:
        effect = run.effect
        if effect.raised:
            return
        try:
            run.part(part)
        except DSV4Error:
            raise
        except Exception as error:  # of somebody's kernel: it may raise anything
            effect.raised = f"{type(error).__name__}: {error}"
            return
        for path in self.model.sites:
            for name in base.rows.kept.get(path, {}):
                change = self._change(path, name, base.rows, run.rows)
                if change is None:
                    continue
                effect.first = effect.first or change
                if change.over:
                    effect.first_over = effect.first_over or change
                if path == "head/logits":
                    effect.logits = change

    def _change(self, path: str, name: str, base: Rows, rows: Rows) -> Change | None:
        """None where all bits are the same."""
        ours = rows.kept[path][name]
        if not ours:
            return Change(path, name, float("inf"), 0.0, True)
        a, b = aligned(ours, base.kept[path][name])
        if bits_equal(a, b):
            return None
        if not a.is_floating_point():
            if path in base.choices:
                return self._flips(path, name, base, rows)
            return Change(path, name, float((a != b).double().mean()), 0.0, True)
        error, row_error = tensor_and_row_error(a, b)
        limit, row_limit = (MARGIN * moved for moved in self.moves.get((path, name), (0.0, 0.0)))
        over = error > limit or row_error > row_limit or bool(masks_differ(a, b).any())
        return Change(path, name, error, limit, over)

    def _flips(self, path: str, name: str, base: Rows, rows: Rows) -> Change | None:
        """Picks that differ as sets, near ties apart; their order alone is no difference."""
        ours, theirs = (aligned_choices(r.choices[path]) for r in (rows, base))
        width = max(ours.chosen.shape[1], theirs.chosen.shape[1])
        a, b = (fitted(c.chosen, width, -1) for c in (ours, theirs))
        differ = differing_rows(a, b)
        beyond = differ & ~(spread(a, b, ours.scores) <= self.ties.get(path, -1.0))
        share = float(differ.double().mean())
        return Change(path, name, share, 0.0, bool(beyond.any())) if share else None


def vary(
    model: Transformer,
    variations: Sequence[Variation],
    progress: Progress = lambda text, done, total: None,
) -> Varied:
    """Run `variations` of the model's present route; its route and stamps are as before afterwards."""
    with layerwise.kept_route(model):
        return Varying(model, variations, progress).run()
