"""The session protocol: one JSON object a line, over the worker's stdin and stdout.

To the worker:  {"open": {...}}                      first; the fields of OPEN_FIELDS
                {"id": 7, "line": "step 3"}          a session command, as typed
                {"end": "keep"}                      end, but leave the session's folder for `resume`
From it:        {"event": "started", ...}            at once: pid and the session's folder
                {"event": "hello", ...}              once the checkpoint is open
                {"event": "reply", "id": 7, "ok": true, "result": {...}}
                {"event": "state" | "enter" | "running" | "site" | "log" | "fatal", ...}
Tensors stay in the worker; numbers that JSON lacks travel as the strings "nan", "inf", "-inf".
"""

from __future__ import annotations

import json
import math
from typing import Any

from dsv4_bench.engine.errors import DSV4Error, did_you_mean

SCHEMA_VERSION = 1
MAX_LINE = 16 << 20

# What `open` may hold, and the type of each; a list type holds the type of its elements.
OPEN_FIELDS: dict[str, type | list[type]] = {
    "checkpoint": str,
    "prompt": str,
    "tokens": [object],  # ids are judged with the vocabulary at hand
    "chunks": [int],
    "max_new_tokens": int,
    "route": [str],
    "dtype": str,
    "device": str,
    "plugins": [str],
    "probes": [str],
    "shadow": str,
    "carried": bool,
    "resume": str,  # a folder that a worker before this one has left
    "breaks": [dict],
    "watches": [str],
}


def check_open(options: Any) -> dict[str, Any]:
    """The options of an `open` message without those that are null. Raises DSV4Error."""
    if not isinstance(options, dict):
        raise DSV4Error(f"open: an object was expected, found {type(options).__name__}")
    for name, value in options.items():
        if name not in OPEN_FIELDS:
            raise DSV4Error(f"open: unknown field {name!r}", did_you_mean(name, OPEN_FIELDS))
        kind = OPEN_FIELDS[name]
        if value is not None and not _fits(value, kind):
            text = f"a list of {kind[0].__name__}" if isinstance(kind, list) else kind.__name__
            raise DSV4Error(f"open: {name} is {str(value)[:60]!r}, expected {text}")
    given = {name: value for name, value in options.items() if value is not None}
    if any(size < 1 for size in given.get("chunks", [])):
        raise DSV4Error(f"open: chunks {given['chunks']}: sizes are positive integers")
    if given.get("max_new_tokens", 0) < 0:
        raise DSV4Error(f"open: max_new_tokens {given['max_new_tokens']} is negative")
    return given


def _fits(value: Any, kind: type | list[type]) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(item, kind[0]) for item in value)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def encode(message: dict[str, Any]) -> bytes:
    """One line, newline included; ASCII, so that no text in a message can spoil it."""
    try:
        text = json.dumps(message, allow_nan=False)
    except ValueError:  # only then pay for the walk
        text = json.dumps(_finite(message), allow_nan=False)
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
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError(f"a JSON object was expected, found {type(message).__name__}")
    return message
