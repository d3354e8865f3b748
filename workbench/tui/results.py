"""Results of session commands as plain text. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from dsv4_bench.workbench.tui.format import numbers

VERDICTS = {"alarm": "!", "ok": "✓", "info": " "}


def error_text(message: str, hint: str = "") -> str:
    """An error as every part of this program writes it, on one line."""
    return f"error: {message}" + (f"   hint: {hint}" if hint else "")


def columns(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Rows as aligned text columns, two blanks apart; columns in `right` are right-aligned."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def reading_unit(reading: dict[str, Any]) -> str:
    unit = reading.get("unit") or ""
    return "" if unit in ("count", "value", "1") else unit


def reading_limit(reading: dict[str, Any]) -> str:
    limit = reading.get("limit")
    return f"limit {numbers(limit)}" if limit is not None else ""


def readings_table(readings: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            VERDICTS.get(reading.get("verdict", "info"), " "),
            reading["site"],
            f"{reading['probe']}.{reading['name']} {reading.get('output') or ''}".strip(),
            numbers(reading.get("value")),
            reading_unit(reading),
            reading_limit(reading),
            reading.get("detail") or "",
        )
        for reading in readings
    ]
    return "\n".join(columns(rows)) or "no readings"


def any_result(result: Any) -> str:
    """A result this UI has no view for: a table if it is a list of records, else its fields."""
    if isinstance(result, dict) and len(result) == 1:
        (result,) = result.values()
    if isinstance(result, list) and result and all(isinstance(item, dict) for item in result):
        names = list(result[0])
        body = [[_cell(item.get(name)) for name in names] for item in result]
        return "\n".join(columns([names, *body]))
    if isinstance(result, dict):
        return "\n".join(f"{name}: {_cell(value)}" for name, value in result.items()) or "done"
    return _cell(result)


def _cell(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return numbers(value)
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
