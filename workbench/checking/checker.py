"""`check`: a route against the reference, site by site

Reference and route run in lockstep, part by part. Every op runs on the reference's inputs (own
error, against float64) and on the inputs it gets in the route's own run (carried error, against the
reference). Limits calibrate themselves on the same inputs; see probes/limits.py.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation, RouteEntry
from dsv4_bench.engine.step import Step
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.decisions import Record, Replay
from dsv4_bench.probes.diagnosis import Diagnosis
from dsv4_bench.probes.invariants import Held, check_invariants, check_scales, weights_of
from dsv4_bench.probes.limits import judged, move_inputs
from dsv4_bench.probes.metrics import measure, relative_error
from dsv4_bench.probes.signatures import Signature
from dsv4_bench.probes.tap import Observer, set_taps
from dsv4_bench.probes.verdicts import (
    Broken,
    Verdict,
    attempt,
    broken_contract,
    changed_outputs,
    judge_memory,
    judge_values,
)
from dsv4_bench.workbench.checking.baseline import Baseline, Piece, default_chunks
from dsv4_bench.workbench.checking.cache_check import compare_caches
from dsv4_bench.workbench.checking.findings import CheckReport, Finding, SiteCheck
from dsv4_bench.workbench.checking.route_capture import RouteCapture
from dsv4_bench.workbench.checking.settling import Judged, settle

__all__ = ["Baseline", "CheckReport", "Checker", "Finding", "default_chunks"]

Progress = Callable[[str, int, int], None]
_NOISE_SAMPLES = 2  # noise is measured on the first calls of an op; it hardly varies
# Before an alarm noise is measured on the inputs at hand: so often, and until there are so many values;
# the largest of one or two says nothing.
_NOISE_SEEDS, _NOISE_VALUES = 4, 64
# A fault that only the route's own run shows is one of memory, and gross; its inputs, off by what came
# before, may amplify rounding more than those the limits were made on.
_IN_RUN_SLACK = 4.0


class Checker:
    """Checks `route` on `model`; sites whose implementation is the reference are not judged.

    repeats: how often every op runs on the same inputs to see whether its bits change. poison: one
    more run with NaN in recycled memory, unused rows and guard zones (probes/poison.py).
    replay_decisions: the route's own run goes on with the reference's experts and entries, so that
    carried errors are those of its numbers.
    """

    def __init__(
        self,
        model: Transformer,
        route: Sequence[RouteEntry],
        *,
        repeats: int = 2,
        poison: bool = True,
        replay_decisions: bool = False,
    ) -> None:
        self.model = model
        self.replay_decisions = replay_decisions
        self.repeats = repeats
        self.poison = poison
        self.report = CheckReport()
        model.set_route(list(route))
        self.chosen: dict[str, Implementation] = {}
        for path, site in model.sites.items():
            self.chosen[path] = site.impl
            check = SiteCheck(path, site.op, site.layer, site.impl.name)
            if site.impl.name == "reference":
                check.verdict = "uncovered"
                check.note = site.stamp.note or "the route names the reference"
            self.report.sites[path] = check

    def run(self, tokens: Sequence[int], chunks: Sequence[int], progress: Progress) -> CheckReport:
        """Check on `tokens` fed in `chunks`; the model's route is the checked one afterwards."""
        return self.against(Baseline(self.model, tokens, chunks, keep=False), progress)

    @torch.inference_mode()
    def against(self, baseline: Baseline, progress: Progress | None = None) -> CheckReport:
        """Check against a reference run, which serves any number of routes of the same model."""
        started = time.perf_counter()
        self.limits = self.report.limits = baseline.limits
        self.diagnosis = Diagnosis(self.limits, self.model.config)
        self._scales_seen: set[tuple[str, str]] = set()
        self._judged: dict[str, list[Judged]] = defaultdict(list)
        cache, step, x = self.model.new_cache(), None, torch.empty(0)
        for number, piece in enumerate(baseline.pieces()):
            if progress is not None:
                progress(f"check {piece.name}, pass {piece.forward}", number, baseline.count)
            if piece.begins:
                cache = self.model.new_cache(len(piece.tokens))
            if piece.name == "embed":
                step = cache.step(piece.tokens)
            assert step is not None
            x, capture = self._route_run(piece, x, cache, step)
            self._check_piece(piece, capture)
            if piece.ends:
                error = relative_error(x, piece.x)
                self.report.logits_error = max(self.report.logits_error, error)
                cache.advance(step)
                if piece.last and any(c.verdict != "uncovered" for c in self.report.sites.values()):
                    self._check_cache(piece, baseline, cache)
        self._use(self.chosen)
        first = self.report.first
        if first is not None:
            first.signature = settle(first, self._judged[first.site])
        if progress is not None:
            progress("check", baseline.count, baseline.count)
        self.report.seconds = time.perf_counter() - started
        return self.report

    # ------------------------------------------------------------------ running

    def _use(self, table: dict[str, Implementation]) -> None:
        for path, site in self.model.sites.items():
            if site.impl is not table[path]:
                site.use(table[path])

    def _route_run(
        self, piece: Piece, x: Tensor, cache: Cache, step: Step
    ) -> tuple[Tensor, RouteCapture]:
        """Run a part of the model on the checked route."""
        self._use(self.chosen)
        capture = RouteCapture({call.site.path: call for call in piece.calls})
        observer: Observer = capture
        if self.replay_decisions:
            observer = Replay(Record.of(piece.calls), inner=capture)
        sites = self.model.sites.values()
        set_taps(sites, observer)
        try:
            return piece.part(x, cache, nvtx.begin(step)), capture
        finally:
            set_taps(sites, None)

    def _check_piece(self, piece: Piece, capture: RouteCapture) -> None:
        carried = {call.site.path: call for call in capture.calls}
        for call in piece.calls:
            path = call.site.path
            check, other = self.report.sites[path], carried.get(path)
            if other is not None:
                check.carried_error = max(check.carried_error, _carried_error(call, other))
            if check.verdict == "uncovered":
                continue
            found = self._check_own(call, piece)
            rows = len(piece.positions)
            start = int(piece.positions.min())
            self._judged[path].append(Judged(piece.forward, rows, start, found))
            if not found and other is not None:
                self._check_in_run(other, piece)
            if not found and path in capture.problems:
                self._find(
                    call, piece, Broken("", float("inf"), 0.0), capture.problems[path], False
                )
            self.diagnosis.history.add(call, call.outputs, piece.forward)
            if other is not None and changed_outputs(call.outputs, other.outputs):
                self.diagnosis.history.add(call, other.outputs, piece.forward)

    def _check_cache(self, piece: Piece, baseline: Baseline, cache: Cache) -> None:
        """Cache rows must be the same however the tokens were fed; one sequence, in several pieces."""
        scenario = baseline.scenarios[piece.scenario]
        if len(scenario.sequences) > 1 or len(scenario.steps()) < 2:
            return
        self._use(self.chosen)
        capture = RouteCapture({})
        sites = self.model.sites.values()
        set_taps(sites, capture)
        try:
            held = compare_caches(self.model, scenario.sequences[0], cache)
        except Exception:
            if not self.report.findings:
                raise
            return  # what raises here was found where it raised first
        finally:
            set_taps(sites, None)
        for path, item in held.items():
            self.report.sites[path].invariants[item.words] = item
        wrong = {path: item.signature for path, item in held.items() if not item.ok}
        if self.report.findings:  # an op's own fault, which says more
            return
        for path, seen in {**capture.problems, **wrong}.items():
            site = self.model.sites[path]
            self.report.sites[path].verdict = "over"
            words = f"{seen.detail}; with all {len(scenario.sequences[0])} tokens in one prefill"
            error = held[path].value if path in held else float("inf")
            self.report.findings.append(
                Finding(
                    path, site.op, site.layer, piece.forward, "", error, 0.0,
                    Signature(seen.kind, words), False,
                )
            )  # fmt: skip

    # ------------------------------------------------------------------ judging

    def _learn(self, call: Captured) -> None:
        """Add the reference's error on these inputs to the evidence of the limits."""
        seen = self.limits.table.get((call.site.op, next(iter(call.truth), "")))
        noisy = None
        if seen is None or seen.samples < _NOISE_SAMPLES:
            noisy = call.oracle(**move_inputs(call, self.model.dtype))
        self.limits.learn(call, call.truth, noisy)

    def _learn_noise(self, call: Captured) -> None:
        """Measure rounding noise on these very inputs: sums that cancel amplify it."""
        values = max(value.numel() for value in call.truth.values())
        for seed in range(1, 1 + max(_NOISE_SEEDS, _NOISE_VALUES // max(values, 1))):
            noisy = call.oracle(**move_inputs(call, self.model.dtype, seed))
            self.limits.learn(call, call.truth, noisy)

    def _check_own(self, call: Captured, piece: Piece) -> bool:
        """Judge an op on the reference's inputs; whether something was found."""
        self._learn(call)
        function = self.chosen[call.site.path].function
        outputs, problem = attempt(call, function)
        if problem is not None:
            self._find(call, piece, Broken("", float("inf"), 0.0), problem)
            return True
        broken = broken_contract(call, outputs)
        if broken:
            for item in broken:
                self._find(call, piece, item, item.signature)
            return True
        verdict = judge_values(call, outputs, call.truth, self.limits)
        if verdict.broken:
            self._learn_noise(call)
            verdict = judge_values(call, outputs, call.truth, self.limits)
        judge_memory(call, function, verdict, self.limits, self.repeats, self.poison)
        check = self.report.sites[call.site.path]
        if verdict.error >= check.own_error:
            check.own_error, check.limit = verdict.error, verdict.limit
        return self._name(call, piece, verdict, own=True)

    def _check_in_run(self, other: Captured, piece: Piece) -> None:
        """An op that is right on the reference's inputs must be right on those of the route's run."""
        reference = other.run(other.site.spec.reference)
        alike = replace(other, outputs=reference)
        if not changed_outputs(reference, other.outputs):
            return
        widened = {name: value.double() for name, value in reference.items()}
        if not judge_values(alike, other.outputs, widened, self.limits, _IN_RUN_SLACK).broken:
            return
        self._learn_noise(alike)
        verdict = judge_values(alike, other.outputs, alike.truth, self.limits, _IN_RUN_SLACK)
        self._name(alike, piece, verdict, own=False)

    def _name(self, call: Captured, piece: Piece, verdict: Verdict, own: bool) -> bool:
        """Turn what is broken into findings; an invariant raises one only where nothing else did."""
        held = {**check_invariants(call, verdict.outputs), **self._scales(call)}
        self._keep_invariants(call, held)
        broken_ones = [item for item in held.values() if not item.ok]
        sentences = [item.sentence for item in broken_ones]
        named = [
            (self.diagnosis.name(call, verdict, broken, piece.positions), broken)
            for broken in verdict.broken
        ]
        for signature, broken in sorted(named, key=lambda item: item[0].kind == "unexplained"):
            self._find(call, piece, broken, signature, own, verdict, sentences)
        if not verdict.broken:
            for item in broken_ones:
                broken = Broken("", item.value, item.limit, item.signature)
                self._find(call, piece, broken, item.signature, own, verdict, sentences)
        return bool(verdict.broken) or bool(sentences)

    def _scales(self, call: Captured) -> dict[str, Held]:
        """Scales of the weights that this call is the first to read."""
        new = [w for w in weights_of(call) if (call.site.path, w.name) not in self._scales_seen]
        self._scales_seen.update((call.site.path, weight.name) for weight in new)
        found = [held for weight in new if (held := check_scales(weight)) is not None]
        return {held.words: held for held in found}

    def _keep_invariants(self, call: Captured, held: dict[str, Held]) -> None:
        kept = self.report.sites[call.site.path].invariants
        for words, item in held.items():
            if words not in kept or item.value > kept[words].value:
                kept[words] = item

    def _find(
        self,
        call: Captured,
        piece: Piece,
        broken: Broken,
        signature: Signature | None,
        own: bool = True,
        verdict: Verdict | None = None,
        invariants: Sequence[str] = (),
    ) -> None:
        site = call.site
        assert signature is not None
        if not own:
            words = f"{signature.detail}; only in the route's own run: `check --minimise` finds with whom"
            signature = replace(signature, detail=words)
        self.report.sites[site.path].verdict = "over"
        finding = Finding(
            site.path, site.op, site.layer, piece.forward, broken.output,
            broken.error, broken.limit, signature, own, invariants=list(invariants),
        )  # fmt: skip
        if not self.report.findings and verdict is not None and broken.output in call.truth:
            ours, truth = verdict.outputs[broken.output], call.truth[broken.output]
            if ours.is_floating_point():
                finding.metrics = measure(ours, truth)
        self.report.findings.append(finding)


def _carried_error(call: Captured, other: Captured) -> float:
    """The largest error of the route's own run against the reference's, over the outputs."""
    errors = [
        relative_error(other.outputs[name], value)
        for name, value in call.outputs.items()
        if judged(call, name, value) and other.outputs[name].shape == value.shape
    ]
    return max(errors, default=0.0)
