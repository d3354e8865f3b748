"""From captured ops to a published bundle: the manifest, reports and plots around them

    write_bundle(Path("bug.zip"), model, facts, calls, readings, limits)

is for whoever has captured something already: `check --bundle`, the TUI, a script. `dump` fills a
`Writer` itself, as it goes, and calls `finish`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_bench.engine.model import Transformer
from dsv4_bench.probes.bundle import BundleCall, LeftOut, Writer
from dsv4_bench.probes.bundle.format import plain
from dsv4_bench.probes.bundle.machine import machine
from dsv4_bench.probes.bundle.standalone_script import standalone_script
from dsv4_bench.probes.limits import Limits
from dsv4_bench.probes.readings import Reading
from dsv4_bench.workbench.doctor import examine as examine_machine
from dsv4_bench.workbench.doctor import scrub

DEFAULT_MAX_BYTES = 25_000_000  # what an issue accepts
REPORT_BYTES = 2_000_000  # of it, for manifest, readings, reports, plots and replay.py
_READINGS_BYTES = 800_000  # of those, for readings


@dataclass
class RunFacts:
    """The run that captured ops come from.

    `chunks` are the tokens of each forward pass, `observer` what watching cost and changed (None: not
    measured), `selected` how many sites were asked for, `left_out` what else did not get in.
    """

    tokens: Sequence[int]
    chunks: Sequence[int]
    layout: str = ""
    command: Sequence[str] = field(default_factory=lambda: [Path(sys.argv[0]).name, *sys.argv[1:]])
    observer: Mapping[str, Any] | None = None
    selected: int = 0
    left_out: Sequence[LeftOut] = ()
    stamps: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Written:
    """A published bundle: where, how large, how many ops, and what is not in it."""

    path: Path
    bytes: int
    calls: int
    left_out: list[LeftOut]
    first: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.path),
            "bytes": self.bytes,
            "calls": self.calls,
            "left_out": [vars(item) for item in self.left_out],
            "first": self.first,
        }


def write_bundle(
    target: Path,
    model: Transformer,
    facts: RunFacts,
    calls: Iterable[BundleCall],
    readings: Iterable[Reading],
    limits: Limits | None = None,
    max_bytes: int | None = DEFAULT_MAX_BYTES,
) -> Written:
    """Write a bundle of what has been captured; `probes.bundle.examine` makes a BundleCall.

    Raises DSV4Error if it cannot be written; then the target is as it was.
    """
    rows = [reading.to_dict() for reading in readings]
    room = None if max_bytes is None else max(0, max_bytes - REPORT_BYTES)
    with Writer(target, room) as writer:
        for call in calls:
            writer.add_call(call)
        return finish(writer, model, facts, rows, limits)


def finish(
    writer: Writer,
    model: Transformer,
    facts: RunFacts,
    readings: Sequence[Mapping[str, Any]],
    limits: Limits | None,
) -> Written:
    """Add readings, reports and plots to a writer that has its calls, and publish it."""
    from dsv4_bench.workbench.bundles.plots import draw_plots
    from dsv4_bench.workbench.bundles.reporting import html_report, markdown_report

    writer.sort_calls(list(model.sites))
    writer.left_out += facts.left_out
    manifest = _manifest(writer, model, facts, limits)
    kept = readings
    if writer.max_bytes is not None:
        kept = _most_useful(readings, {call["site"] for call in writer.calls})
    manifest["coverage"]["readings"] = len(kept)
    manifest["coverage"]["readings_left_out"] = len(readings) - len(kept)
    writer.add_readings(kept)
    plots = draw_plots(readings, writer.calls, len(model.layers))
    for plot in plots:
        writer.add_file(f"plots/{plot.name}.png", plot.png)
        writer.add_file(f"plots/{plot.name}.svg", plot.svg)
    report = {**manifest, "left_out": [vars(item) for item in writer.left_out]}
    writer.add_file("report.md", markdown_report(report, writer.calls, readings).encode())
    html = html_report(report, writer.calls, readings, plots)
    writer.add_file("report.html", html.encode())
    writer.add_file("replay.py", standalone_script().encode())
    size = writer.publish(manifest)
    return Written(writer.target, size, len(writer.calls), writer.left_out, manifest["first"])


def _most_useful(
    readings: Sequence[Mapping[str, Any]], captured: Collection[str]
) -> list[Mapping[str, Any]]:
    """As many readings as fit: alarms first, then those of captured sites; in their old order."""

    def rank(item: tuple[int, Mapping[str, Any]]) -> tuple[bool, bool, int]:
        number, row = item
        return row["verdict"] != "alarm", row["site"] not in captured, number

    room, numbers = _READINGS_BYTES, []
    for number, row in sorted(enumerate(readings), key=rank):
        room -= len(json.dumps(plain(dict(row)))) + 1
        if room < 0:
            break
        numbers.append(number)
    return [readings[number] for number in sorted(numbers)]


def _manifest(
    writer: Writer, model: Transformer, facts: RunFacts, limits: Limits | None
) -> dict[str, Any]:
    stamps = facts.stamps or {path: site.stamp.to_dict() for path, site in model.sites.items()}
    captured = {call["site"] for call in writer.calls}
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": scrub([str(word) for word in facts.command]),
        "versions": machine(),
        "checkpoint": {
            "name": model.checkpoint.folder.name,
            "layout": facts.layout,
            "config": model.config.to_json(),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "numerics": "plain",
        "route": [str(entry) for entry in model.route],
        "stamps": {path: dict(stamp) for path, stamp in stamps.items()},
        "tokens": list(facts.tokens),
        "chunks": list(facts.chunks),
        "coverage": {
            "sites": len(model.sites),
            "selected": facts.selected or len(captured),
            "captured": len(captured),
            "calls": len(writer.calls),
            "over": sum(1 for call in writer.calls if _is_over(call)),
        },
        "observer": None if facts.observer is None else dict(facts.observer),
        "first": _first(writer.calls, model),
        "limits": None if limits is None else limits.to_dict(),
        "environment": examine_machine(),
    }


def _is_over(call: Mapping[str, Any]) -> bool:
    return any(check["verdict"] == "over" for check in call["checks"].values())


def _first(calls: Iterable[Mapping[str, Any]], model: Transformer) -> dict[str, Any] | None:
    """The first captured op with an output over its limit, in the words of `check`."""
    call = next((call for call in calls if _is_over(call)), None)
    if call is None:
        return None
    site = model.sites[call["site"]]
    output = next(n for n, check in call["checks"].items() if check["verdict"] == "over")
    check, signature = call["checks"][output], call["signature"] or {}
    return {
        "site": site.path,
        "op": site.op,
        "layer": site.layer,
        "forward": call["forward"],
        "output": output,
        "kind": signature.get("kind", "unexplained"),
        "own_error": check["own_error"],
        "limit": check["limit"],
        "sentence": f"{site.path}: {signature.get('detail', '')}",
    }
