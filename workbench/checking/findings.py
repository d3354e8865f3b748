"""What `check` found: findings, what was seen at every site, and the report of both"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dsv4_bench.probes.invariants import Held
from dsv4_bench.probes.limits import Limits
from dsv4_bench.probes.signatures import Signature


@dataclass
class Finding:
    """One op in one forward pass that is wrong: an output over its limit, a broken promise.

    `own` is False where the op is right on the reference's inputs and wrong only in the route's own
    run. `output` is "" where there is none (the implementation raised). `metrics` says how the output
    differs in numbers; see `probes.metrics.measure`.
    """

    site: str
    op: str
    layer: int | None
    forward: int
    output: str
    own_error: float
    limit: float
    signature: Signature
    own: bool = True
    metrics: dict[str, Any] = field(default_factory=dict)
    invariants: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.signature.kind

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
            "kind": self.kind,
            "own": self.own,
            "own_error": self.own_error,
            "limit": self.limit,
            "sentence": self.sentence,
            "invariants": self.invariants,
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
    invariants: dict[str, Held] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        invariants = {name: held.to_dict() for name, held in self.invariants.items()}
        return {**vars(self), "invariants": invariants}


@dataclass
class CheckReport:
    """The whole check. `status`: clean, found, or partial (nothing found, but sites uncovered)."""

    sites: dict[str, SiteCheck] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    limits: Limits | None = None
    logits_error: float = 0.0
    seconds: float = 0.0

    @property
    def first(self) -> Finding | None:
        """The earliest finding: of the earliest forward pass, the first site in forward order."""
        return self.findings[0] if self.findings else None

    @property
    def uncovered(self) -> list[SiteCheck]:
        return [site for site in self.sites.values() if site.verdict == "uncovered"]

    @property
    def status(self) -> str:
        if self.findings:
            return "found"
        return "partial" if self.uncovered else "clean"

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "first": self._first(),
            "findings": [finding.to_dict() for finding in self.findings],
            "sites": [site.to_dict() for site in self.sites.values()],
            "uncovered": [{"site": s.site, "why": s.note} for s in self.uncovered],
            "logits_error": self.logits_error,
            "seconds": self.seconds,
        }

    def _first(self) -> dict[str, Any] | None:
        first = self.first
        if first is None:
            return None
        evidence = self.limits.evidence(first.op, first.output) if self.limits else None
        return {
            **first.to_dict(),
            "carried_error": self.sites[first.site].carried_error,
            "metrics": first.metrics,
            "limit_evidence": evidence,
        }
