"""`check --minimise`: the smallest set of sites whose kernels together break the output

Delta debugging (workbench/checking/ddmin.py) over whole ops first, then over the layers of what is left, then
over single sites. What it finds is 1-minimal: with any one of its sites back on the reference the
output is right. So a fault that needs two kernels is found as that pair.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.probes.capture import Capture
from dsv4_bench.probes.decisions import Record, Replay
from dsv4_bench.probes.noise import HonestErrors, sampled_sites
from dsv4_bench.workbench.checking import layerwise
from dsv4_bench.workbench.checking.calibration import (
    Calibration,
    LogitsError,
    Progress,
    calibrate,
    logits_error,
)
from dsv4_bench.workbench.checking.ddmin import ddmin, expected_trials
from dsv4_bench.workbench.checking.symptoms import LogitsOff, Outcome, Symptom, Top1Changed
from dsv4_bench.workbench.checking.trial_store import TrialStore, run_key
from dsv4_bench.workbench.checking.trials import Sites, Timer, Trials

MAX_SETS = 4  # independent faults looked for, one after another


@dataclass(frozen=True)
class Culprits:
    """A minimal set: on the kernels together its sites break the output.

    subsets: what its parts do, each a set of sites with its outcome. elsewhere: whether further sites of the same
    ops break the output without it. confirmed: whether it broke the output in a run from the start.
    """

    sites: tuple[str, ...]
    ops: tuple[str, ...]
    outcome: Outcome
    subsets: tuple[tuple[tuple[str, ...], Outcome], ...]
    elsewhere: bool
    confirmed: bool

    @property
    def sentence(self) -> str:
        names = _listed(self.sites)
        if len(self.sites) == 1:
            text = f"{names} alone breaks the output: {self.outcome.text}"
        else:
            single = [f"{o.error.error:.1g}" for sites, o in self.subsets if len(sites) == 1]
            alone = f"each alone is fine ({', '.join(single)})"
            if len(self.sites) > 2:
                alone += f", and so are any {len(self.sites) - 1} of them"
            text = f"{names} break the output only together: {self.outcome.text}; {alone}"
        if self.elsewhere:
            text += f"; other sites of {_listed(self.ops)} break it as well"
        return text

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": list(self.sites),
            "ops": list(self.ops),
            "sentence": self.sentence,
            **self.outcome.to_dict(),
            "subsets": [{"sites": list(s), **outcome.to_dict()} for s, outcome in self.subsets],
            "elsewhere": self.elsewhere,
            "confirmed": self.confirmed,
        }


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass
class Minimised:
    """What a search found. `complete` is False when faults beyond MAX_SETS were left alone."""

    symptom: str
    sites: int
    whole: Outcome
    sets: list[Culprits] = field(default_factory=list)
    complete: bool = True
    notes: list[str] = field(default_factory=list)
    trials: int = 0
    stored: int = 0
    seconds: float = 0.0

    @property
    def status(self) -> str:
        return "found" if self.whole.broken else "clean"

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "symptom": self.symptom,
            "candidates": self.sites,
            "whole": self.whole.to_dict(),
            "sets": [culprits.to_dict() for culprits in self.sets],
            "complete": self.complete,
            "notes": self.notes,
            "trials": self.trials,
            "stored": self.stored,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Judge:
    """What trials are judged by: the reference's logits [n, v] and decisions, limits, a symptom."""

    reference: Tensor
    record: Record
    limits: Calibration
    symptom: Symptom

    def observer(self) -> Replay:
        """The tap's observer of a trial."""
        return Replay(self.record, self.limits.ties if self.symptom.settles_ties else -1.0)

    def outcome(self, logits: Tensor, seconds: float) -> Outcome:
        error = logits_error(logits, self.reference, self.limits.logit_move)
        return Outcome(self.symptom.shows(logits, error), error, seconds)


class Minimiser:
    """Searches among `trials.sites` for what breaks the output by `judge`."""

    def __init__(self, trials: Trials, judge: Judge, store: TrialStore, progress: Progress) -> None:
        self.trials = trials
        self.judge = judge
        self.store = store
        self.progress = progress
        self.sites = trials.model.sites
        self._phase = "whole route"
        self._trials_ahead = 0.0
        self._started = time.perf_counter()
        self._tried: set[Sites] = set()
        self._stored: set[Sites] = set()

    def run(self) -> Minimised:
        """Find minimal sets, one for each group of ops at fault."""
        whole = frozenset(self.trials.sites)
        notes = self._check_state(whole)
        result = Minimised(self.judge.symptom.describe(), len(whole), self.outcome(whole))
        rest = whole
        while rest and self.outcome(rest).broken:
            if len(result.sets) == MAX_SETS:
                result.complete = False
                break
            culprits = self._culprits(rest)
            result.sets.append(culprits)
            rest = frozenset(p for p in rest if self.sites[p].op not in culprits.ops)
        if self.store.problem is not None:
            notes.append(f"trials are not kept: {self.store.problem}")
        result.notes = notes
        result.trials, result.stored = len(self._tried), len(self._stored)
        result.seconds = time.perf_counter() - self._started
        self.progress("minimise", 1, 1)
        return result

    # -- one trial

    def outcome(self, on: Sites) -> Outcome:
        """What the sites `on` do: known from before, or tried now."""
        known = self.store.get(on)
        if known is not None:
            if on not in self._tried:
                self._stored.add(on)
            return known
        self._report(on)
        started = time.perf_counter()
        try:
            logits = self.trials.run(on, self.judge.observer())
            outcome = self.judge.outcome(logits, time.perf_counter() - started)
        except DSV4Error:
            raise
        except Exception as error:  # a kernel's: as broken as an output can be
            outcome = _raised(error, len(self.judge.reference), time.perf_counter() - started)
        self._tried.add(on)
        self._trials_ahead = max(self._trials_ahead - 1, 0.0)
        self.store.put(on, outcome)
        return outcome

    def _report(self, on: Sites) -> None:
        spent = time.perf_counter() - self._started
        cost = self.trials.cost(on)
        text = f"minimise {self._phase}: trial {len(self._tried) + 1}, {len(on)} sites on, {cost:.1f} s"
        self.progress(text, spent, spent + cost * (1 + self._trials_ahead))

    def _check_state(self, whole: Sites) -> list[str]:
        """Trust snapshots only if the whole route gives the same bits in the usual order."""
        self._report(whole)
        timer = Timer(self.judge.observer())
        try:
            plain = self.trials.run_plainly(whole, timer)
            self.trials.kernel_seconds = timer.seconds
            if _same_bits(self.trials.run(whole, self.judge.observer()), plain):
                return []
            self.trials.reuse = False
            again = self.trials.run_plainly(whole, self.judge.observer())
        except DSV4Error:
            raise
        except Exception as error:
            return [f"the route raises {type(error).__name__}: {error}"]
        if _same_bits(again, plain):
            return [
                "kernels carry state from one layer to another: every trial runs from the start"
            ]
        return ["two runs of the route give different bits: a trial may not repeat"]

    # -- the search

    def _culprits(self, candidates: Sites) -> Culprits:
        found = self.minimal(candidates)
        sites = tuple(path for path in self.sites if path in found)
        ops = tuple(dict.fromkeys(self.sites[path].op for path in sites))
        self._phase, self._trials_ahead = "evidence", 2.0 ** min(len(sites), 3) - 1
        sizes = range(1, len(sites)) if len(sites) <= 3 else (1, len(sites) - 1)
        subsets = tuple(
            (subset, self.outcome(frozenset(subset)))
            for size in sizes
            for subset in itertools.combinations(sites, size)
        )
        family = frozenset(p for p in candidates if self.sites[p].op in ops) - found
        elsewhere = bool(family) and self.outcome(family).broken
        return Culprits(sites, ops, self.outcome(found), subsets, elsewhere, self._confirmed(found))

    def _confirmed(self, found: Sites) -> bool:
        try:
            logits = self.trials.run_plainly(found, self.judge.observer())
        except Exception:
            return self.outcome(found).raised != ""
        return self.judge.outcome(logits, 0.0).broken

    def minimal(self, candidates: Sites) -> Sites:
        """A 1-minimal part of `candidates`, which break the output together."""
        left = candidates
        phases: list[tuple[str, Callable[[str], Any]]] = [
            ("by op", lambda path: self.sites[path].op),
            ("by layer", lambda path: self.trials.part[path]),
            ("by site", lambda path: path),
        ]
        for number, (name, group) in enumerate(phases):
            units: dict[Any, set[str]] = {}
            for path in self.sites:
                if path in left:
                    units.setdefault(group(path), set()).add(path)
            later = len(phases) - number - 1
            self._phase = name
            self._trials_ahead = expected_trials(len(units)) + later * expected_trials(
                self.trials.parts
            )
            left = self._reduce([frozenset(unit) for unit in units.values()])
        return left

    def _reduce(self, units: list[Sites]) -> Sites:
        def union(some: list[Sites]) -> Sites:
            return frozenset().union(*some)

        minimal = ddmin(
            units,
            lambda some: self.outcome(union(some)).broken,
            lambda some: -self.trials.first_part(union(some)),  # late parts are cheap
        )
        return union(minimal)


def _raised(error: Exception, positions: int, seconds: float) -> Outcome:
    off = LogitsError(math.inf, math.inf, positions, positions)
    return Outcome(True, off, seconds, f"{type(error).__name__}: {error}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


# ------------------------------------------------------------------------------ the whole command


@torch.inference_mode()
def minimise(
    trials: Trials,
    symptom: Symptom | str = "logits",
    folder: Path | None = None,
    progress: Progress = lambda text, done, total: None,
    fresh: bool = False,
) -> Minimised:
    """Find the smallest sets of sites of `trials` that show `symptom`: ``logits``, ``top1`` or another.

    Trials are kept below `folder`; `fresh` forgets those of before. The model's route is as before
    afterwards. Raises CannotAnswer if there is nothing to search, or the reference shows it too.
    """
    if not trials.sites:
        raise CannotAnswer(
            "nothing to minimise: the route uses the reference everywhere", "--route kernel"
        )
    with layerwise.kept_route(trials.model):
        named = symptom if isinstance(symptom, str) else symptom.describe()
        key = run_key(trials.model, trials.kernels, trials.steps, named)
        store = TrialStore(folder / key if folder else None)
        if fresh:
            store.clear()
        judge = _judge(trials, symptom, store, progress)
        shown = judge.outcome(judge.reference, 0.0)
        if shown.broken:
            raise CannotAnswer(
                f"the reference shows the symptom too: {judge.symptom.describe()}",
                "then no set of kernels is at fault; choose another text or prompt",
            )
        return Minimiser(trials, judge, store, progress).run()


def _judge(trials: Trials, symptom: Symptom | str, store: TrialStore, progress: Progress) -> Judge:
    """Run the reference, and calibrate where the symptom needs limits."""
    model = trials.model
    progress("minimise: reference", 0, 1)
    sampled = sampled_sites(model.sites.values())
    capture = Capture(lambda site: site.path in sampled)
    record = Record(capture)
    timer = Timer(record)
    reference = trials.run(frozenset(), timer)
    trials.reference_seconds = timer.seconds
    if not isinstance(symptom, str):
        return Judge(reference, record, Calibration(0.0, 0.0, 0.0, {}), symptom)
    limits = store.calibration()
    if limits is None:
        errors = HonestErrors()
        for call in capture.calls:
            errors.learn(call)
        capture.calls.clear()
        limits = calibrate(model, trials.steps, reference, record, errors.amplitudes, progress)
        store.keep_calibration(limits)
    chosen: Symptom = Top1Changed() if symptom == "top1" else LogitsOff(limits)
    return Judge(reference, record, limits, chosen)
