"""The session protocol: one JSON object a line, over the worker's stdin and stdout.

To the worker:  {"open": {...}}                      first; the fields of SessionOptions
                {"id": 7, "line": "step 3"}          a session command, as typed
From it:        {"event": "hello", ...}              once the checkpoint is open
                {"event": "reply", "id": 7, "ok": true, "result": {...}}
                {"event": "state" | "enter" | "site" | "log" | "fatal", ...}
Tensors stay in the worker; numbers that JSON lacks travel as the strings "nan", "inf", "-inf".
"""

from __future__ import annotations

import json
import math
from typing import Any

SCHEMA_VERSION = 1
MAX_LINE = 16 << 20


def encode(message: dict[str, Any]) -> bytes:
    """One line, newline included."""
    try:
        text = json.dumps(message, ensure_ascii=False, allow_nan=False)
    except ValueError:  # only then pay for the walk
        text = json.dumps(_finite(message), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def decode(line: bytes) -> dict[str, Any]:
    """Parse one line. Raises ValueError for anything but a JSON object."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"a JSON object was expected, found {type(message).__name__}")
    return message
