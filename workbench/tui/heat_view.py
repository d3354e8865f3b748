"""The heat map as styled lines: cells shaded by the decade of their error, axes, cursor, legend. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.records import real
from dsv4_bench.workbench.tui.spans import ACCENT, BAD, BOLD, DIM, PLAIN, Line, Span

Heat = dict[str, Any]
AROUND = 5  # lines that are no cells: column axis, cursor, cell, two of legend
MARGIN = 7  # columns of the row axis
WIDEST = 6  # columns a cell is stretched to when there are few
# Darkest to brightest; the colours rise in lightness too, so that any eye and any screen can order them.
SHADES = (" ", "·", "░", "▒", "▓", "█")
COLOURS = ("", "#5d6aa8", "#3a8f9c", "#4fb06d", "#b5cf3a", "#fff06a")
NOT_FINITE = "N"


@dataclass(frozen=True)
class Cursor:
    """A cell of the map, by row and column of cells."""

    row: int = 0
    column: int = 0


def cells_for(width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of cells that a pane of this size can show."""
    return max(1, height - AROUND), max(1, width - MARGIN)


def worst_cell(heat: Heat) -> Cursor:
    """Where the error is largest."""
    errors = [
        (float(value), -r, -c) for r, row in enumerate(heat["error"]) for c, value in enumerate(row)
    ]
    _, row, column = max(errors)
    return Cursor(-row, -column)


def moved(heat: Heat, cursor: Cursor, rows: int, columns: int) -> Cursor:
    """The cursor after so many steps, kept inside."""
    bottom, right = len(heat["error"]) - 1, len(heat["error"][0]) - 1
    row = max(0, min(bottom, cursor.row + rows))
    return Cursor(row, max(0, min(right, cursor.column + columns)))


def zoomed(heat: Heat, cursor: Cursor, factor: float) -> str | None:
    """The `rows=` and `columns=` of an area `factor` times as large around the cursor's worst place.

    None if there is nothing more to see that way.
    """
    area = heat["area"]
    row, column = heat["at"][cursor.row][cursor.column]
    rows, columns = full_size(heat)
    top, bottom = _span(area["top"], area["bottom"], row, rows, factor)
    left, right = _span(area["left"], area["right"], column, columns, factor)
    if (top, bottom, left, right) == tuple(area[k] for k in ("top", "bottom", "left", "right")):
        return None
    return f"rows={top}:{bottom} columns={left}:{right}"


def _span(start: int, stop: int, at: int, size: int, factor: float) -> tuple[int, int]:
    """`factor` times as long around `at`, at least 8 long, inside 0 to `size`."""
    length = min(size, max(round((stop - start) * factor), 8))
    first = max(0, min(size - length, at - length // 2))
    return first, first + length


def full_size(heat: Heat) -> tuple[int, int]:
    """(rows, columns) of the whole output: its first axis, and all others."""
    shape = heat["shape"]
    return (shape[0] if shape else 1), math.prod(shape[1:])


def heat_lines(heat: Heat, cursor: Cursor, width: int, height: int) -> list[Line]:
    """Everything the heat map shows, `height` lines at most where it fits."""
    grid = [[float(value) for value in row] for row in heat["error"]]
    top = max((v for row in grid for v in row if math.isfinite(v)), default=0.0)
    stretch = max(1, min(WIDEST, (width - MARGIN) // len(grid[0])))
    lines = [_row(heat, grid, index, cursor, top, stretch) for index in range(len(grid))]
    lines.append(_columns_axis(heat, len(grid[0]), stretch))
    return [*lines, *_cursor_lines(heat, cursor, width), *_legend(heat, top)]


def _row(
    heat: Heat, grid: list[list[float]], index: int, cursor: Cursor, top: float, stretch: int
) -> Line:
    area, (high, _) = heat["area"], heat["block"]
    labelled = index % 4 == 0 or index == cursor.row
    label = f"{area['top'] + index * high:>{MARGIN - 2}}┤" if labelled else " " * (MARGIN - 2) + "│"
    spans: list[Span] = [(label, ACCENT if index == cursor.row else DIM)]
    for column, value in enumerate(grid[index]):
        level = shade_of(value, top)
        text, style = (NOT_FINITE, BAD) if level < 0 else (SHADES[level], COLOURS[level])
        if (index, column) == (cursor.row, cursor.column):
            spans.append(((text if text != " " else "+") * stretch, "reverse bold"))
        elif spans[-1][1] == style and column:
            spans[-1] = (spans[-1][0] + text * stretch, style)
        else:
            spans.append((text * stretch, style))
    return spans


def shade_of(value: float, top: float) -> int:
    """Index in SHADES: one shade a decade below `top`; -1 for what is not finite."""
    if not math.isfinite(value):
        return -1
    if value <= 0:
        return 0
    return max(1, len(SHADES) - 1 - int(math.log10(top / value)))


def _columns_axis(heat: Heat, cells: int, stretch: int) -> Line:
    """Where the first cell's column, and those of others 12 columns of text apart or more, begin.

    Of more than two axes the coordinate is written, such as 3,128 for head 3, channel 128.
    """
    left, (_, wide) = heat["area"]["left"], heat["block"]
    text = " " * (MARGIN - 1)
    every = max(1, -(-12 // stretch))
    for cell in range(0, cells, every):
        place = coordinate(heat["shape"], 0, left + cell * wide)[1:] or [0]
        text = text.ljust(MARGIN - 1 + cell * stretch) + "└" + ",".join(map(str, place))
    return [(text, DIM)]


def _cursor_lines(heat: Heat, cursor: Cursor, width: int) -> list[Line]:
    """Value, ours, theirs and coordinate of the cursor's cell, and what the cell covers."""
    row, column = heat["at"][cursor.row][cursor.column]
    ours = real(heat["ours"][cursor.row][cursor.column])
    theirs = real(heat["theirs"][cursor.row][cursor.column])
    error = real(heat["error"][cursor.row][cursor.column])
    place = coordinate(heat["shape"], row, column)
    text = f"{heat['output']}{place}  "
    values = f"{heat['route']} {fmt.full(ours)}  {heat['against']} {fmt.full(theirs)}  "
    area, (high, wide) = heat["area"], heat["block"]
    first, start = area["top"] + cursor.row * high, area["left"] + cursor.column * wide
    rows = _range(first, min(first + high, area["bottom"]))
    columns = _range(start, min(start + wide, area["right"]))
    what = f"worst of rows {rows}, columns {columns}" if high * wide > 1 else "this value"
    size = "equal" if error == 0 else f"error {fmt.number(error)} × rms"
    first_line: Line = [(text, BOLD), (values, PLAIN), (size, ACCENT)]
    return [first_line, [(fmt.clip(what, width), DIM)]]


def _range(start: int, stop: int) -> str:
    return f"{start}" if stop - start == 1 else f"{start}–{stop - 1}"


def coordinate(shape: Sequence[int], row: int, column: int) -> list[int]:
    """Index into a tensor of `shape` of (row, column), the column counting all axes but the first."""
    rest: list[int] = []
    for size in reversed(shape[1:]):
        rest.insert(0, column % size)
        column //= size
    return [row, *rest] if shape else []


def _legend(heat: Heat, top: float) -> list[Line]:
    if top == 0:
        scale: Line = [("equal where both are finite", DIM)]
    else:
        scale = [("error/rms ", DIM)]
        for level in range(len(SHADES) - 1, 1, -1):
            least = f"{top / 10 ** (len(SHADES) - level):.0e}".replace("e-0", "e-")
            scale += [(SHADES[level], COLOURS[level]), (f">{least} ", DIM)]
        scale += [(SHADES[1], COLOURS[1]), (" less  blank equal", DIM)]
    if any(not math.isfinite(float(v)) for row in heat["error"] for v in row):
        scale += [("  N", BAD), (" not finite", DIM)]
    rows, columns = full_size(heat)
    area, (high, wide) = heat["area"], heat["block"]
    shown = f"rows {_range(area['top'], area['bottom'])} of {rows}, "
    shown += f"columns {_range(area['left'], area['right'])} of {columns}; "
    shown += f"a cell is {high}×{wide}; rms {fmt.number(real(heat['rms']))}"
    return [scale, [(shown, DIM)]]
