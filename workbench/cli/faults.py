"""`dsv4-bench faults`: the mutation suite, its clean counterpart, and what each fault does to the demo"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.cli import output

_MARK = {True: "yes", False: "no"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="FAULT", help="names, globs or families (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="what there is, without running it")
    parser.add_argument(
        "--clean",
        type=int,
        metavar="N",
        help="check N clean checkpoints and count alarms (with FAULT: both)",
    )
    parser.add_argument("--markdown", action="store_true", help="the result as a markdown table")
    parser.add_argument(
        "--blast",
        metavar="FILE.json",
        help="measure what the faults do to the demo's answers; kept in FILE, goes on where it stopped",
    )


def run(args: argparse.Namespace) -> int:
    if args.clean is not None and args.clean < 1:
        raise DSV4Error(f"--clean {args.clean}: at least one checkpoint is needed")

    import dsv4_bench.probes.faults.catalogue  # noqa: F401
    from dsv4_bench.probes.faults.base import select_faults
    from dsv4_bench.workbench.loading import load_plugins

    load_plugins(args.plugin)
    faults = select_faults(args.names)
    if args.list:
        return _list(faults, args)
    if args.blast:
        return _blast(faults, args)
    return _score(faults, args)


def _list(faults: list[Any], args: argparse.Namespace) -> int:
    if args.json:
        output.print_json({"faults": [_described(f) for f in faults]})
        return 0
    rows = [(f.family, f.name, " or ".join(f.kinds), " + ".join(f.sites), f.doc) for f in faults]
    print(output.table(("family", "fault", "kind", "sites", "what is wrong"), rows))
    return 0


def _described(fault: Any) -> dict[str, Any]:
    return {
        "name": fault.name,
        "family": fault.family,
        "doc": fault.doc,
        "ops": list(fault.parts),
        "sites": list(fault.sites),
        "route": fault.route,
        "kinds": list(fault.kinds),
        "why": fault.why,
        "source": fault.source,
        "layout": fault.layout,
        "data": fault.data,
        "knockout": fault.knockout,
    }


# ------------------------------------------------------------------------------ blast radius


def _blast(faults: list[Any], args: argparse.Namespace) -> int:
    """Knock-outs belong to the blast radius of everything, though they are no faults."""
    from dsv4_bench.probes.faults.base import select_faults
    from dsv4_bench.workbench.checking.blast_radius import HEADER, BlastRadius, row

    file = Path(args.blast)
    if not file.parent.is_dir():
        raise DSV4Error(f"no such folder: {file.parent}")
    if not args.names:
        faults = [*faults, *select_faults(["knockout"])]
    document = BlastRadius(file).run(faults, _progress)
    if args.json:
        output.print_json(document)
        return 0
    rows = [row("(none)", document["healthy"])]
    names = {fault.name for fault in faults}
    found = [(name, f) for name, f in document["faults"].items() if name in names]
    rows += [row(name, f) for name, f in sorted(found, key=lambda item: _harm(item[1]))]
    print(output.table(HEADER, rows))
    return 0


def _harm(found: dict[str, Any]) -> float:
    """Sorts by harm, the worst first: crashes, NaN, then the loss."""
    loss = found.get("loss", float("inf"))
    return float("-inf") if loss != loss else -loss


# ------------------------------------------------------------------------------ detection


def _score(faults: list[Any], args: argparse.Namespace) -> int:
    from dsv4_bench.workbench.checking import fault_suite

    started = time.monotonic()
    document: dict[str, Any] = {"status": "passed", "score": None, "faults": [], "clean": []}
    if args.clean is None or args.names:
        outcomes = fault_suite.run_faults(faults, _progress)
        document["score"] = fault_suite.score(outcomes)
        document["faults"] = [outcome.to_dict() for outcome in outcomes]
    if args.clean is not None:
        document["clean"] = fault_suite.run_clean(args.clean, _progress)
    alarms = sum(bool(case["alarms"]) for case in document["clean"])
    passed = not alarms and (document["score"] is None or document["score"]["passed"])
    document["status"] = "passed" if passed else "failed"
    document["seconds"] = time.monotonic() - started
    if args.json:
        output.print_json(document)
    else:
        print(markdown(document) if args.markdown else describe(document))
    return int(ExitCode.OK if passed else ExitCode.FOUND)


def _progress(text: str, done: int, total: int) -> None:
    """On a terminal one line that changes; in a log a line for every tenth."""
    if sys.stderr.isatty():
        output.progress(text, done, total)
    elif done == total or done % max(1, total // 10) == 0:
        output.narrate(f"{done}/{total} {text}")


def _verdict(row: dict[str, Any]) -> str:
    if row["crashed"]:
        return f"crashed: {row['crashed']}"
    return row["sentence"] or "not detected"


def describe(document: dict[str, Any]) -> str:
    """The score, then every fault that was not named rightly with what was said of it."""
    lines = [*_summary(document), ""]
    for row in document["faults"]:
        if not (row["op_right"] and row["layer_right"] and row["kind_right"]):
            wanted = f"{' or '.join(row['expected_kinds'])} at {' + '.join(row['expected_sites'])}"
            lines.append(f"{row['fault']}: expected {wanted}")
            lines.append(f"    {row['kind'] or '-'}: {_verdict(row)}")
    for case in document["clean"]:
        lines += [f"{case['case']}: {alarm}" for alarm in case["alarms"]]
    return "\n".join(lines).rstrip()


def _summary(document: dict[str, Any]) -> list[str]:
    lines = []
    score = document["score"]
    if score:
        total = score["faults"]
        shares = ", ".join(
            f"{label} {score[name]} ({score[name] / total:.0%})"
            for label, name in (
                ("detected", "detected"),
                ("right op", "op"),
                ("right layer", "layer"),
                ("right kind", "kind"),
            )
        )
        lines.append(f"{total} faults: {shares}")
    if document["clean"]:
        alarms = sum(bool(case["alarms"]) for case in document["clean"])
        lines.append(f"{len(document['clean'])} clean checkpoints: {alarms} with an alarm")
    lines.append(f"{document['status']} in {document['seconds']:.0f} s")
    return lines


def markdown(document: dict[str, Any]) -> str:
    """The README's table: a family a row, then every fault."""
    lines = ["; ".join(_summary(document)), ""]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in document["faults"]:
        families.setdefault(row["family"], []).append(row)
    cells = [
        (
            family,
            len(rows),
            *(
                sum(r[key] for r in rows)
                for key in ("detected", "op_right", "layer_right", "kind_right")
            ),
            f"{sum(r['seconds'] for r in rows) / len(rows):.1f}",
        )
        for family, rows in families.items()
    ]
    header = ("family", "faults", "detected", "right op", "right layer", "right kind", "s each")
    lines += [output.table(header, cells), ""]
    cells = [
        (
            row["fault"],
            row["doc"].rstrip("."),
            _MARK[row["detected"]],
            _MARK[row["op_right"]],
            _MARK[row["layer_right"]],
            f"{row['kind'] or '-'}{'' if row['kind_right'] else ' (no)'}",
            f"{row['seconds']:.1f}",
        )
        for row in document["faults"]
    ]
    header = ("fault", "what is wrong", "detected", "op", "layer", "kind", "s")
    return "\n".join([*lines, output.table(header, cells)])
