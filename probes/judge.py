"""Own error in passing: an op's outputs against the reference's, under limits that calibrate themselves

A comparison costs one run of the reference; calibrating costs two more in float64. So the limits of
an op are learnt from its first few calls, and after that float64 is asked only where a comparison
breaks its limit: that call adds its evidence, and the error against float64 decides.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.compare import Comparison, compare
from dsv4_bench.probes.limits import Limits, judged, move_inputs
from dsv4_bench.probes.signatures import Difference, Signature, classify

_SAMPLES = 2  # calls of an op that its limits are learnt from


@dataclass(frozen=True)
class Judgement:
    """The worst output of an op, and what kind of wrong it is if it is over its limit."""

    comparison: Comparison
    signature: Signature | None = None


class Judge:
    """Limits of one run, and what they cost: `calls` in float64 that took `seconds`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.limits = Limits(dtype)
        self.seconds = 0.0
        self.calls = 0
        self._learnt: Counter[str] = Counter()

    def judge(
        self, call: Captured, ours: dict[str, Tensor], positions: Sequence[int] = ()
    ) -> Judgement | None:
        """`ours` against the reference's outputs, which `call` holds; None without an output.

        `positions` are those of the call's tokens, for the signature.
        """
        truth: dict[str, Tensor] | None = None
        if self._learnt[call.site.op] < _SAMPLES:
            truth = self._learn(call)
        found = self._worst(call, ours, call.outputs, "reference")
        if found is None or found.verdict == "ok":
            return None if found is None else Judgement(found)
        if truth is None:
            truth = self._learn(call)
        found = self._worst(call, ours, truth, "float64") or found
        if found.verdict == "ok":
            return Judgement(found)
        return Judgement(found, self._classify(found, ours, truth, positions))

    def _learn(self, call: Captured) -> dict[str, Tensor]:
        """The float64 truth of `call`, its evidence added to the limits."""
        started = time.perf_counter()
        truth = call.oracle()
        self._learnt[call.site.op] += 1
        first = self._learnt[call.site.op] <= _SAMPLES  # noise hardly varies
        noisy = call.oracle(**move_inputs(call, self.limits.dtype)) if first else None
        self.limits.learn(call, truth, noisy)
        self.calls += 1 + first
        self.seconds += time.perf_counter() - started
        return truth

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

    def _classify(
        self,
        found: Comparison,
        ours: dict[str, Tensor],
        truth: dict[str, Tensor],
        positions: Sequence[int],
    ) -> Signature:
        value, exact = ours[found.output], truth[found.output]
        if value.shape != exact.shape:
            text = f"{found.output} is {list(value.shape)}, should be {list(exact.shape)}"
            return Signature("unexplained", text)
        if not exact.is_floating_point():
            share, row = found.relative_l2, found.coordinate[0]
            text = f"{found.output} picks another set in {share:.1%} of the rows, first row {row}"
            return Signature("decision_flip", text)
        rows = torch.tensor(positions) if len(positions) == len(exact) else None
        return classify(Difference(found.output, value.double(), exact.double(), found.limit, rows))
