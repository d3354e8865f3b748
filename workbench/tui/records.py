"""The records that the store keeps, and the type of what a session says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from dsv4_bench.workbench.tui.format import ALARM, ANOMALY_MARKS

Event: TypeAlias = dict[str, Any]


def real(value: object) -> float | None:
    """A number of the protocol, which writes those that JSON lacks as strings."""
    return None if value is None else float(value)  # type: ignore[arg-type]


@dataclass
class SiteInfo:
    """One row of the tree. `times`: own error in units of its limit. `alarm` says what is wrong,
    `anomaly` of which kind it is, `alarm_forward` in which forward pass it was seen.
    """

    path: str
    op: str = ""
    layer: int | None = None
    kind: str | None = None
    done: bool = False
    seconds: float | None = None
    times: float | None = None
    carried_error: float | None = None
    alarm: str = ""
    anomaly: str = ""
    alarm_forward: int = 0
    route: str = ""
    note: str = ""
    stops: bool = False

    @property
    def mark(self) -> str:
        """The sign of its anomaly; a blank without one."""
        return ANOMALY_MARKS.get(self.anomaly, ALARM) if self.alarm else " "


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
