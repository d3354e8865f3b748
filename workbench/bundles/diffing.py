"""`diff`: two bundles of the same run on something different, and where they first part

Comparisons that mean nothing are refused: other tokens, config, weights or coverage. Then every
captured op is compared in the order it ran. Where the inputs are equal and an output is not, or where
an op was wrong on its own inputs already, that op is to blame; otherwise it may only carry on what came
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.bundle import Bundle, BundleCall, CallEntry
from dsv4_bench.probes.bundle.machine import machine
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.metrics import masks_differ, max_abs, tensor_and_row_error

# How many limits of a single op honest rounding may add up to on its way through the layers; beyond
# that, what came in was wrong already.
_DRIFT = 100
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Gap:
    """How far one tensor of B is from that of A: relative L2, largest difference and its place.

    Of sets the share of rows that differ; infinite where shapes or non-finite places do.
    """

    bits_equal: bool
    relative_l2: float
    worst_row: float
    max_abs: float
    at: list[int]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class OpDiff:
    """One op in both bundles. `blame`: equal, within (its limit), here, or carried (inputs differ)."""

    site: str
    op: str
    forward: int
    a: str
    b: str
    blame: str
    input_error: float
    output_error: float
    limit: float
    output: str
    outputs: dict[str, Gap] = field(default_factory=dict)
    inputs: dict[str, Gap] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        label = f"{self.site} #{self.forward}"
        if self.blame == "equal":
            return f"{label}: bitwise equal"
        size = f"{self.output} differs by {self.output_error:.2g} (limit {self.limit:.2g})"
        if self.blame == "within":
            return f"{label}: {size}"
        if self.blame == "here":
            how = "are equal" if self.input_error == 0 else f"differ by {self.input_error:.2g}"
            return f"{label}: inputs {how}, {size}: {self.a} and {self.b} compute it differently"
        return f"{label}: {size}, inputs differ by {self.input_error:.2g} already"

    def to_dict(self) -> dict[str, Any]:
        gaps = {
            "inputs": {name: gap.to_dict() for name, gap in self.inputs.items()},
            "outputs": {name: gap.to_dict() for name, gap in self.outputs.items()},
        }
        plain = {k: v for k, v in vars(self).items() if k not in gaps}
        return {**plain, **gaps, "sentence": self.sentence}


@dataclass
class DiffReport:
    """All ops in the order they ran, and what differs around them."""

    ops: list[OpDiff] = field(default_factory=list)
    around: list[str] = field(default_factory=list)

    @property
    def first(self) -> OpDiff | None:
        """The op to blame: the first that differs beyond its limit."""
        return next((op for op in self.ops if op.blame in ("here", "carried")), None)

    @property
    def bitwise(self) -> bool:
        return all(op.blame == "equal" for op in self.ops)

    @property
    def status(self) -> str:
        return "different" if self.first else "equal" if self.bitwise else "within limits"

    @property
    def sentence(self) -> str:
        if self.first:
            return self.first.sentence
        count = f"{len(self.ops)} ops"
        if self.bitwise:
            return f"{count} are bitwise equal"
        bits = next(op for op in self.ops if op.blame != "equal")
        return f"{count} agree within their limits; bits differ first at {bits.sentence}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "sentence": self.sentence,
            "first": self.first.to_dict() if self.first else None,
            "bitwise": self.bitwise,
            "around": self.around,
            "ops": [op.to_dict() for op in self.ops],
        }


# ------------------------------------------------------------------------------ is it legitimate


def refusals(a: Bundle, b: Bundle) -> Iterator[str]:
    """Why the two may not be compared; nothing if they may."""
    for name, words in (
        ("tokens", "tokens"),
        ("chunks", "chunks"),
        ("numerics", "numerics"),
        ("dtype", "dtype of the activations"),
    ):
        x, y = a.manifest[name], b.manifest[name]
        if x != y:
            yield f"other {words}: {_shown(x, y)}"
    yield from _config_refusals(a, b)
    mine, theirs = ({(c.site.path, c.forward) for c in bundle.calls} for bundle in (a, b))
    if mine != theirs:
        only = [
            sorted(f"{site} #{number}" for site, number in s)
            for s in (mine - theirs, theirs - mine)
        ]
        parts = [
            f"{len(o)} ops only in {n}, as {o[0]}" for o, n in zip(only, "AB", strict=True) if o
        ]
        yield f"other coverage: {'; '.join(parts)}"
    yield from _weight_refusals(a, b)


def _shown(x: Any, y: Any) -> str:
    if isinstance(x, list) and isinstance(y, list):
        if len(x) != len(y):
            return f"{len(x)} against {len(y)}"
        place = next(i for i, pair in enumerate(zip(x, y, strict=True)) if pair[0] != pair[1])
        return f"at {place}: {x[place]} against {y[place]}"
    return f"{x} against {y}"


def _config_refusals(a: Bundle, b: Bundle) -> Iterator[str]:
    x, y = (bundle.manifest["checkpoint"].get("config") for bundle in (a, b))
    if x != y:
        fields = sorted(k for k in {*(x or {}), *(y or {})} if (x or {}).get(k) != (y or {}).get(k))
        yield f"other config: {', '.join(fields[:6])}"


def _weight_refusals(a: Bundle, b: Bundle) -> Iterator[str]:
    """Sites whose constants differ; of experts those that both bundles hold."""
    theirs = {call.site.path: call.site for call in b.calls}
    sites = {call.site.path: call.site for call in a.calls}
    wrong = []
    for path, site in sites.items():
        other = theirs.get(path)
        if other is None:
            continue
        shared = site.digests.keys() & other.digests.keys()
        if (
            site.op != other.op
            or any(site.digests[n] != other.digests[n] for n in shared)
            or _numbers(site.params) != _numbers(other.params)
        ):
            wrong.append(path)
    if wrong:
        more = f" and {len(wrong) - 1} more sites" if len(wrong) > 1 else ""
        yield f"other weights or constants: {wrong[0]}{more}"


def _numbers(value: Any) -> Any:
    """The scalars of an argument as in calls.json: of tensors nothing, of a bank its count."""
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if kind == "tensor":
        return None
    if kind == "experts":
        return value.get("count")
    return {name: _numbers(item) for name, item in value.items()}


# ------------------------------------------------------------------------------ comparing


def diff(a: Bundle, b: Bundle, progress: Progress = lambda *state: None) -> DiffReport:
    """Compare every captured op. Raises CannotAnswer with the reasons if that would mean nothing."""
    reasons = list(refusals(a, b))
    if reasons:
        raise CannotAnswer(
            f"these bundles are not comparable: {'; '.join(reasons)}",
            "compare dumps of the same tokens, chunks, sites and checkpoint",
        )
    if not a.calls:
        raise CannotAnswer("the bundles hold no captured ops", "nothing compared is no pass")
    others = {(call.site.path, call.forward): call for call in b.calls}
    report = DiffReport(around=_around(a, b))
    for number, entry in enumerate(a.calls):
        progress(f"diff {entry.label}", number, len(a.calls))
        other = others[entry.site.path, entry.forward]
        report.ops.append(_compare(entry, a.load(entry), other, b.load(other)))
    progress("diff", len(a.calls), len(a.calls))
    return report


def _around(a: Bundle, b: Bundle) -> list[str]:
    """What else differs: versions, machine, route."""
    x, y = a.manifest["versions"], b.manifest["versions"]
    lines = [f"{n}: {x.get(n)} / {y.get(n)}" for n in machine() if x.get(n) != y.get(n)]
    if a.manifest["route"] != b.manifest["route"]:
        lines.append(f"route: {', '.join(a.manifest['route'])} / {', '.join(b.manifest['route'])}")
    return lines


@torch.inference_mode()
def _compare(x: CallEntry, ours: BundleCall, y: CallEntry, theirs: BundleCall) -> OpDiff:
    inputs = _gaps(_tensors(ours), _tensors(theirs), ())
    discrete = ours.captured.site.spec.discrete
    outputs = _gaps(ours.captured.outputs, theirs.captured.outputs, discrete)
    limits = {n: _limits(ours, theirs, n) for n in outputs}
    worst = max(outputs, key=lambda n: _excess(outputs[n], *limits[n]), default="")
    input_error = max((gap.relative_l2 for gap in inputs.values()), default=0.0)
    same_inputs = all(gap.bits_equal for gap in inputs.values())
    limit = limits[worst][0] if worst else 0.0
    excess = _excess(outputs[worst], *limits[worst]) if worst else 0.0
    own = "over" in (ours.verdict, theirs.verdict)
    if same_inputs and all(gap.bits_equal for gap in outputs.values()):
        blame = "equal"
    elif excess <= (1 if own or same_inputs else _DRIFT):
        blame = "within"
    else:
        blame = "here" if own or same_inputs else "carried"
    return OpDiff(
        x.site.path,
        x.site.op,
        x.forward,
        x.stamp.get("implementation", "?"),
        y.stamp.get("implementation", "?"),
        blame,
        input_error,
        outputs[worst].relative_l2 if worst else 0.0,
        limit,
        worst,
        outputs,
        inputs,
    )


def _tensors(call: BundleCall) -> dict[str, Tensor]:
    """The run-time tensors of a call, a step's tokens among them."""
    found = {}
    for name, value in call.captured.inputs.items():
        if name in call.captured.site.params:
            continue
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Step):
            found[name] = value.positions
    return found


def _limits(a: BundleCall, b: BundleCall, output: str) -> tuple[float, float]:
    """Two honest results may be one limit apart on either side of the truth: the sum of both."""
    checks = [call.checks[output] for call in (a, b) if output in call.checks]
    return sum(check.limit for check in checks), sum(check.limit_row for check in checks)


def _excess(gap: Gap, limit: float, limit_row: float) -> float:
    """Difference over limit, the larger of tensor and worst row; 0 for equal bits."""
    if gap.bits_equal or gap.relative_l2 == gap.worst_row == 0:
        return 0.0
    if limit == 0:
        return float("inf")
    return max(gap.relative_l2 / limit, gap.worst_row / (limit_row or limit))


def _gaps(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], discrete: tuple[str, ...]
) -> dict[str, Gap]:
    missing = Gap(False, float("inf"), float("inf"), float("inf"), [])
    return {
        name: _gap(a[name], b[name], name in discrete) if name in a and name in b else missing
        for name in [*a, *(n for n in b if n not in a)]
    }


def _gap(x: Tensor, y: Tensor, discrete: bool) -> Gap:
    infinite = float("inf")
    if x.shape != y.shape or x.dtype != y.dtype:
        return Gap(False, infinite, infinite, infinite, [])
    if bits_equal(x, y):
        return Gap(True, 0.0, 0.0, 0.0, [])
    if discrete:
        rows = (x.sort(-1).values != y.sort(-1).values).reshape(-1, x.shape[-1]).any(-1)
        share = float(rows.double().mean())
        at = [int(rows.to(torch.uint8).argmax())] if share else []
        return Gap(False, share, share, share, at)
    largest, at = max_abs(y, x)
    if bool(masks_differ(y, x).any()):
        return Gap(False, infinite, infinite, largest, at)
    error, row = tensor_and_row_error(y, x)
    return Gap(False, error, row, largest, at)
