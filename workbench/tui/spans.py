"""Styled text without Textual: a line is a list of (text, style) pairs, made by pure functions.

Styles are Textual content styles (``bold``, ``$error``). A sign or a word always says the same as
the colour does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

Span: TypeAlias = tuple[str, str]
Line: TypeAlias = list[Span]

PLAIN, DIM, BOLD = "", "$foreground-muted", "bold"
GOOD, WARN, BAD, ACCENT = "$text-success", "$text-warning", "bold $text-error", "$text-accent"
TITLE = "bold $text-primary"
BANNER = "bold $text-error on $error-muted"


def plain(lines: Iterable[Line]) -> str:
    """The text alone, for tests and for width checks."""
    return "\n".join("".join(text for text, _ in line) for line in lines)


def width_of(line: Line) -> int:
    return sum(len(text) for text, _ in line)


def wrap(label: str, words: Sequence[Span], width: int, indent: int) -> list[Line]:
    """`label`, then words separated by two blanks, continued below at `indent`; none is cut."""
    lines: list[Line] = [[(label.ljust(indent), DIM)]]
    for text, style in words:
        if width_of(lines[-1]) > indent and width_of(lines[-1]) + 2 + len(text) > width:
            lines.append([(" " * indent, PLAIN)])
        if width_of(lines[-1]) > indent:
            lines[-1].append(("  ", PLAIN))
        lines[-1].append((text, style))
    return lines
