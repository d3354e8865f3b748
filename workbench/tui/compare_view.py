"""Two bundles compared, as text: what is said on top, and one row an op. Pure."""

from __future__ import annotations

from typing import Any

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.records import real
from dsv4_bench.workbench.tui.results import columns
from dsv4_bench.workbench.tui.spans import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Line

Report = dict[str, Any]
# What is to blame for a difference: its sign, and what it means.
BLAMES = {
    "here": (fmt.ALARM, BAD, "the op computes something else on the same inputs"),
    "carried": ("~", WARN, "its inputs differ already"),
    "within": (fmt.DONE, GOOD, "within its limit"),
    "equal": ("=", DIM, "the same bits"),
}
HEADER = ("", "op", "pass", "A", "B", "inputs", "differs by", "limit", "output")
NARROW = (0, 1, 2, 5, 6, 7)  # the columns of HEADER that fit 80
WIDE = 100


def shown(report: Report, everything: bool) -> list[int]:
    """Numbers of the ops to list: those that differ, or all of them."""
    return [
        number for number, op in enumerate(report["ops"]) if everything or op["blame"] != "equal"
    ]


def first_shown(report: Report, numbers: list[int]) -> int:
    """The row of the first op beyond its limit, else the first row."""
    guilty = ("here", "carried")
    rows = (row for row, number in enumerate(numbers) if report["ops"][number]["blame"] in guilty)
    return next(rows, 0)


def table(report: Report, numbers: list[int], width: int) -> tuple[str, list[tuple[str, str]]]:
    """The header line, and (text, style) of a row for each of `numbers`."""
    rows = [HEADER, *(_cells(report["ops"][number]) for number in numbers)]
    if width < WIDE:
        rows = [tuple(row[i] for i in NARROW) for row in rows]
    texts = [fmt.clip(text, width) for text in columns(rows)]
    styles = [BLAMES[report["ops"][number]["blame"]][1] for number in numbers]
    return texts[0], list(zip(texts[1:], styles, strict=True))


def _cells(op: Report) -> tuple[str, ...]:
    sign = BLAMES[op["blame"]][0]
    return (
        sign, op["site"], str(op["forward"]), op["a"], op["b"],
        fmt.number(real(op["input_error"])), fmt.number(real(op["output_error"])),
        fmt.number(real(op["limit"])), op["output"],
    )  # fmt: skip


def head_lines(report: Report, width: int) -> list[Line]:
    """The verdict in a sentence, what else differs around the ops, and how many do."""
    bad = report["status"] == "different"
    mark, style = (fmt.ALARM, BAD) if bad else (fmt.DONE, GOOD)
    lines: list[Line] = [[(fmt.clip(f"{mark} {report['sentence']}", width), style)]]
    if report["around"]:
        lines.append([(fmt.clip("; ".join(report["around"]), width), PLAIN)])
    counts = {blame: 0 for blame in BLAMES}
    for op in report["ops"]:
        counts[op["blame"]] += 1
    words: Line = []
    for blame, (sign, colour, _) in BLAMES.items():
        if counts[blame]:
            words += [(f"{sign} ", colour), (f"{counts[blame]} {blame}  ", DIM)]
    return [*lines, words or [("no ops", BOLD)]]
