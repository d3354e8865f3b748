"""From wrong outputs to one sentence: memory, staleness, what was computed instead, where it is wrong

The order, first match wins: what cannot be compared (raised, wrong shape); the same numbers as an
earlier output (`stale`); bits that change between runs; a signature that explains every value; the
op with one thing changed (probes/hypotheses); the places that are wrong.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.hypotheses import Explanation, explain
from dsv4_bench.probes.limits import Limits, judged
from dsv4_bench.probes.metrics import masks_differ, relative_error, rows_of
from dsv4_bench.probes.signatures import Difference, Signature, loose, sharp, words_for_rows
from dsv4_bench.probes.verdicts import Broken, Verdict, in_one_order

_ATTEMPTS = 2  # hypotheses are tried for so many unexplained findings of an op
_HISTORY_BYTES = 256 << 20
_STALE_ROWS = 16  # wrong rows that are looked up in earlier outputs


@dataclass(frozen=True)
class Remembered:
    """One earlier output, with words for where it came from; `right` if the reference made it."""

    site: str
    op: str
    output: str
    right: bool
    label: str
    value: Tensor


class History:
    """Outputs seen lately, up to a number of bytes; the oldest are forgotten first."""

    def __init__(self, limit: int = _HISTORY_BYTES) -> None:
        self.limit = limit
        self.used = 0
        self._entries: deque[Remembered] = deque()

    def add(self, call: Captured, outputs: dict[str, Tensor], forward: int) -> None:
        right = outputs is call.outputs
        for name, value in outputs.items():
            if not isinstance(value, Tensor) or value.nbytes > self.limit // 16:
                continue
            label = f"{name} of {call.site.path} in pass {forward}"
            path, op = call.site.path, call.site.op
            self._entries.append(Remembered(path, op, name, right, label, value))
            self.used += value.nbytes
        while self.used > self.limit:
            self.used -= self._entries.popleft().value.nbytes

    def of(self, op: str, output: str) -> list[Remembered]:
        """Earlier values of this output in any shape, newest first."""
        return [e for e in reversed(self._entries) if (e.op, e.output) == (op, output)]

    def like(self, op: str, output: str, value: Tensor) -> list[Remembered]:
        """Earlier values of this output, newest first."""
        return [e for e in self.of(op, output) if e.value.shape == value.shape]


class Diagnosis:
    """Names what is wrong in one run; learns which hypotheses fit, so that later ones are quick."""

    def __init__(self, limits: Limits, config: Config | None) -> None:
        self.limits = limits
        self.config = config
        self.history = History()
        self._attempts: Counter[tuple[str, str | None]] = Counter()
        self._known: dict[str, Explanation] = {}

    def name(
        self, call: Captured, verdict: Verdict, broken: Broken, positions: Tensor | None
    ) -> Signature:
        """What is wrong with one broken output of a call."""
        values = verdict.outputs
        name = broken.output
        given = broken.signature
        comparable = name in values and name in call.truth and broken.error != float("inf")
        if given is not None and given.kind == "nondeterministic":
            return self._stale(call, name, values) or given
        if given is not None and given.kind != "decision_flip":
            return given
        if not comparable and given is not None:
            return given
        found = self._stale(call, name, values)
        if found is not None:
            return found
        groups = groups_of(call, positions)
        if given is not None:
            explained = self._explain(call, verdict, groups, None)
            return given if explained is None else _combined(given, explained)
        return self._values(call, verdict, name, groups, positions)

    def _values(
        self,
        call: Captured,
        verdict: Verdict,
        name: str,
        groups: dict[str, Tensor],
        positions: Tensor | None,
    ) -> Signature:
        spec = call.site.spec
        ours, truth = (in_one_order(spec, v)[name] for v in (verdict.outputs, call.truth))
        limit = self.limits.of(call.site.op, name)[0]
        rows = positions if positions is not None and len(positions) == len(truth) else None
        difference = Difference(name, ours.double(), truth.double(), limit, rows, groups)
        seen = sharp(difference)
        if seen is not None and bool((ours.isnan() & ~truth.isnan()).any()):
            return seen
        # Of non-finite values all but NaN may be what something else than a bad number left behind.
        if seen is not None and seen.kind not in ("nan", "padding"):
            explained = self._explain(call, verdict, groups, seen.kind)
            return seen if explained is None else _combined(seen, explained)
        explained = self._explain(call, verdict, groups, None)
        if seen is not None and seen.kind == "nan" and name in spec.nonfinite:
            # There -inf stands for something empty or hidden, it is no number gone bad.
            seen = Signature("unexplained", seen.detail)
        if explained is None:
            stale = self._stale_rows(call, name, difference)
            if stale is not None:
                return stale
        if seen is None:
            seen = loose(difference)
        return seen if explained is None else _combined(seen, explained)

    def _explain(
        self, call: Captured, verdict: Verdict, groups: dict[str, Tensor], kind: str | None
    ) -> Explanation | None:
        op = call.site.op
        known = self._known.get(op)
        if known is not None and kind in (None, known.hypothesis.kind):
            again = explain(call, verdict.outputs, self.limits, self.config, groups, only=known)
            if again is not None:
                return again
        if self._attempts[op, kind] >= _ATTEMPTS:
            return None
        self._attempts[op, kind] += 1
        found = explain(call, verdict.outputs, self.limits, self.config, groups, kind=kind)
        if found is not None:
            self._known[op] = found
        return found

    def _stale(self, call: Captured, name: str, values: dict[str, Tensor]) -> Signature | None:
        """An output that equals an earlier one, or an argument that was not written."""
        ours = values.get(name)
        if ours is None:
            return None
        before = call.before.get(name)
        if before is not None and bits_equal(ours, before):
            return Signature("stale", f"{name} keeps its previous contents")
        truth = call.truth.get(name)
        if truth is None or truth.shape != ours.shape or not bool(ours.any()):
            return None
        for earlier in self.history.like(call.site.op, name, ours):
            if self._equal(call, name, ours, earlier.value) and not self._equal(
                call, name, truth, earlier.value
            ):
                return Signature("stale", f"{name} equals {earlier.label}")
        return self._unmoved(call, name, ours, truth)

    def _unmoved(self, call: Captured, name: str, ours: Tensor, truth: Tensor) -> Signature | None:
        """Wrong rows that all are what the same site had in them in an earlier pass."""
        if ours.dim() < 2 or not judged(call, name, truth):
            return None
        wrong = rows_of((ours - truth).abs() > 0.1 * truth.abs()).any(1)
        rows = wrong.nonzero().flatten()
        if len(rows) < 2:
            return None
        for earlier in self.history.of(call.site.op, name):
            was = earlier.value
            mine = earlier.site == call.site.path and earlier.right
            if not mine or was.shape[1:] != ours.shape[1:] or int(rows[-1]) >= len(was):
                continue
            if torch.equal(ours[rows], was[rows]):
                where = words_for_rows(wrong, {})
                return Signature(
                    "stale", f"{name} still is what it was in an earlier pass in {where}"
                )
        return None

    def _stale_rows(self, call: Captured, name: str, d: Difference) -> Signature | None:
        """Wrong rows that are all rows of one earlier output."""
        errors = rows_of(d.ours - d.truth).norm(dim=1) / rows_of(d.truth).norm(dim=1).clamp(
            min=1e-30
        )
        wrong = (errors > max(self.limits.of(call.site.op, name)[1], 0.1)).nonzero().flatten()
        if not len(wrong) or d.ours[0].numel() < 4:
            return None
        ours = rows_of(d.ours)[wrong[:_STALE_ROWS]]
        for earlier in self.history.of(call.site.op, name):
            if earlier.value.shape[1:] != d.ours.shape[1:] or not earlier.value.numel():
                continue
            rows = rows_of(earlier.value.double())
            distance = torch.cdist(ours, rows).amin(1) / ours.norm(dim=1).clamp(min=1e-30)
            if bool((distance <= self.limits.of(call.site.op, name)[1]).all()):
                where = words_for_rows(errors > 0.1, d.groups)
                return Signature("stale", f"{name} has rows of {earlier.label} in {where}")
        return None

    def _equal(self, call: Captured, name: str, a: Tensor, b: Tensor) -> bool:
        if not judged(call, name, b):
            return bits_equal(a, b.to(a.dtype))
        if bool(masks_differ(a, b).any()):
            return False
        return relative_error(a, b) <= self.limits.of(call.site.op, name)[0]


def _combined(seen: Signature, explained: Explanation) -> Signature:
    """What is seen, and what it means; the meaning decides the kind."""
    return Signature(explained.kind, f"{seen.detail}: {explained.words}")


def groups_of(call: Captured, positions: Tensor | None) -> dict[str, Tensor]:
    """What rows of a call have in common, in words -> [n] bool; the most telling first."""
    a = call.inputs
    groups: dict[str, Tensor] = {}
    if call.site.op == "attention":
        window, entries = a["window_index"], a["entry_index"]
        width = window.shape[1]
        groups[f"rows with fewer than {width} keys"] = (window < 0).any(1)
        groups[f"rows with all {width} keys"] = (window >= 0).all(1)
        if entries is not None and entries.shape[1]:
            groups["rows with hidden entries"] = (entries < 0).any(1)
            groups["rows that see entries"] = (entries >= 0).any(1)
            groups["rows without entries"] = (entries < 0).all(1)
    if call.site.op == "experts":
        chosen = a["experts"]
        for number in sorted(set(chosen.flatten().tolist())):
            groups[f"tokens of expert {number}"] = (chosen == number).any(1)
    if positions is not None:
        for window in (4, 128):
            groups[f"positions that close a window of {window}"] = positions % window == window - 1
            groups[f"positions that open a window of {window}"] = positions % window == 0
    length = len(next(iter(call.truth.values()))) if call.truth else 0
    return {
        words: rows
        for words, rows in groups.items()
        if len(rows) == length and bool(rows.any()) and not bool(rows.all())
    }
