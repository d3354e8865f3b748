"""`dsv4-bench tui`: the terminal UI."""

from __future__ import annotations

import argparse
import shlex
import sys

from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.workbench.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_session_arguments(parser)
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="open two bundles side by side"
    )


def run(args: argparse.Namespace) -> int:
    options = common.session_options(args)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CannotAnswer("tui needs a terminal", "`dsv4-bench script FILE` runs without one")
    from dsv4_bench.workbench.tui.app import run_tui

    return run_tui(options, lines=[shlex.join(["compare", *args.compare])] if args.compare else [])
