"""`dsv4-bench tui`: the terminal UI."""

from __future__ import annotations

import argparse
import sys

from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.workbench.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_session_arguments(parser)


def run(args: argparse.Namespace) -> int:
    options = common.session_options(args)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise CannotAnswer("tui needs a terminal", "`dsv4-bench script FILE` runs without one")
    from dsv4_bench.workbench.tui.app import run_tui

    return run_tui(options)
