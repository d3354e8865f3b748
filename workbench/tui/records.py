"""The records that the store keeps, and the type of what a session says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

Event: TypeAlias = dict[str, Any]


@dataclass
class SiteInfo:
    """One row of the tree. `alarm_forward`: the forward pass that `alarm` is from."""

    path: str
    op: str = ""
    layer: int | None = None
    kind: str | None = None
    done: bool = False
    seconds: float | None = None
    own_error: float | None = None
    alarm: str = ""
    alarm_forward: int = 0
    route: str = ""
    note: str = ""
    stops: bool = False


@dataclass(frozen=True)
class LogLine:
    """`stream`: stdout, stderr, worker; command, result or error for what was typed."""

    stream: str
    text: str


@dataclass(frozen=True)
class Value:
    """The result of a command that looked at something."""

    line: str
    title: str
    text: str


def stub_view(info: SiteInfo) -> Event:
    """What is known of a site before the session was asked about it."""
    return {
        "site": info.path,
        "op": info.op,
        "state": "done" if info.done else "pending",
        "route": info.route,
        "stamp": {"implementation": info.route, "note": info.note} if info.route else None,
        "times": {info.route or "last": info.seconds} if info.seconds is not None else {},
    }
