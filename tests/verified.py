"""What the tests measured of each implementation, on its way into the record that `kernels` shows.

A test that has compared an implementation with its oracle says so with `measured`. conftest.py puts it
into the test's JUnit properties, and gpu_record.py makes engine/verified.json of those.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

PROPERTY, MACHINE = "verified", "machine"  # names of the JUnit properties
_TAKEN: dict[tuple[str, str], tuple[float, float]] = {}  # of the running test


def measured(op: str, implementation: str, error: float, limit: float) -> None:
    """`implementation` of `op` has `error` (relative L2) under `limit`; 0 and 0 where bits must agree.

    The worst of a test counts: the one nearest to its limit.
    """
    before = _TAKEN.get((op, implementation))
    if before is None or used(error, limit) >= used(*before):
        _TAKEN[op, implementation] = error, limit


def used(error: float, limit: float) -> float:
    """The share of a limit that an error uses up."""
    return error / limit if limit else float(error > 0)


def take() -> list[tuple[str, str]]:
    """JUnit properties of what the test that just ended has measured."""
    from dsv4_bench.engine.registry import IMPLEMENTATIONS

    if not _TAKEN:
        return []
    found = [(MACHINE, json.dumps(_machine()))]
    for (op, name), (error, limit) in _TAKEN.items():
        impl = IMPLEMENTATIONS[op][name]
        code = impl.code() if impl.code is not None else ""
        entry = {"op": op, "implementation": name, "error": error, "limit": limit}
        found.append((PROPERTY, json.dumps({**entry, "hash": impl.hash, "code": code})))
    _TAKEN.clear()
    return found


@lru_cache
def _machine() -> dict[str, Any]:
    from bench_cuda import describe_device

    return describe_device()
