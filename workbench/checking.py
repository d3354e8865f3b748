"""`check`: a route against the reference, site by site.

Reference and route run in lockstep, layer by layer. Every op runs on the reference's inputs (own
error, against float64) and on the inputs it gets in the route's own run (carried error, against the
reference). Limits calibrate themselves on the same inputs; see probes/limits.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.generate import split
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Implementation, RouteEntry, Site
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.probes.limits import Limits, judged, move_inputs
from dsv4_bench.probes.metrics import masks_differ, relative_error, tensor_and_row_error
from dsv4_bench.probes.signatures import Difference, Signature, classify
from dsv4_bench.probes.tap import set_taps

Progress = Callable[[str, int, int], None]
Part = Callable[[Tensor, Cache, Step], Tensor]
_NOISE_SAMPLES = 2  # noise is measured on the first calls of an op; it hardly varies


@dataclass
class Finding:
    """One output of one op in one forward pass that broke its limit."""

    site: str
    op: str
    layer: int | None
    forward: int
    output: str
    own_error: float
    limit: float
    signature: Signature

    @property
    def sentence(self) -> str:
        return f"{self.site}: {self.signature.detail}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "op": self.op,
            "layer": self.layer,
            "forward": self.forward,
            "output": self.output,
            "kind": self.signature.kind,
            "own_error": self.own_error,
            "limit": self.limit,
            "sentence": self.sentence,
        }


@dataclass
class SiteCheck:
    """What was seen at one site over all forward passes: the worst of each."""

    site: str
    op: str
    layer: int | None
    implementation: str
    own_error: float = 0.0
    carried_error: float = 0.0
    limit: float = 0.0
    verdict: str = "ok"  # ok, over, uncovered
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class CheckReport:
    """The whole check. `status`: clean, found, or partial (nothing found, but sites uncovered)."""

    sites: dict[str, SiteCheck] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    limits: Limits | None = None
    logits_error: float = 0.0
    seconds: float = 0.0

    @property
    def uncovered(self) -> list[SiteCheck]:
        return [site for site in self.sites.values() if site.verdict == "uncovered"]

    @property
    def status(self) -> str:
        if self.findings:
            return "found"
        return "partial" if self.uncovered else "clean"

    def to_dict(self) -> dict[str, Any]:
        first = self.findings[0] if self.findings else None
        carried = self.sites[first.site].carried_error if first else None
        return {
            "status": self.status,
            "first": {**first.to_dict(), "carried_error": carried} if first else None,
            "findings": [finding.to_dict() for finding in self.findings],
            "sites": [site.to_dict() for site in self.sites.values()],
            "uncovered": [{"site": s.site, "why": s.note} for s in self.uncovered],
            "logits_error": self.logits_error,
            "seconds": self.seconds,
        }


class Checker:
    """Checks `route` on `model` over `tokens`, fed in `chunks`."""

    def __init__(self, model: Transformer, route: Sequence[RouteEntry]) -> None:
        self.model = model
        self.limits = Limits(model.dtype)
        self.report = CheckReport(limits=self.limits)
        model.set_route(list(route))
        self.chosen: dict[str, Implementation] = {}
        for path, site in model.sites.items():
            self.chosen[path] = site.impl
            check = SiteCheck(path, site.op, site.layer, site.impl.name)
            if site.impl.name == "reference":
                check.verdict = "uncovered"
                check.note = site.stamp.note or "the route names the reference"
            self.report.sites[path] = check

    @torch.inference_mode()
    def run(self, tokens: list[int], chunks: Sequence[int], progress: Progress) -> CheckReport:
        """Run the check; the model's route is the checked one again afterwards."""
        started = time.perf_counter()
        model = self.model
        right, ours = model.new_cache(), model.new_cache()
        for forward, (start, stop) in enumerate(split(len(tokens), chunks)):
            steps = [cache.step([tokens[start:stop]]) for cache in (right, ours)]
            x_right = x_ours = torch.empty(0)
            parts = self._parts()
            for number, (name, part) in enumerate(parts):
                progress(f"check {name}, tokens {start} to {stop}", number, len(parts))
                x_right, calls = self._capture(False, part, x_right, right, steps[0])
                x_ours, carried = self._capture(True, part, x_ours, ours, steps[1])
                self._check_calls(calls, carried, forward, steps[0].positions)
            self.report.logits_error = max(
                self.report.logits_error, relative_error(x_ours, x_right)
            )
            right.advance(steps[0])
            ours.advance(steps[1])
        progress("check", 1, 1)
        self.report.seconds = time.perf_counter() - started
        return self.report

    def _parts(self) -> list[tuple[str, Part]]:
        """The forward pass in pieces that are captured and checked one at a time."""
        model = self.model

        def layer(index: int) -> Part:
            return lambda x, cache, step: model.layers[index](x, cache.layers[index], step)

        return [
            ("embed", lambda x, cache, step: model.embed(step.tokens)),
            *((f"L{index}", layer(index)) for index in range(len(model.layers))),
            ("head", lambda x, cache, step: model.head(x)),
        ]

    def _capture(
        self, routed: bool, part: Part, x: Tensor, cache: Cache, step: Step
    ) -> tuple[Tensor, list[Captured]]:
        """Run a part of the model on the checked route or on the reference, keeping its ops."""
        for path, site in self.model.sites.items():
            site.use(self.chosen[path] if routed else IMPLEMENTATIONS[site.op]["reference"])
        capture = Capture()
        set_taps(self.model.sites.values(), capture)
        try:
            return part(x, cache, step), capture.calls
        finally:
            set_taps(self.model.sites.values(), None)

    def _check_calls(
        self, calls: list[Captured], carried: list[Captured], forward: int, positions: Tensor
    ) -> None:
        by_path = {call.site.path: call for call in carried}
        for call in calls:
            self._check_own(call, forward, positions)
            other = by_path.get(call.site.path)
            if other is not None:
                check = self.report.sites[call.site.path]
                errors = [
                    relative_error(other.outputs[name], value)
                    for name, value in call.outputs.items()
                    if judged(call, name, value) and other.outputs[name].shape == value.shape
                ]
                check.carried_error = max([check.carried_error, *errors])

    def _check_own(self, call: Captured, forward: int, positions: Tensor) -> None:
        site = call.site
        check = self.report.sites[site.path]
        truth = call.oracle()
        seen = self.limits.table.get((site.op, next(iter(truth), "")))
        noisy = None
        if seen is None or seen.samples < _NOISE_SAMPLES:
            noisy = call.oracle(**move_inputs(call, self.model.dtype))
        self.limits.learn(call, truth, noisy)
        if check.verdict == "uncovered":
            return
        ours = call.run(self.chosen[site.path].function)
        for name, exact in truth.items():
            value = ours[name]
            if name in site.spec.discrete:
                self._check_set(call, name, value, exact, forward)
            elif judged(call, name, exact):
                self._check_values(call, name, value, exact, forward, positions)

    def _check_values(
        self,
        call: Captured,
        name: str,
        value: Tensor,
        exact: Tensor,
        forward: int,
        positions: Tensor,
    ) -> None:
        site = call.site
        check = self.report.sites[site.path]
        limit, row_limit = self.limits.of(site.op, name)
        error, row_error = tensor_and_row_error(value, exact)
        check.own_error = max(check.own_error, error)
        check.limit = max(check.limit, limit)
        broken = bool(masks_differ(value, exact).any()) or error > limit or row_error > row_limit
        if broken:
            rows = positions if len(positions) == len(exact) else None
            difference = Difference(name, value.double(), exact.double(), limit, rows)
            self._find(site, name, forward, max(error, row_error), limit, classify(difference))

    def _check_set(
        self, call: Captured, name: str, value: Tensor, exact: Tensor, forward: int
    ) -> None:
        a, b = value.sort(-1).values, exact.sort(-1).values
        rows = (a != b).any(-1)
        if bool(rows.any()):
            share = float(rows.double().mean())
            row = int(rows.nonzero()[0])
            detail = f"{name} picks another set in {share:.1%} of the rows, first row {row}"
            self._find(call.site, name, forward, share, 0.0, Signature("decision_flip", detail))

    def _find(
        self, site: Site, name: str, forward: int, error: float, limit: float, signature: Signature
    ) -> None:
        self.report.sites[site.path].verdict = "over"
        self.report.findings.append(
            Finding(site.path, site.op, site.layer, forward, name, error, limit, signature)
        )
