"""A small line plot in braille: two by four dots a cell, axis labels, no dependencies. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dsv4_bench.workbench.tui.format import number

_DOT = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BARS = "▁▂▃▄▅▆▇█"
Point = tuple[float, float]


def line_plot(points: Sequence[Point], width: int, height: int, mark: float | None = None) -> str:
    """`points` (x rising) joined by lines; `mark` puts a ^ below that x. Needs at least 2 points."""
    if len(points) < 2 or width < 12 or height < 4:
        return spark([y for _, y in points], width)
    low, high = min(y for _, y in points), max(y for _, y in points)
    labels = [number(high), number(low)]
    margin = max(map(len, labels)) + 1
    columns, rows = width - margin, height - 2
    cells = _draw(points, columns, rows, low, high if high > low else low + 1)
    lines = []
    for index, row in enumerate(cells):
        label = labels[0] if index == 0 else labels[1] if index == rows - 1 else ""
        lines.append(label.rjust(margin - 1) + "│" + "".join(chr(0x2800 + c) for c in row))
    first, last = points[0][0], points[-1][0]
    lines.append(" " * (margin - 1) + "└" + _ruler(first, last, mark, columns))
    left, right = f"L{first:.0f}", f"L{last:.0f}"
    lines.append(" " * margin + left + right.rjust(columns - len(left)))
    return "\n".join(lines)


def _ruler(first: float, last: float, mark: float | None, columns: int) -> str:
    line = ["─"] * columns
    if mark is not None and first <= mark <= last:
        line[round((mark - first) / (last - first) * (columns - 1))] = "▲"
    return "".join(line)


def _draw(
    points: Sequence[Point], columns: int, rows: int, low: float, high: float
) -> list[list[int]]:
    cells = [[0] * columns for _ in range(rows)]
    first, last = points[0][0], points[-1][0]
    wide, tall = columns * 2 - 1, rows * 4 - 1
    dots = [
        (round((x - first) / (last - first) * wide), round((high - y) / (high - low) * tall))
        for x, y in points
    ]
    for (x0, y0), (x1, y1) in pairwise(dots):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for step in range(steps + 1):
            x, y = x0 + (x1 - x0) * step // steps, y0 + (y1 - y0) * step // steps
            cells[y // 4][x // 2] |= _DOT[y % 4][x % 2]
    return cells


def spark(values: Sequence[float], width: int) -> str:
    """Values as a row of bars, the last `width` of them."""
    shown = list(values)[-max(width, 1) :]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    spread = (high - low) or 1.0
    return "".join(_BARS[min(7, int((value - low) / spread * 8))] for value in shown)
