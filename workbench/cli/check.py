"""`dsv4-bench check`: a route against the reference, every site, with a verdict in one sentence."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.cli import common, output

_EXIT = {"clean": ExitCode.OK, "found": ExitCode.FOUND, "partial": ExitCode.CANNOT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_engine_arguments(parser)
    common.add_prompt_arguments(parser)
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        metavar="N",
        help="runs of every op on the same inputs, whose bits must agree (default 2)",
    )
    parser.add_argument(
        "--poison",
        choices=("on", "off"),
        default="on",
        help="one more run with NaN in recycled memory, unused rows and guard zones (default on)",
    )
    parser.add_argument(
        "--limits", metavar="FILE", help="write the calibrated limits with their evidence"
    )


def run(args: argparse.Namespace) -> int:
    tokens = common.read_tokens(args.tokens)
    chunks = common.parse_chunks(args.chunks)
    if args.repeats < 1:
        raise DSV4Error(f"--repeats {args.repeats}", "an op runs at least once")
    if args.limits and not Path(args.limits).parent.is_dir():
        raise DSV4Error(f"no such folder: {Path(args.limits).parent}")

    from dsv4_bench.workbench.checking import Checker, default_chunks
    from dsv4_bench.workbench.loading import load_model, prompt_tokens

    loaded = load_model(common.engine_options(args))
    prompt = prompt_tokens(loaded, args.prompt, tokens)
    checker = Checker(
        loaded.model, loaded.model.route, repeats=args.repeats, poison=args.poison == "on"
    )
    report = checker.run(prompt, chunks or default_chunks(len(prompt)), _progress)
    if args.limits:
        checker.limits.save(Path(args.limits))
    document = report.to_dict()
    if args.json:
        output.print_json(document)
    else:
        print(describe(document, len(prompt)))
    return int(_EXIT[report.status])


def _progress(text: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{text}\033[K", end=end, file=sys.stderr, flush=True)


def describe(document: dict[str, Any], tokens: int) -> str:
    """The verdict, the first divergence, the sites over their limit, and what was not covered."""
    covered = len(document["sites"]) - len(document["uncovered"])
    head = f"{document['status']}: {covered} of {len(document['sites'])} sites checked on {tokens} tokens"
    lines = [
        f"{head} in {document['seconds']:.1f} s; logits differ by {document['logits_error']:.1e}"
    ]
    first = document["first"]
    if first:
        lines += ["", f"first: {first['sentence']}"]
        lines.append(
            f"       {first['kind']}, own error {first['own_error']:.2g}, limit {first['limit']:.2g}, "
            f"carried {first['carried_error']:.2g}"
        )
        lines += [f"       broken: {sentence}" for sentence in first["invariants"]]
    over = [site for site in document["sites"] if site["verdict"] == "over"]
    if over:
        rows = [
            (
                s["site"],
                s["implementation"],
                f"{s['own_error']:.1e}",
                f"{s['limit']:.1e}",
                f"{s['carried_error']:.1e}",
            )
            for s in over[:20]
        ]
        lines += ["", output.table(("site", "route", "own error", "limit", "carried"), rows)]
        if len(over) > 20:
            lines.append(f"and {len(over) - 20} more")
    if document["uncovered"]:
        reasons = sorted({item["why"] for item in document["uncovered"]})
        lines += ["", f"not checked: {len(document['uncovered'])} sites ({'; '.join(reasons)})"]
    return "\n".join(lines)
