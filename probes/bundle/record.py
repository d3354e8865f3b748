"""One captured op with the reference's answer, and how far each output is from the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.decisions import spread
from dsv4_bench.probes.limits import Limits, judged, move_inputs
from dsv4_bench.probes.metrics import masks_differ, tensor_and_row_error
from dsv4_bench.probes.signatures import Difference, classify
from dsv4_bench.probes.verdicts import decision_scores, in_one_order

_NOISE_SAMPLES = 2  # noise is measured on the first calls of an op; it hardly varies


@dataclass(frozen=True)
class OutputCheck:
    """One output against float64, beside its limits.

    `own_error` is the relative L2 of the whole tensor, `row_error` that of its worst row; of a set
    (top-k, routing) the share of rows that picked another one. Both are infinite where NaN or
    infinities stand in other places than they should. `bits_equal`: to the reference.
    """

    own_error: float
    row_error: float
    limit: float
    limit_row: float
    bits_equal: bool
    verdict: str  # ok, over, or unjudged (integers that are no set)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class BundleCall:
    """A captured op, what the reference makes of the same inputs, and the verdict on each output.

    `stamp` says what ran: implementation, hash, note. `forward` counts the forward passes of the run.
    `signature` is what kind of wrong the first output over its limit is: kind and detail.
    """

    captured: Captured
    forward: int
    reference: dict[str, Tensor]
    checks: dict[str, OutputCheck]
    stamp: dict[str, Any] = field(default_factory=dict)
    signature: dict[str, str] | None = None

    @property
    def site(self) -> str:
        return self.captured.site.path

    @property
    def verdict(self) -> str:
        """over if any output is, ok if any was judged and none is over, else unjudged."""
        verdicts = {check.verdict for check in self.checks.values()}
        return next((v for v in ("over", "ok") if v in verdicts), "unjudged")

    @property
    def worst(self) -> tuple[str, OutputCheck] | None:
        """The output furthest beyond its limit, by share of it."""
        rated = [item for item in self.checks.items() if item[1].verdict != "unjudged"]
        return max(rated, key=lambda item: excess(item[1]), default=None)


def excess(check: OutputCheck) -> float:
    """Error over limit, the larger of tensor and worst row; infinite for a set that differs."""
    if check.verdict == "over" and check.limit == 0:
        return float("inf")
    ratios = [
        error / limit
        for error, limit in (
            (check.own_error, check.limit),
            (check.row_error, check.limit_row),
        )
        if limit > 0
    ]
    return max(ratios, default=0.0)


@torch.inference_mode()
def examine(captured: Captured, forward: int, limits: Limits) -> BundleCall:
    """Run the reference and the float64 oracle on a captured op, teach `limits`, and judge it.

    How much the inputs' own rounding moves the result is measured on an op's first calls, and on every
    call that would be over its limit without it.
    """
    site = captured.site
    reference = captured.run(site.spec.reference)
    truth = captured.oracle()
    honest = Captured(site, captured.args, captured.before, reference)
    seen = limits.table.get((site.op, next(iter(truth), "")))
    first = seen is None or seen.samples < _NOISE_SAMPLES
    checks: dict[str, OutputCheck] = {}
    for with_noise in (first, True):
        noisy = captured.oracle(**move_inputs(captured, limits.dtype)) if with_noise else None
        limits.learn(honest, truth, noisy)
        bounds = {name: limits.of(site.op, name, len(t)) for name, t in truth.items()}
        checks = judge(captured, captured.outputs, reference, truth, bounds)
        if with_noise or all(check.verdict != "over" for check in checks.values()):
            break
    stamp = {k: v for k, v in site.stamp.to_dict().items() if k != "launches"}
    return BundleCall(
        captured, forward, reference, checks, stamp, describe_wrong(captured, truth, checks)
    )


def describe_wrong(
    captured: Captured, truth: Mapping[str, Tensor], checks: Mapping[str, OutputCheck]
) -> dict[str, str] | None:
    """Kind and detail of the first output that is over its limit."""
    name = next((name for name, check in checks.items() if check.verdict == "over"), None)
    if name is None:
        return None
    ours, exact = captured.outputs.get(name), truth[name]
    if ours is None or ours.shape != exact.shape:
        shape = "missing" if ours is None else list(ours.shape)
        detail = f"{name} is {shape}, should be {list(exact.shape)}"
        return {"kind": "unexplained", "detail": detail}
    if name in captured.site.spec.discrete:
        share = checks[name].own_error
        detail = f"{name} picks another set in {share:.1%} of the rows"
        return {"kind": "decision_flip", "detail": detail}
    found = classify(Difference(name, ours.double(), exact.double(), checks[name].limit))
    return {"kind": found.kind, "detail": found.detail}


def judge(
    captured: Captured,
    outputs: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    bounds: Mapping[str, tuple[float, float]],
) -> dict[str, OutputCheck]:
    """A check of every output in `truth`; `bounds` holds (limit, limit of the worst row).

    Decisions are compared as sets, and a tie within the noise of its scores may fall either way.
    """
    spec = captured.site.spec
    fitting = {n: v for n, v in outputs.items() if n in truth and v.shape == truth[n].shape}
    ours, right = in_one_order(spec, fitting), in_one_order(spec, dict(truth))
    ties = _ties(captured, ours, right, bounds)
    checks = {}
    for name, exact in right.items():
        equal = name in outputs and bits_equal(outputs[name], reference[name])
        if name not in ours:
            infinite = float("inf")
            checks[name] = OutputCheck(infinite, infinite, 0.0, 0.0, False, "over")
            continue
        value = ours[name]
        if ties is not None and exact.shape == right[spec.discrete[0]].shape:
            value = torch.where(ties[:, None], exact.to(value.dtype), value)
        if name in spec.discrete:
            share = float((value != exact).any(-1).double().mean()) if exact.numel() else 0.0
            verdict = "over" if share else "ok"
            checks[name] = OutputCheck(share, share, 0.0, 0.0, equal, verdict)
        elif not judged(captured, name, exact):
            checks[name] = OutputCheck(0.0, 0.0, 0.0, 0.0, equal, "unjudged")
        else:
            limit, limit_row = bounds[name]
            error, row = tensor_and_row_error(value, exact)
            if bool(masks_differ(value, exact).any()):
                error = row = float("inf")
            verdict = "ok" if error <= limit and row <= limit_row else "over"
            checks[name] = OutputCheck(error, row, limit, limit_row, equal, verdict)
    return checks


class _Given(Limits):
    """Limits that are known for one call."""

    def __init__(self, bounds: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(torch.float32)
        self.bounds = bounds

    def of(self, op: str, output: str, rows: int | None = None) -> tuple[float, float]:
        return self.bounds.get(output, (0.0, 0.0))


def _ties(
    captured: Captured,
    ours: Mapping[str, Tensor],
    right: dict[str, Tensor],
    bounds: Mapping[str, tuple[float, float]],
) -> Tensor | None:
    """Rows [n] whose sets differ by no more than the noise of their scores; None without sets."""
    names = [name for name in captured.site.spec.discrete if name in ours and right[name].numel()]
    if not names:
        return None
    mine, theirs = ours[names[0]], right[names[0]]
    scores, noise = decision_scores(captured, right, _Given(bounds))
    differ = (mine != theirs).any(-1)
    in_range = scores is None or bool((mine < scores.shape[1]).all())
    if scores is None or not in_range or not bool(differ.any()):
        return torch.zeros_like(differ)
    return differ & (spread(mine, theirs, scores) <= noise)
