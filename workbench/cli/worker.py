"""`dsv4-bench worker`: the session protocol on stdin and stdout."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from dsv4_bench.workbench.worker import main

    return main(args.plugin)
