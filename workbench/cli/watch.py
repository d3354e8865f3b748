"""`dsv4-bench watch SITE [CKPT]`: rebuild and re-run one op whenever its code is saved"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.cli import common, output
from dsv4_bench.workbench.saving import fingerprint

if TYPE_CHECKING:
    from dsv4_bench.workbench.session import Session

_PAUSE = 0.2  # seconds between two looks at the files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site", metavar="SITE", help="e.g. L12/attn/core; its kernel is watched")
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CKPT", help="checkpoint folder (default: demo)"
    )
    parser.add_argument(
        "--attempts", type=int, metavar="N", help="stop after N runs (default: never)"
    )
    common.add_session_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.attempts is not None and args.attempts < 1:
        raise DSV4Error(f"--attempts {args.attempts}: at least 1", "leave it out to watch for ever")
    options = common.session_options(args)
    from dsv4_bench.workbench.session import Session

    attempts: list[dict[str, Any]] = []
    with Session(options) as session:
        session.wait_open()
        try:
            for attempt in _attempts(session, args.site):
                attempts.append(attempt)
                if not args.json:
                    print(describe(attempt), flush=True)
                if len(attempts) == args.attempts:
                    break
        finally:
            if args.json:
                output.print_json({"site": args.site, "attempts": attempts})
    last = attempts[-1]
    wrong = bool(last["error"]) or last["verdict"] == "over"
    return int(ExitCode.FOUND if wrong else ExitCode.OK)


def _attempts(session: Session, site: str) -> Iterator[dict[str, Any]]:
    """One attempt now, then one after every save that changed something; without an end.

    A kernel that kills the worker, at the first attempt too, is an attempt: its code is not run again
    as it is.
    """
    from dsv4_bench.workbench.session import WorkerDied

    found = session.command(f"sources {site}")
    kernel, files = found["implementation"], [Path(name) for name in found["files"]]
    stands = False
    while True:
        seen = fingerprint(files)
        try:
            if not stands:
                session.command(f"until {site}")
                stands = True
            reply = session.command("reload")
        except WorkerDied as death:
            yield {"site": site, "implementation": kernel, "error": death.message}
            while fingerprint(files) == seen:
                time.sleep(_PAUSE)
            session.command("restart")
            session.command(f"route {site}={kernel}")  # the restart put it on the reference
            stands = False
            continue
        if reply["reloaded"]:
            yield reply["history"][-1]
        time.sleep(_PAUSE)


def describe(attempt: dict[str, Any]) -> str:
    """One attempt in a line."""
    if attempt["error"]:
        return f"{attempt['implementation']}: {attempt['error']}"
    error = "own error not compared"
    if attempt["own_error"] is not None:
        error = f"own error {attempt['own_error']:.2e}, limit {attempt['limit']:.1e}: {attempt['verdict']}"
    return (
        f"{attempt['implementation']} {attempt['hash']}  {error}  {1e6 * attempt['seconds']:.1f} us  "
        f"({attempt['took']:.2f} s)"
    )
