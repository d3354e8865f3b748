"""What is shown at which size. Pure."""

from __future__ import annotations

from collections.abc import Collection

MIN_WIDTH, MIN_HEIGHT = 60, 16
WIDE, VERY_WIDE = 100, 160
TALL = 30
WIDTH_CLASSES = [(0, "-narrow"), (WIDE, "-wide"), (VERY_WIDE, "-very-wide")]
HEIGHT_CLASSES = [(0, "-short"), (TALL, "-tall")]
RIGHT = ("readings", "breaks", "watches")


def panes_shown(width: int, chosen: str) -> tuple[str, ...]:
    """Narrow: the chosen pane. Wide: op or values, and the right column. Very wide: all."""
    if width >= VERY_WIDE:
        return ("op", "values", *RIGHT)
    if width >= WIDE:
        return ("values" if chosen == "values" else "op", *RIGHT)
    return (chosen,)


def too_small(width: int, height: int) -> bool:
    return width < MIN_WIDTH or height < MIN_HEIGHT


TREE_COLUMNS = {"times": 7, "carried_error": 9, "seconds": 8, "route": 10}  # and their widths
TREE_TITLES = {"times": "×limit", "carried_error": "carried", "seconds": "time", "route": "route"}
_NARROWEST = 25  # trees narrower than this have no columns
_NAMES = 21  # columns that a tree's names need once it has more than one column of numbers


def tree_columns(width: int, known: Collection[str]) -> tuple[str, ...]:
    """Columns after the name in a site tree `width` columns wide.

    Of the errors those that are `known`; what does not fit is left out from the right. The first
    column always fits.
    """
    wanted = [name for name in TREE_COLUMNS if name in known or name in ("seconds", "route")]
    room = width - _NAMES
    chosen: list[str] = []
    for name in wanted if width >= _NARROWEST else []:
        room -= TREE_COLUMNS[name]
        if room < 0 and chosen:
            break
        chosen.append(name)
    return tuple(chosen)
