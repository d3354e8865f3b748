"""Watch mode as text: what is watched, every attempt with its time and error, the last one's problem. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.records import Event, real
from dsv4_bench.workbench.tui.results import columns
from dsv4_bench.workbench.tui.spans import ACCENT, BAD, BOLD, DIM, GOOD, PLAIN, WARN, Line
from dsv4_bench.workbench.tui.watching import Watching

HEADER = ("#", "code", "verdict", "×limit", "own error", "time", "to the first", "after")
NARROW = (0, 1, 2, 3, 5, 6, 7)  # the columns of HEADER that fit 80
WIDE = 100
_PHASES = {
    "asking": "asking what it is made of",
    "watching": "waiting for a save",
    "dead": "the worker is gone; the next save starts another",
    "restarting": "starting a new worker",
    "returning": "going back to the op",
    "stopped": "not watching",
}


def head_lines(watching: Watching, busy: bool, width: int) -> list[Line]:
    """What is watched, and what is being done."""
    route = f"  {watching.implementation}" if watching.implementation else ""
    lines: list[Line] = [[(watching.site, BOLD), (route, PLAIN)]]
    names = [path.name for path in watching.files]
    if names:
        text = f"{len(names)} file{'s' if len(names) > 1 else ''}: {' '.join(names)}"
        lines.append([(fmt.clip(text, width), DIM)])
    building = busy and watching.phase == "watching"
    text = "building and running" if building else _PHASES[watching.phase]
    style = WARN if building or watching.phase not in ("asking", "watching") else ACCENT
    lines.append([(text, style)])
    if watching.problem:
        lines.append([(fmt.clip(watching.problem, 2 * width), BAD)])
    return lines


def attempt_lines(attempts: Sequence[Event], width: int) -> list[Line]:
    """A row an attempt, the newest first, and below them what went wrong with the newest."""
    if not attempts:
        return []
    first = next((a["seconds"] for a in attempts if a.get("seconds")), None)
    rows = [_cells(number, attempt, first) for number, attempt in enumerate(attempts, start=1)][
        ::-1
    ]
    picked = range(len(HEADER)) if width >= WIDE else NARROW
    texts = columns(
        [[row[i] for i in picked] for row in (HEADER, *rows)],
        right=frozenset(at for at, i in enumerate(picked) if i in (0, 3, 4, 5, 6, 7)),
    )
    lines: list[Line] = [[(fmt.clip(texts[0], width), DIM)]]
    for text, attempt in zip(texts[1:], reversed(attempts), strict=True):
        lines.append([(fmt.clip(text, width), _style(attempt))])
    if attempts[-1]["error"]:
        lines += [[], *([(line, BAD)] for line in attempts[-1]["error"].splitlines())]
    return lines


def _cells(number: int, attempt: Event, first: float | None) -> tuple[str, ...]:
    if attempt["error"]:
        took = fmt.seconds(attempt["took"]) if "took" in attempt else ""
        return str(number), "", "failed", "", "", "", "", took
    error, limit = real(attempt["own_error"]), real(attempt["limit"])
    seconds = attempt["seconds"]
    return (
        str(number), attempt["hash"], attempt["verdict"] or "not compared",
        fmt.times(error / limit if error is not None and limit else None),
        "" if error is None else f"{error:.1e}", fmt.seconds(seconds),
        f"{seconds / first:.2f}×" if first else "", fmt.seconds(attempt["took"]),
    )  # fmt: skip


def _style(attempt: Event) -> str:
    if attempt["error"] or attempt["verdict"] == "over":
        return BAD
    return GOOD if attempt["verdict"] == "ok" else PLAIN
