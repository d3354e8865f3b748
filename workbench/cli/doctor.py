"""`dsv4-bench doctor`: the environment report for bug reports."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4_bench.engine.errors import ExitCode
from dsv4_bench.workbench.cli.output import narrate, print_json

_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "not configured": "-   "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--short", action="store_true", help="without torch.utils.collect_env's part"
    )


def run(args: argparse.Namespace) -> int:
    from dsv4_bench.workbench.doctor import FAIL, examine

    data = examine()
    if args.json:
        print_json(data)
    else:
        print(report(data, args.short))
    if data["status"] == FAIL:
        narrate("dsv4-bench: something needed is missing; see FAIL above")
        return ExitCode.FOUND
    return ExitCode.OK


def report(data: dict[str, Any], short: bool = False) -> str:
    """The report for people: one line a check, hints below."""
    lines = []
    for title, checks in data["sections"].items():
        lines.append(title)
        for check in checks:
            lines.append(f"  {_MARKS[check['status']]} {check['name']}: {check['value']}")
            if check["hint"]:
                lines.append(f"         {check['hint']}")
    lines.append("variables")
    lines += [f"       {name}={value}" for name, value in data["variables"].items()]
    if not short:
        lines.append("torch.utils.collect_env")
        for name, value in data["torch_environment"].items():
            text = "\n".join(value) if isinstance(value, list) else str(value)
            lines.append(f"       {name}: " + text.replace("\n", "\n           "))
    return "\n".join(lines)
