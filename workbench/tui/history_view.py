"""Earlier times of an op as text: a row a run, newest first, beside a chosen baseline. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.records import Event, real
from dsv4_bench.workbench.tui.results import columns
from dsv4_bench.workbench.tui.spans import BAD, BOLD, DIM, GOOD, PLAIN, Line

HEADER = ("", "when", "by", "route", "code", "time", "ratio", "×limit", "site", "conditions",
          "device")  # fmt: skip
NARROW = (0, 1, 2, 3, 4, 5, 6, 7)  # the columns of HEADER that fit 80
WIDE = 120
FASTER, SLOWER = 0.97, 1.03  # ratios beyond which a row is coloured
_SITE, _DEVICE = 28, 24


def first_baseline(rows: Sequence[Event]) -> int | None:
    """The oldest time that compares with the newest one, of its implementation; None without any."""
    timed = [i for i, row in enumerate(rows) if row["seconds"]]
    if not timed:
        return None
    newest = rows[timed[0]]
    same = [
        i
        for i in timed
        if rows[i]["implementation"] == newest["implementation"] and ratio(newest, rows[i])
    ]
    return same[-1]


def ratio(row: Event, base: Event | None) -> float | None:
    """Time over the baseline's; None where the two cannot be compared."""
    if base is None or row["seconds"] is None or not base["seconds"]:
        return None
    same = all(row[name] == base[name] for name in ("site", "device", "conditions", "checkpoint"))
    return float(row["seconds"]) / float(base["seconds"]) if same else None


def head_lines(pattern: str, rows: Sequence[Event], base: int | None, width: int) -> list[Line]:
    """What is listed, and what the ratios are to."""
    runs = len({(row["when"], row["process"]) for row in rows})
    counted = f"  {len(rows)} times from {runs} run{'' if runs == 1 else 's'}"
    lines: list[Line] = [[(pattern, BOLD), (counted, DIM)]]
    if base is None:
        return [*lines, [("nothing was timed here yet: T times this layer", DIM)]]
    row = rows[base]
    text = (
        f"= {row['implementation']} {row['hash'][:7]} of {when(row)}, "
        f"{fmt.seconds(row['seconds'])}; {row['conditions']}, {row['device']}"
    )
    lines.append([(fmt.clip(text, width), DIM)])
    return lines


def table(rows: Sequence[Event], base: int | None, width: int) -> tuple[str, list[tuple[str, str]]]:
    """The header line, and (text, style) of every row."""
    baseline = None if base is None else rows[base]
    cells = [_cells(row, baseline, at == base) for at, row in enumerate(rows)]
    picked = list(range(len(HEADER)) if width >= WIDE else NARROW)
    right = frozenset(at for at, i in enumerate(picked) if i in (5, 6, 7))
    texts = columns([[row[i] for i in picked] for row in (HEADER, *cells)], right=right)
    texts = [fmt.clip(text, width) for text in texts]
    styles = [_style(row, ratio(row, baseline)) for row in rows]
    return texts[0], list(zip(texts[1:], styles, strict=True))


def when(row: Event) -> str:
    """Day and minute: 11-23 08:12."""
    return str(row["when"])[5:16].replace("T", " ")


def _cells(row: Event, base: Event | None, is_base: bool) -> tuple[str, ...]:
    error, limit, found = real(row["own_error"]), real(row["limit"]), ratio(row, base)
    sign = "=" if is_base else fmt.ALARM if row["verdict"] == "over" or row["problem"] else " "
    return (
        sign + ("•" if row["here"] else " "), when(row), row["what"], row["implementation"],
        row["hash"][:7], "failed" if row["problem"] else fmt.seconds(row["seconds"]),
        "" if found is None else f"{found:.2f}",
        fmt.times(error / limit if error is not None and limit else None),
        fmt.clip(row["site"], _SITE, left=True), row["conditions"],
        fmt.clip(row["device"], _DEVICE),
    )  # fmt: skip


def _style(row: Event, found: float | None) -> str:
    if row["verdict"] == "over" or row["problem"]:
        return BAD
    if found is None or FASTER < found < SLOWER:
        return PLAIN
    return GOOD if found <= FASTER else BAD
