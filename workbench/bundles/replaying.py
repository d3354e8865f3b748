"""`replay`: captured ops again, from the bundle alone, on this machine's implementations

Each op runs on its captured arguments: the reference, which has to give the stored bits, the oracle
in float64, and the implementation the route names. Nothing in the bundle is executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.registry import (
    Context,
    Implementation,
    RouteEntry,
    choose,
    matches,
    reference,
)
from dsv4_bench.probes.bundle import BadBundle, Bundle, BundleCall, CallEntry, OutputCheck, judge
from dsv4_bench.probes.bundle.machine import differences
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.workbench.loading import pick_device, read_route

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class OpReplay:
    """One op here, beside what was captured there.

    `stored` and `checks` are the verdicts there and here; `reference_bits` whether the reference gave
    the stored bits, `same_bits` whether the implementation did. `note` says why it did not run.
    """

    label: str
    site: str
    op: str
    forward: int
    there: str
    here: str
    verdict: str  # ok, over, unjudged, not run
    stored_verdict: str
    reference_bits: bool
    same_bits: bool
    checks: dict[str, OutputCheck] = field(default_factory=dict)
    stored: dict[str, OutputCheck] = field(default_factory=dict)
    note: str = ""

    @property
    def words(self) -> str:
        """What the replay says about the captured verdict."""
        if self.verdict == "not run":
            return f"not run: {self.note}"
        if self.stored_verdict != "over":
            return "wrong here, right there" if self.verdict == "over" else "right, as it was there"
        return "reproduced" if self.verdict == "over" else "not reproduced: right here, wrong there"

    def to_dict(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "op": self.op,
            "forward": self.forward,
            "captured": self.there,
            "ran": self.here,
            "verdict": self.verdict,
            "captured_verdict": self.stored_verdict,
            "reference_bits_equal": self.reference_bits,
            "bits_equal": self.same_bits,
            "outputs": {name: check.to_dict() for name, check in self.checks.items()},
            "captured_outputs": {name: check.to_dict() for name, check in self.stored.items()},
            "note": self.note,
            "sentence": f"{self.site}: {self.words}",
        }


@dataclass
class ReplayReport:
    """All ops. `status`: clean, found (one is over its limit here), or partial (one did not run)."""

    ops: list[OpReplay] = field(default_factory=list)
    machine: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        verdicts = {op.verdict for op in self.ops}
        if "over" in verdicts:
            return "found"
        return "partial" if "not run" in verdicts or not self.ops else "clean"

    def to_dict(self) -> dict[str, Any]:
        first = next((op for op in self.ops if op.verdict == "over"), None)
        return {
            "status": self.status,
            "first": first.to_dict() if first else None,
            "ops": [op.to_dict() for op in self.ops],
            "other_bits_expected": self.machine,
        }


class Replayer:
    """Replays the ops of a bundle; without a route on the implementations that were captured.

    `device` is cpu or cuda; without one it is where the bundle was made, if this machine has that.
    """

    def __init__(
        self, bundle: Bundle, route: Sequence[str] = (), device: str | None = None
    ) -> None:
        import dsv4_bench.engine.implementations  # noqa: F401  (registers them)

        self.bundle = bundle
        self.device = _device(bundle, device)
        self.route = read_route(route)
        self.context = Context(self.device.type, _DTYPES[bundle.dtype])

    def run(self, entries: Iterable[CallEntry]) -> ReplayReport:
        """Replay `entries`, in order. Raises BadBundle if one is damaged."""
        report = ReplayReport(machine=differences(self.bundle.manifest["versions"]))
        there = self.bundle.manifest.get("device", "cpu")
        if there != self.device.type:
            report.machine.append(f"device {self.device.type} here, {there} there")
        for entry in entries:
            report.ops.append(self.replay(entry, self.bundle.load(entry, self.device)))
        return report

    def implementation(self, entry: CallEntry) -> tuple[Implementation | None, str]:
        """What shall run at `entry`'s site, or None and the reason."""
        name = entry.stamp.get("implementation", "reference")
        asked: RouteEntry | None = None
        for item in self.route:
            if matches(entry.site.path, item.pattern):
                asked, name = item, item.name
        found, note = choose(entry.site.op, name, self.context)
        if not note or (asked is not None and (name == "kernel" or not asked.explicit)):
            return found, note
        return None, note

    @torch.inference_mode()
    def replay(self, entry: CallEntry, call: BundleCall) -> OpReplay:
        """One op, loaded. Raises BadBundle if even the reference cannot run on its arguments."""
        captured = call.captured
        right, truth = run_reference(captured, entry.label)
        chosen, note = self.implementation(entry)
        result = OpReplay(
            entry.label,
            entry.site.path,
            entry.site.op,
            entry.forward,
            entry.stamp.get("implementation", "?"),
            chosen.name if chosen else "",
            "not run",
            call.verdict,
            all(bits_equal(right[name], stored) for name, stored in call.reference.items()),
            False,
            stored=call.checks,
            note=note,
        )
        if chosen is None:
            return result
        bounds = {name: (check.limit, check.limit_row) for name, check in call.checks.items()}
        try:
            ours = captured.run(chosen.function)
            result.checks = judge(captured, ours, right, truth, bounds)
        except Exception as error:  # of a kernel, or a user's plugin: it may raise anything
            text = error.message if isinstance(error, DSV4Error) else " ".join(str(error).split())
            result.note = f"{type(error).__name__}: {text[:200]}"
            return result
        result.verdict = BundleCall(captured, 0, right, result.checks).verdict
        result.same_bits = all(
            name in ours and bits_equal(ours[name], value)
            for name, value in captured.outputs.items()
        )
        return result


def _device(bundle: Bundle, name: str | None) -> torch.device:
    """The device to replay on. Raises CannotAnswer for one that this machine lacks."""
    there = bundle.manifest.get("device")
    if name is None and not (there == "cuda" and torch.cuda.is_available()):
        return torch.device("cpu")
    return pick_device(name)


def run_reference(captured: Captured, where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's outputs, and the truth in float64. Raises BadBundle if they cannot be had."""
    try:
        return captured.run(reference(captured.site.op)), captured.oracle()
    except DSV4Error as error:
        raise BadBundle(f"{where}: {error.message}") from error
    except Exception as error:  # shapes that do not go together: whatever torch says to them
        text = " ".join(str(error).split())[:200]
        raise BadBundle(f"{where} cannot be run: {type(error).__name__}: {text}") from error


def require_calls(bundle: Bundle, entries: Sequence[CallEntry]) -> None:
    """Raise CannotAnswer for a bundle without ops: nothing replayed is no pass."""
    if not entries:
        raise CannotAnswer(f"{bundle.path} holds no captured ops", "dump with larger --max-size")
