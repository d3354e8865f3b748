"""What a GPU test run found out about each implementation: the record `verified.json`, and whether it still holds.

tests/gpu_record.py writes the record from the tests' reports; it travels with the package. An entry is
about one build: the same sources through another compiler, or changed sources, are told apart.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import Implementation

SAME, OTHER_COMPILER, CHANGED = "this code", "these sources, another compiler", "changed since"


@dataclass(frozen=True)
class Record:
    """One implementation on one machine: `tests` that compared it passed, `failed` did not.

    `error` (relative L2) is the one nearest to its `limit` over all passed tests. `code` names the
    build, "<name>-<12 digits: sources, flags, arch>-<8 digits: compiler>".
    """

    device: str
    date: str
    commit: str
    hash: str
    code: str
    error: float
    limit: float
    tests: int
    failed: int

    def standing(self, impl: Implementation) -> str:
        """How the code of `impl` here relates to the code that was tested."""
        now = impl.code() if impl.code is not None else ""
        if impl.hash == self.hash:
            return SAME
        return OTHER_COMPILER if self.code and _sources(self.code) == _sources(now) else CHANGED

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _sources(code: str) -> list[str]:
    """What `code` says of sources, flags and arch; an implementation of two builds joins them by +."""
    return [build.rpartition("-")[0] for build in code.split("+")]


def record_file() -> Traversable:
    return resources.files("dsv4_bench.engine") / "verified.json"


def load(file: Traversable | None = None) -> dict[str, Record]:
    """The records by "op/implementation"; none if there is no file. DSV4Error if it is damaged."""
    file = record_file() if file is None else file
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return {key: _record(entry) for key, entry in table.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise DSV4Error(
            f"cannot read the record of verified kernels, {file}: {type(error).__name__}: {error}",
            "tests/gpu_record.py writes it anew; without the file nothing counts as verified",
        ) from error


def _record(entry: dict[str, Any]) -> Record:
    """Checked field by field: KeyError if one is missing, TypeError if it is of another type."""
    values: dict[str, Any] = {}
    for field in fields(Record):
        value = entry[field.name]
        kinds = {"str": (str,), "int": (int,), "float": (int, float)}[str(field.type)]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {value!r}, expected {field.type}")
        values[field.name] = value
    return Record(**values)
