"""The workbench: session, worker, commands, terminal UI. `Session` drives the engine from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_bench.workbench.session import Session

__all__ = ["Session"]


def __getattr__(name: str) -> Any:
    if name == "Session":
        from dsv4_bench.workbench.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
