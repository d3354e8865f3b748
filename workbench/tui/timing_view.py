"""Times of a layer's ops as text: totals on top, one row an op with its bar, in any order. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.records import real
from dsv4_bench.workbench.tui.results import columns
from dsv4_bench.workbench.tui.spans import BAD, BOLD, DIM, PLAIN, WARN, Line

Timing = dict[str, Any]
Row = dict[str, Any]
BAR = "█▉▊▋▌▍▎▏"  # eighths of a cell, full to thin
HEADER = ("", "op", "time", "floor", "of floor", "reference", "speed-up", "×limit", "route", "")
NARROW = (0, 1, 2, 4, 6, 7, 9)  # the columns of HEADER that fit 80
WIDE = 100
FASTER_THAN_FLOOR = (
    "below the floor: inputs are in a cache, or the ceilings were measured on a busy machine"
)
_NAME = 28


def seconds_of(row: Row) -> float:
    """Time on the kernel; the reference's where there is no kernel."""
    return float(row["seconds"].get(row["kernel"]) or row["seconds"]["reference"])


def gap_of(row: Row) -> float:
    """Seconds above the floor: what a perfect kernel would save."""
    return seconds_of(row) - float(row["floor"])


def times_of(row: Row) -> float | None:
    """Own error in units of its limit; None where nothing was compared."""
    error, limit = real(row["own_error"]), real(row["limit"])
    return error / limit if error is not None and limit else None


ORDERS: dict[str, tuple[str, Callable[[Row], float] | None]] = {
    "order": ("as they run", None),
    "time": ("longest first", seconds_of),
    "gap": ("furthest above the floor first", gap_of),
    "error": ("largest error first", lambda row: times_of(row) or -1.0),
}


def ordered(timing: Timing, order: str) -> list[Row]:
    """The rows in one of ORDERS."""
    rank = ORDERS[order][1]
    rows: list[Row] = timing["sites"]
    return rows if rank is None else sorted(rows, key=rank, reverse=True)


def table(timing: Timing, order: str, width: int) -> tuple[str, list[tuple[str, str]]]:
    """The header line, and (text, style) of a row for each op; bars share one scale."""
    rows = ordered(timing, order)
    longest = max(map(seconds_of, rows), default=0.0)
    cells = [HEADER, *(_cells(row) for row in rows)]
    picked = range(len(HEADER)) if width >= WIDE else NARROW
    texts = columns([[row[i] for i in picked] for row in cells], right=_numeric(picked))
    room = max(4, width - max(map(len, texts)) - 2)
    lines = [
        (text.ljust(max(map(len, texts))) + "  " + bar(seconds_of(row), longest, room), _style(row))
        for text, row in zip(texts[1:], rows, strict=True)
    ]
    return texts[0], lines


def _numeric(picked: Any) -> frozenset[int]:
    return frozenset(at for at, i in enumerate(picked) if 2 <= i <= 7)


def _cells(row: Row) -> tuple[str, ...]:
    share, speed = real(row["of_floor"]), real(row["speedup"])
    mark = fmt.ALARM if row["verdict"] == "over" else " "
    name = row["site"].partition("/")[2] or row["site"]
    return (
        mark, fmt.clip(name, _NAME, left=True), fmt.seconds(seconds_of(row)),
        fmt.seconds(float(row["floor"])), "" if share is None else f"{share:.0%}",
        fmt.seconds(row["seconds"]["reference"]), "" if speed is None else f"{speed:.1f}×",
        fmt.times(times_of(row)), row["kernel"], "",
    )  # fmt: skip


def _style(row: Row) -> str:
    if row["verdict"] == "over":
        return BAD
    return DIM if row["kernel"] == "reference" else PLAIN


def bar(value: float, longest: float, width: int) -> str:
    """A bar of up to `width` cells, an eighth of a cell exact."""
    eighths = round(8 * width * value / longest) if longest > 0 else 0
    full, rest = divmod(eighths, 8)
    return BAR[0] * full + (BAR[8 - rest] if rest else "")


def head_lines(timing: Timing, order: str, width: int) -> list[Line]:
    """Totals of the layer, and how it is sorted."""
    rows = timing["sites"]
    kernel, reference = sum(map(seconds_of, rows)), sum(r["seconds"]["reference"] for r in rows)
    floor = sum(float(row["floor"]) for row in rows)
    over = sum(row["verdict"] == "over" for row in rows)
    first, stop = timing["tokens"]
    what = f"{timing['group']} {timing['kind']}  tokens {first}–{stop - 1}  {timing['device']}"
    totals: Line = [
        (f"all ops {fmt.seconds(kernel)}", PLAIN),
        (f"  reference {fmt.seconds(reference)}", DIM),
        (f"  floor {fmt.seconds(floor)}", DIM),
    ]
    if over:
        totals.append((f"  {fmt.ALARM} {over} over the limit", WARN))
    room = width - len(what) - 2 >= sum(len(text) for text, _ in totals)
    lines: list[Line] = (
        [[(what, BOLD), ("  ", PLAIN), *totals]] if room else [[(what, BOLD)], totals]
    )
    if kernel < floor:
        lines.append([(fmt.clip(FASTER_THAN_FLOOR, width), WARN)])
    how = f"{ORDERS[order][0]}; medians of runs on the ops' own inputs"
    return [*lines, [(fmt.clip(how, width), DIM)]]
