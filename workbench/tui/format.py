"""Numbers, shapes, times and marks as text. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

DONE, CURRENT, BREAK, ALARM, PENDING, SKIPPED = "✓", "▶", "●", "!", "·", "-"
UNKNOWN = "–"

# Anomalies of a site, worst first: what the session calls them, and their signs.
ANOMALY_MARKS = {"failed": "✗", "over": ALARM, "nonfinite": "N", "broken": "≠"}

MARKS = (
    (DONE, "done: the op has run in this forward pass"),
    (CURRENT, "current: the session stopped after this op and holds its tensors"),
    (BREAK, "breakpoint: the session stops here"),
    (ALARM, "own error over its limit"),
    (ANOMALY_MARKS["nonfinite"], "NaN or infinity in an output"),
    (ANOMALY_MARKS["broken"], "a probe saw a promise broken, such as rows that do not sum to 1"),
    (ANOMALY_MARKS["failed"], "the op, or its shadow, raised an exception"),
    (PENDING, "pending: not run yet in this forward pass"),
    (SKIPPED, "skipped: this forward pass had no work for it"),
)
KINDS = (
    ("SWA", "sliding window attention only"),
    ("CSA", "compressed 4:1, an indexer selects the entries"),
    ("HCA", "heavily compressed 128:1, all entries"),
)


def number(value: object) -> str:
    """Four significant digits; integers whole; nan and inf by name."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**7 else f"{value:.2e}"
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def numbers(value: object, limit: int = 4) -> str:
    """A reading's value: one number, or the first few of a list."""
    if not isinstance(value, list | tuple):
        return number(value)
    shown = " ".join(number(item) for item in value[:limit])
    return f"[{shown}{' …' if len(value) > limit else ''}]"


def seconds(value: float | None) -> str:
    """120 µs, 1.20 ms, 3.4 s, 2m05s."""
    if value is None:
        return UNKNOWN
    if value < 0.9995e-3:
        return f"{value * 1e6:.3g} µs" if value < 99.5e-6 else f"{value * 1e6:.0f} µs"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms" if value < 0.0995 else f"{value * 1e3:.0f} ms"
    if value < 99.5:
        return f"{value:.1f} s"
    return f"{int(value) // 60}m{int(value) % 60:02d}s"


def times(value: float | None) -> str:
    """An error in units of its limit: 0.4×, 3.2×, 310×, 2e4×, inf×."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return f"{value}×"
    if value < 0.095:
        return "<0.1×" if value else "0×"
    if value < 9.95:
        return f"{value:.1f}×"
    return (
        f"{value:.0f}×" if value < 9999.5 else f"{value:.0e}×".replace("e+0", "e").replace("+", "")
    )


def size(count: int | None) -> str:
    """Bytes with a binary unit: 2.3 MiB."""
    if count is None:
        return UNKNOWN
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def shape(dims: Sequence[int]) -> str:
    return "×".join(str(dim) for dim in dims) if dims else "scalar"


def speed(ours: float | None, theirs: float | None) -> str:
    """`4.2× faster`, `1.5× slower`, or nothing when one of the times is unknown."""
    if not ours or not theirs:
        return ""
    return f"{theirs / ours:.1f}× faster" if theirs >= ours else f"{ours / theirs:.1f}× slower"


def clip(text: str, width: int, left: bool = False) -> str:
    """`text` in at most `width` columns, the cut marked; `left` keeps the end instead."""
    if len(text) <= width:
        return text
    if width <= 1:
        return text[:width]
    return "…" + text[-(width - 1) :] if left else text[: width - 1] + "…"


def full(value: object) -> str:
    """Enough digits to see where two float32 values differ."""
    return f"{value:.8g}" if isinstance(value, float) else number(value)


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
