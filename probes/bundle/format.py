"""What every part of a bundle agrees on: names, versions, limits, and how JSON is checked."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_bench.engine.errors import DSV4Error, ExitCode

FORMAT = "dsv4-bench bundle"
SCHEMA_VERSION = 1
MANIFEST, CALLS, READINGS = "manifest.json", "calls.json", "readings.jsonl"

# Names as safetensors spells them.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_DIMS = 8
LARGEST = 2**48  # of any dimension, stride or offset, and of a tensor's elements
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}){0,2}")


@dataclass(frozen=True)
class OpenLimits:
    """How large a bundle may claim to be before it is refused, in files and bytes."""

    files: int = 4096
    total: int = 2 << 30
    json: int = 32 << 20  # of manifest.json, calls.json and readings.jsonl, each


class BadBundle(DSV4Error):
    """The bundle cannot be used; the message names the place and the value."""

    def __init__(self, message: str, hint: str = "the bundle is damaged, or not one") -> None:
        super().__init__(message, hint, ExitCode.BAD_INPUT)


def short(value: Any, width: int = 80) -> str:
    """A value from outside, for an error message: one line, no control characters."""
    text = value if isinstance(value, str) else repr(value)
    return ascii(text[:width])[1:-1] + ("..." if len(text) > width else "")


def check_name(name: Any) -> str:
    """A file name inside a bundle: up to two folders deep, no way out of it. Raises BadBundle."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadBundle(f"file name {short(name)!r} is not allowed in a bundle")
    return name


def slug(path: str) -> str:
    """A site's path as a file name: ``L3/attn/core`` -> ``L3.attn.core``."""
    return re.sub(r"[^A-Za-z0-9_-]", ".", path).strip(".")[:150] or "site"


def read_json(data: bytes, where: str) -> Any:
    """Strict JSON of `data`. Raises BadBundle."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadBundle(f"{where} is not JSON: {short(str(error))}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def write_json(data: Any, indent: int | None = 1) -> bytes:
    """Strict JSON; non-finite floats as strings."""
    return (json.dumps(plain(data), indent=indent, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """`value` with non-finite floats as "inf", "-inf", "nan", tuples as lists, keys as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


# ------------------------------------------------------------------------------ checking JSON


def number(value: Any, where: str) -> float:
    """A float as `plain` writes it."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308:
        return float(value)
    raise BadBundle(f"{where} is {short(value)}, not a number")


def count(value: Any, where: str, largest: int = LARGEST) -> int:
    """An integer in [0, largest]."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest:
        return value
    raise BadBundle(f"{where} is {short(value)}, not a whole number of 0 to {largest}")


def counts(value: Any, where: str, length: int | None = None, largest: int = LARGEST) -> list[int]:
    """A list of integers in [0, largest], `length` of them if given."""
    items = sequence(value, where)
    if length is not None and len(items) != length:
        raise BadBundle(f"{where} has {len(items)} values, {length} are expected")
    return [count(item, where, largest) for item in items]


def text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise BadBundle(f"{where} is {short(value)}, not a string")


def mapping(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise BadBundle(f"{where} is {short(value)}, not an object")


def sequence(value: Any, where: str) -> list[Any]:
    if isinstance(value, list):
        return value
    raise BadBundle(f"{where} is {short(value)}, not a list")


def member(data: dict[str, Any], name: str, where: str) -> Any:
    """data[name]; raises BadBundle if it is missing."""
    if name not in data:
        raise BadBundle(f"{where} has no {name!r}")
    return data[name]
