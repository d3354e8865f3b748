"""Own error in passing: an op's outputs against the reference's, under limits that calibrate themselves

A comparison costs one run of the reference; calibrating costs two more in float64. So the limits of
an op are learnt from its first few calls, and after that float64 is asked only where a comparison
breaks its limit: that call adds its evidence, and the judgement that `check` would give decides.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.compare import Comparison, compare
from dsv4_bench.probes.diagnosis import Diagnosis, History
from dsv4_bench.probes.limits import Limits, judged, move_inputs
from dsv4_bench.probes.signatures import Signature
from dsv4_bench.probes.verdicts import Broken, Verdict, broken_contract, judge_values

_SAMPLES = 2  # calls of an op that its limits are learnt from
_HISTORY_BYTES = 64 << 20  # of earlier outputs, in which a stale one is looked up


@dataclass(frozen=True)
class Judgement:
    """The worst output of an op, and what kind of wrong it is if it is over its limit."""

    comparison: Comparison
    signature: Signature | None = None


class Judge:
    """Limits of one run, and what they cost: `calls` in float64 that took `seconds`."""

    def __init__(self, dtype: torch.dtype, config: Config | None = None) -> None:
        self.limits = Limits(dtype)
        self.seconds = 0.0
        self.calls = 0
        self._learnt: Counter[str] = Counter()
        self._diagnosis = Diagnosis(self.limits, config)
        self._history = History(_HISTORY_BYTES)
        self._seen: set[tuple[str, int]] = set()  # calls whose outputs went into the history

    def judge(
        self,
        call: Captured,
        ours: dict[str, Tensor],
        positions: Tensor | None = None,
        forward: int = 0,
    ) -> Judgement | None:
        """`ours` against the reference's outputs, which `call` holds; None without an output.

        `positions` [n] are those of the tokens in forward pass `forward`, for the signature.
        """
        learnt = self._learnt[call.site.op] < _SAMPLES
        if learnt:
            self._learn(call)
        again = (call.site.path, forward) in self._seen  # equal to its earlier self: not stale
        self._diagnosis.history = History() if again else self._history
        found = self._worst(call, ours, call.outputs, "reference")
        broken = broken_contract(call, ours)
        judgement = Judgement(found) if found is not None else None
        if broken or (found is not None and found.verdict == "over"):
            if not learnt:
                self._learn(call)
            judgement = self._decide(call, ours, broken, found, positions)
        if not again:
            returned = {n: v for n, v in ours.items() if n not in call.site.spec.mutates}
            self._history.add(call, returned, forward)
            self._seen.add((call.site.path, forward))
        return judgement

    def _learn(self, call: Captured) -> None:
        """Add the evidence of `call` to the limits."""
        started = time.perf_counter()
        truth = call.truth
        self._learnt[call.site.op] += 1
        first = self._learnt[call.site.op] <= _SAMPLES  # noise hardly varies
        noisy = call.oracle(**move_inputs(call, self.limits.dtype)) if first else None
        self.limits.learn(call, truth, noisy)
        self.calls += 1 + first
        self.seconds += time.perf_counter() - started

    def _worst(
        self, call: Captured, ours: dict[str, Tensor], theirs: dict[str, Tensor], against: str
    ) -> Comparison | None:
        found = []
        for name, value in theirs.items():
            discrete = name in call.site.spec.discrete
            if name in ours and (discrete or judged(call, name, value)):
                limits = self.limits.of(call.site.op, name)
                found.append(compare(name, ours[name], value, *limits, discrete, against))
        return max(found, key=lambda c: (c.times, c.relative_l2), default=None)

    def _decide(
        self,
        call: Captured,
        ours: dict[str, Tensor],
        broken: list[Broken],
        found: Comparison | None,
        positions: Tensor | None,
    ) -> Judgement:
        """What float64 says about outputs that are not the reference's."""
        verdict = Verdict(ours, broken)
        if not broken:
            verdict = judge_values(call, ours, call.truth, self.limits)
            found = self._worst(call, ours, call.truth, "float64") or found
        if not verdict.broken:
            assert found is not None
            if found.verdict == "over":  # another choice where scores tie, or another order
                found = replace(found, relative_l2=0.0, row_error=0.0, note="as good a choice")
            return Judgement(found)
        worst = verdict.broken[0]
        if found is None or found.verdict == "ok":
            found = _without_values(worst)
        return Judgement(found, self._diagnosis.name(call, verdict, worst, positions))


def _without_values(broken: Broken) -> Comparison:
    """A comparison of outputs that cannot be compared."""
    error = broken.error
    return Comparison(broken.output, error, error, error, [], 0, 0, False, False, broken.limit)
