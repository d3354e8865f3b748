"""What commands print: JSON and tables on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO


def to_json(data: Any) -> str:
    """One strict JSON document; NaN and infinities become strings, as JSON has none."""
    return json.dumps(_plain(data), indent=2, ensure_ascii=False)


_stdout: TextIO | None = None


def reserve_stdout() -> None:
    """From now on stdout is for `print_json` alone: all else that is printed, by kernels and
    libraries too, goes to stderr."""
    global _stdout
    if _stdout is None:
        sys.stdout.flush()
        _stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)


def print_json(data: Any) -> None:
    print(to_json(data), file=_stdout or sys.stdout, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, padded so that it also reads well in a terminal; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max([len(h), *(len(r[i]) for r in cells)]) for i, h in enumerate(header)]
    right = [
        any(r[i] for r in cells) and all(_numeric(r[i]) for r in cells) for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(header), line(rule), *(line(r) for r in cells)])


def _numeric(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "-+." or text in ("nan", "inf")


def progress(text: str, done: int, total: int) -> None:
    """A progress line on stderr, only when it is a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{text} {done}/{total}\033[K", end=end, file=sys.stderr, flush=True)


def loading(done: int, total: int) -> None:
    """Progress of `load_model`."""
    progress("loading layer", done, total)


def narrate(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def bytes_text(count: float) -> str:
    """12.3 MB, with decimal units as download pages use."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
