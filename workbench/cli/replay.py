"""`dsv4-bench replay`: captured ops again, from the bundle alone, on this machine"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.cli import output

_EXIT = {"clean": ExitCode.OK, "found": ExitCode.FOUND, "partial": ExitCode.CANNOT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder or zip that `dump` wrote")
    parser.add_argument("site", nargs="?", metavar="SITE", help="one site, or a glob")
    parser.add_argument(
        "--route",
        action="append",
        default=[],
        metavar="R",
        help="SITE_GLOB=IMPL or IMPL; repeatable, later wins (default: what was captured)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: where the bundle was made, if it is here",
    )
    parser.add_argument("--forward", type=int, metavar="N", help="only this forward pass")
    parser.add_argument(
        "--minimise",
        action="store_true",
        help="shrink tokens, heads and experts of each wrong op while it stays wrong",
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT[.zip]", help="with --minimise: write the smaller bundle"
    )


def run(args: argparse.Namespace) -> int:
    if args.out and not args.minimise:
        raise DSV4Error("-o needs --minimise", "replay writes nothing else")

    from dsv4_bench.probes.bundle import open_bundle
    from dsv4_bench.workbench.bundles.replaying import Replayer, require_calls
    from dsv4_bench.workbench.loading import load_plugins

    load_plugins(args.plugin)
    bundle = open_bundle(Path(args.bundle))
    require_calls(bundle, bundle.calls)
    entries = bundle.select(args.site)
    if args.forward is not None:
        entries = [entry for entry in entries if entry.forward == args.forward]
        if not entries:
            raise DSV4Error(f"--forward {args.forward}: nothing of it was captured")
    replayer = Replayer(bundle, args.route, args.device)
    report = replayer.run(entries)
    document: dict[str, Any] = report.to_dict()
    if args.minimise:
        from dsv4_bench.workbench.bundles.shrinking import minimise

        target = Path(args.out) if args.out else None
        document["minimised"] = minimise(replayer, entries, report, target, output.narrate)
    if args.json:
        output.print_json(document)
    else:
        print(describe(document))
    return int(_EXIT[report.status])


def describe(document: dict[str, Any]) -> str:
    """A verdict, a table of ops, and how far bits can be compared with the other machine."""
    ops = document["ops"]
    over = [op for op in ops if op["verdict"] == "over"]
    missing = [op for op in ops if op["verdict"] == "not run"]
    head = f"{document['status']}: {len(ops)} ops, {len(over)} over their limit"
    lines = [head + (f", {len(missing)} not run" if missing else "")]
    if document["first"]:
        lines += [f"first: {document['first']['sentence']}"]
    header = (
        "op",
        "pass",
        "captured",
        "ran here",
        "own error",
        "limit",
        "there",
        "bits",
        "verdict",
    )
    lines += ["", output.table(header, [_row(op) for op in ops])]
    lines += [f"not run: {op['site']} #{op['forward']}: {op['note']}" for op in missing]
    if missing:
        lines.append("--plugin FILE.py brings an implementation along, --route names another one")
    equal = sum(op["reference_bits_equal"] for op in ops)
    lines += ["", f"reference: {equal} of {len(ops)} ops give the stored bits"]
    if document["other_bits_expected"]:
        lines.append(
            f"  other machine, so other bits are fine: {'; '.join(document['other_bits_expected'])}"
        )
    for item in document.get("minimised", {}).get("ops", []):
        lines.append(f"minimised {item['site']} #{item['forward']}: {item['sentence']}")
    if document.get("minimised", {}).get("bundle"):
        lines.append(f"written: {document['minimised']['bundle']}")
    return "\n".join(lines)


def _row(op: dict[str, Any]) -> tuple[str, ...]:
    worst = _worst(op["outputs"])
    there = _worst(op["captured_outputs"])
    shown = (f"{worst['own_error']:.2e}", f"{worst['limit']:.1e}") if worst else ("", "")
    return (
        op["site"],
        str(op["forward"]),
        op["captured"],
        op["ran"],
        *shown,
        f"{there['own_error']:.2e}" if there else "",
        "same" if op["bits_equal"] else "other",
        op["verdict"],
    )


def _worst(checks: dict[str, Any]) -> dict[str, Any] | None:
    """The check that is over, else the one with the largest error."""
    rated = [check for check in checks.values() if check["verdict"] != "unjudged"]
    return max(rated, key=lambda c: (c["verdict"] == "over", c["own_error"]), default=None)
