"""NVTX ranges named like the sites, in the domain `dsv4`; free when nothing records."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _annotate() -> Callable[..., AbstractContextManager[Any]] | None:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx.annotate


def site_range(path: str) -> AbstractContextManager[Any]:
    """A range called `path` around a block; nothing where the nvtx package is missing."""
    annotate = _annotate()
    return nullcontext() if annotate is None else annotate(path, domain="dsv4")
