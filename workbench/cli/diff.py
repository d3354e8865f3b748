"""`dsv4-bench diff`: the first difference between two bundles"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import ExitCode
from dsv4_bench.workbench.cli import output

_MOST_ROWS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a bundle: the one to compare with")
    parser.add_argument("b", metavar="B", help="the other: other kernel, machine or commit")


def run(args: argparse.Namespace) -> int:
    from dsv4_bench.probes.bundle import open_bundle
    from dsv4_bench.workbench.bundles.diffing import diff
    from dsv4_bench.workbench.loading import load_plugins

    load_plugins(args.plugin)
    report = diff(open_bundle(Path(args.a)), open_bundle(Path(args.b)), output.progress)
    document = report.to_dict()
    if args.json:
        output.print_json(document)
    else:
        print(describe(document))
    return int(ExitCode.FOUND if report.first else ExitCode.OK)


def describe(document: dict[str, Any]) -> str:
    """The first difference, what differs around the ops, and a table of those that differ."""
    lines = [f"{document['status']}: {document['sentence']}"]
    if document["around"]:
        lines += ["", *document["around"]]
    differing = [op for op in document["ops"] if op["blame"] != "equal"]
    equal = len(document["ops"]) - len(differing)
    if differing:
        header = ("op", "pass", "A", "B", "inputs", "output", "differs by", "limit", "blame")
        lines += ["", output.table(header, [_row(op) for op in differing[:_MOST_ROWS]])]
        if len(differing) > _MOST_ROWS:
            lines.append(f"and {len(differing) - _MOST_ROWS} more")
        lines.append(f"{equal} of {len(document['ops'])} ops are bitwise equal")
    return "\n".join(lines)


def _row(op: dict[str, Any]) -> tuple[str, ...]:
    return (
        op["site"],
        str(op["forward"]),
        op["a"],
        op["b"],
        f"{op['input_error']:.1e}",
        op["output"],
        f"{op['output_error']:.1e}",
        f"{op['limit']:.1e}",
        op["blame"],
    )
