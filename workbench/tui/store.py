"""What the UI knows, built from the session's events. No Textual, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, TypeAlias

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.tui.results import any_result, readings_table

Event: TypeAlias = dict[str, Any]

IDLE = ("ready", "stopped", "finished")
LOG_LINES_KEPT = 2000


class Change(Flag):
    """Which parts of the screen an event touches."""

    NONE = 0
    HELLO = auto()
    STATE = auto()
    STOPPED = auto()  # the session came to rest: ask for what is shown
    SITES = auto()
    OP = auto()
    READINGS = auto()
    BREAKS = auto()
    WATCHES = auto()
    VALUES = auto()
    LOG = auto()
    ERROR = auto()
    DEATH = auto()


@dataclass
class SiteInfo:
    """One row of the tree."""

    path: str
    op: str = ""
    layer: int | None = None
    kind: str | None = None
    done: bool = False
    seconds: float | None = None
    own_error: float | None = None
    alarm: str = ""
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


@dataclass
class Store:
    """The last known state of everything on the screen."""

    hello: Event = field(default_factory=dict)
    state: Event = field(default_factory=lambda: {"state": "opening"})
    sites: dict[str, SiteInfo] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    entered: str | None = None
    op: Event = field(default_factory=dict)
    layer_readings: list[Event] = field(default_factory=list)
    residual: list[Event] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    breaks: list[Event] = field(default_factory=list)
    watches: list[Event] = field(default_factory=list)
    death: Event = field(default_factory=dict)
    error: Event = field(default_factory=dict)
    log: list[LogLine] = field(default_factory=list)
    silent: set[int] = field(default_factory=set)
    run_sent: int | None = None

    # -- questions

    @property
    def name(self) -> str:
        """The state; a run command that was sent and not answered yet counts as running."""
        name = str(self.state.get("state", "opening"))
        return "running" if self.run_sent is not None and name in IDLE else name

    @property
    def idle(self) -> bool:
        return self.name in IDLE

    @property
    def running(self) -> bool:
        return self.name == "running"

    @property
    def current(self) -> str | None:
        """The site the session stopped after; while it runs, the one it entered last."""
        return (self.entered if self.running else None) or self.state.get("site")

    def anomalies(self) -> list[str]:
        return [path for path, site in self.sites.items() if site.alarm]

    def break_number(self, site: str) -> int | None:
        """The breakpoint that is exactly this site, if there is one."""
        return next((int(b["number"]) for b in self.breaks if b["text"].strip() == site), None)

    # -- events

    def apply_all(self, events: Iterable[Event]) -> Change:
        change = Change.NONE
        for event in events:
            change |= self.apply(event)
        return change

    def apply(self, event: Event) -> Change:
        """Take one event; one that cannot be understood is logged and changes nothing else."""
        handler = getattr(self, f"_on_{event.get('event')}", None)
        try:
            return handler(event) if handler else Change.NONE
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            return self.note("error", f"event not understood: {error!r} in {str(event)[:200]}")

    def take_log(self) -> list[LogLine]:
        """The log lines since the last call."""
        lines, self.log = self.log, []
        return lines

    def note(self, stream: str, text: str) -> Change:
        """Add to the log; the oldest unread lines give way in a flood, and say so."""
        lines = text.rstrip("\n").split("\n")
        self.log.extend(LogLine(stream, line) for line in lines)
        if len(self.log) > LOG_LINES_KEPT:
            dropped = len(self.log) - LOG_LINES_KEPT // 2
            notice = LogLine("worker", f"… {dropped} lines came too fast to show")
            self.log = [notice, *self.log[dropped:]]
        return Change.LOG

    def _on_hello(self, event: Event) -> Change:
        self.hello = event
        self.sites = {
            entry["path"]: SiteInfo(
                entry["path"], entry.get("op", ""), entry.get("layer"), entry.get("kind")
            )
            for entry in event.get("sites", ())
        }
        self.order = {path: index for index, path in enumerate(self.sites)}
        self.death, self.op, self.entered = {}, {}, None
        self.layer_readings, self.residual = [], []
        return Change.HELLO | Change.SITES | Change.DEATH | Change.READINGS | Change.OP

    def _on_state(self, event: Event) -> Change:
        before, self.state = self.state, event
        change = Change.STATE | Change.SITES
        if "breaks" in event and event["breaks"] != self.breaks:
            self.breaks = event["breaks"]
            change |= Change.BREAKS
        if event.get("forward") != before.get("forward"):
            self._forget_forward()
        if self.name != "dead" and self.death:
            self.death = {}
            change |= Change.DEATH
        if self.idle:
            self.entered = None
            self._place(event.get("site"))
            change |= Change.STOPPED
        return change

    def _forget_forward(self) -> None:
        for site in self.sites.values():
            site.done = False

    def _place(self, path: str | None) -> None:
        """Sites after the current one are pending again: the session may have gone back."""
        position = self.order.get(path or "", -1)
        if self.name == "finished":
            return
        for index, site in enumerate(self.sites.values()):
            if index > position:
                site.done = False
            elif index == position:
                site.done = True

    def _on_enter(self, event: Event) -> Change:
        self.entered = event["site"]
        return Change.SITES

    def _on_site(self, event: Event) -> Change:
        site = self.sites.get(event["site"])
        if site is None:
            return Change.NONE
        site.done = True
        site.seconds = event.get("seconds")
        site.alarm = event.get("alarm") or ""
        site.route = event.get("route") or site.route
        if event.get("own_error") is not None:
            site.own_error = event["own_error"]
        return Change.SITES

    def _on_log(self, event: Event) -> Change:
        return self.note(event.get("stream", "worker"), event.get("text", ""))

    def _on_died(self, event: Event) -> Change:
        self.death, self.run_sent = event, None
        self.state = {**self.state, "state": "dead"}
        self.note("error", event.get("message", "the worker died"))
        return Change.DEATH | Change.STATE | Change.SITES | Change.LOG

    # -- replies

    def _on_reply(self, event: Event) -> Change:
        if event.get("id") == self.run_sent:
            self.run_sent = None
        quiet = event.get("id") in self.silent
        self.silent.discard(event.get("id", -1))
        line = event.get("line", "")
        if not event.get("ok"):
            refused = self.fail(event.get("error") or {})
            return Change.NONE if quiet else refused | Change.STATE
        result = event.get("result") or {}
        name = _full_name(line)
        handler: Callable[[str, Event, bool], Change] = getattr(
            self, f"_reply_{name}", self._reply_other
        )
        return handler(line, result, quiet)

    def fail(self, error: Event) -> Change:
        """Show and log a command that was refused."""
        self.error = error
        self.note("error", f"error: {error.get('message', 'unknown')}")
        if error.get("hint"):
            self.note("error", f"hint: {error['hint']}")
        return Change.ERROR | Change.LOG

    def _reply_op(self, line: str, result: Event, quiet: bool) -> Change:
        self.op = result
        return Change.OP

    def _reply_sites(self, line: str, result: Event, quiet: bool) -> Change:
        for entry in result.get("sites", ()):
            site = self.sites.setdefault(entry["path"], SiteInfo(entry["path"], entry["op"]))
            site.done = entry.get("state") in ("done", "current")
            site.seconds, site.own_error = entry.get("seconds"), entry.get("own_error")
            site.alarm, site.stops = entry.get("alarm") or "", bool(entry.get("break"))
            site.route, site.note = entry.get("route") or "", entry.get("note") or ""
        return Change.SITES

    def _reply_readings(self, line: str, result: Event, quiet: bool) -> Change:
        readings = result.get("readings", [])
        if not quiet:
            return self._show(line, f"{len(readings)} readings", readings_table(readings))
        if line.endswith(" residual"):
            self.residual = readings
        else:
            self.layer_readings = readings
        return Change.READINGS

    def _reply_print(self, line: str, result: Event, quiet: bool) -> Change:
        title = f"{result.get('dtype', '')} {list(result.get('shape') or [])}".strip()
        return self._show(line, title, str(result.get("text", "")))

    _reply_eval = _reply_print

    def _reply_watch(self, line: str, result: Event, quiet: bool) -> Change:
        self.watches = result.get("watches", [])
        return Change.WATCHES

    def _reply_break(self, line: str, result: Event, quiet: bool) -> Change:
        self.breaks = result.get("breaks", self.breaks)
        change = Change.BREAKS
        if not quiet and result.get("text"):
            change |= self.note("result", str(result["text"]))
        return change

    _reply_breaks = _reply_delete = _reply_break

    def _reply_toggle(self, line: str, result: Event, quiet: bool) -> Change:
        for changed in result.get("changed", ()):
            before, after = changed["before"]["implementation"], changed["after"]["implementation"]
            effect = f"  {changed['effect']}" if changed.get("effect") else ""
            self.note("result", f"{changed['site']}: {before} → {after}{effect}")
        if not result.get("changed"):
            self.note("result", "route: " + " ".join(result.get("route", ())))
        return Change.LOG | self._reply_moved(line, result.get("state") or {}, quiet)

    _reply_route = _reply_toggle

    def _reply_moved(self, line: str, result: Event, quiet: bool) -> Change:
        """A result that is the session's state."""
        return self._on_state(result) if result.get("state") else Change.NONE

    _reply_step = _reply_next = _reply_finish = _reply_layer = _reply_continue = _reply_moved
    _reply_until = _reply_back = _reply_rerun = _reply_goto = _reply_reset = _reply_moved
    _reply_status = _reply_shadow = _reply_probes = _reply_pause = _reply_restart = _reply_moved

    def _reply_other(self, line: str, result: Event, quiet: bool) -> Change:
        return Change.NONE if quiet else self._show(line, "", any_result(result))

    def _show(self, line: str, title: str, text: str) -> Change:
        self.values = [Value(line, title, text), *self.values[:49]]
        return Change.VALUES


def _full_name(line: str) -> str:
    try:
        return parse(line).command.name
    except DSV4Error:
        return line.split(" ")[0]
