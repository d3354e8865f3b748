"""What is shown at which size. Pure."""

from __future__ import annotations

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


def tree_columns(width: int) -> tuple[str, ...]:
    """Columns after the name in a site tree `width` columns wide."""
    wanted = ((25, "seconds"), (42, "own_error"), (52, "route"))
    return tuple(name for least, name in wanted if width >= least)
