"""What the UI knows, built from the session's events. No Textual, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Flag, auto

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.tui.records import Event, LogLine, SiteInfo, Value, real, stub_view

IDLE = ("ready", "stopped", "finished")
LOG_LINES_KEPT = 2000
WATCH_LINES = ("sources", "reload")  # what watch mode asks; it wants to hear of a refusal too
PLACE = ("state", "site", "index", "forward")


class Change(Flag):
    """Which parts of the screen an event touches."""

    NONE = 0
    HELLO = auto()
    STATE = auto()
    STOPPED = auto()  # the session came to rest elsewhere: ask again for what is shown
    SITES = auto()
    OP = auto()
    READINGS = auto()
    BREAKS = auto()
    WATCHES = auto()
    VALUES = auto()
    HEAT = auto()
    COMPARISON = auto()
    TIMING = auto()
    HISTORY = auto()
    COUNTERS = auto()
    WATCHED = auto()  # watch mode has heard from the session
    RERUN = auto()  # the held op has other outputs than before
    LOG = auto()
    ERROR = auto()
    DEATH = auto()


@dataclass
class Store:
    """The last known state of everything on the screen."""

    hello: Event = field(default_factory=dict)
    state: Event = field(default_factory=lambda: {"state": "opening"})
    forward: int = 0
    sites: dict[str, SiteInfo] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    entered: str | None = None
    op: Event = field(default_factory=dict)
    heat: Event = field(default_factory=dict)
    comparison: Event = field(default_factory=dict)
    timing: Event = field(default_factory=dict)
    history: Event = field(default_factory=dict)
    counters: Event = field(default_factory=dict)
    watched: Event = field(default_factory=dict)
    implementations: dict[str, list[str]] = field(default_factory=dict)  # by op
    effects: dict[str, str] = field(default_factory=dict)
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
        """Sites that raised an alarm, in forward order."""
        return [path for path, site in self.sites.items() if site.alarm]

    def break_number(self, site: str) -> int | None:
        """The breakpoint that is exactly this site, if there is one."""
        return next((int(b["number"]) for b in self.breaks if b["text"].strip() == site), None)

    def tensor_names(self) -> list[str]:
        """What an expression can name now."""
        views = [*self.op.get("inputs", ()), *self.op.get("outputs", ())]
        return [view["name"] for view in views]

    def view_of(self, site: str) -> Event:
        """The op pane's view of `site`, with what the last route change said about it."""
        view = self.op if self.op.get("site") == site else stub_view(self.sites[site])
        effect = view.get("effect") or self.effects.get(site, "")
        return {**view, "effect": effect, "held": view.get("held") and self.name != "dead"}

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
        self.log.extend(LogLine(stream, line) for line in text.rstrip("\n").split("\n"))
        if len(self.log) > LOG_LINES_KEPT:
            dropped = len(self.log) - LOG_LINES_KEPT // 2
            notice = LogLine("worker", f"… {dropped} lines came too fast to show")
            self.log = [notice, *self.log[dropped:]]
        return Change.LOG

    def fail(self, error: Event) -> Change:
        """Show and log a command that was refused."""
        self.error = error
        self.note("error", f"error: {error.get('message', 'unknown')}")
        if error.get("hint"):
            self.note("error", f"hint: {error['hint']}")
        return Change.ERROR | Change.LOG

    def restarting(self) -> Change:
        """A new worker was asked for: as if just started, but for the log and the breakpoints."""
        self.state = {**self.state, "state": "opening"}
        self.death, self.run_sent, self.entered = {}, None, None
        return Change.STATE | Change.DEATH

    def _on_hello(self, event: Event) -> Change:
        self.hello = event
        self.sites = {
            entry["path"]: SiteInfo(
                entry["path"], entry.get("op", ""), entry.get("layer"), entry.get("kind")
            )
            for entry in event.get("sites", ())
        }
        self.implementations = dict(event.get("implementations", {}))
        self.order = {path: index for index, path in enumerate(self.sites)}
        self.death, self.op, self.entered = {}, {}, None
        self.layer_readings, self.residual = [], []
        for text in event.get("notes", ()):
            self.note("worker", text)
        shown = Change.HELLO | Change.SITES | Change.DEATH | Change.READINGS | Change.OP
        return shown | Change.LOG

    def _on_state(self, event: Event) -> Change:
        before = self.state
        self.state = {"seconds": before.get("seconds"), **event}
        change = Change.STATE
        for name, kind in (("breaks", Change.BREAKS), ("watches", Change.WATCHES)):
            if name in event and event[name] != getattr(self, name):
                setattr(self, name, event[name])
                change |= kind
        if event.get("forward", self.forward) != self.forward:
            self.forward = event["forward"]
            self._forget_forward()
        moved = any(event.get(name) != before.get(name) for name in PLACE)
        if moved and self.state["state"] in IDLE:
            self.effects = {}
            self._place(event.get("site"))
            change |= Change.STOPPED | Change.SITES | self._say_why()
        return change

    def _say_why(self) -> Change:
        """Log a stop that the user did not ask for step by step."""
        why, site = str(self.state.get("why") or ""), self.state.get("site")
        if site is None or why in ("", "step", "ready"):
            return Change.NONE
        return self.note("result", f"{self.state['state']} at {site}: {why}")

    def _forget_forward(self) -> None:
        for site in self.sites.values():
            site.done = False

    def _place(self, path: str | None) -> None:
        """Sites after the current one are pending again: the session may have gone back."""
        self.entered = None
        position = self.order.get(path or "", -1)
        for index, site in enumerate(self.sites.values()):
            if index == position:
                site.done = True
            elif index > position and self.state["state"] != "finished":
                site.done = False

    def _on_enter(self, event: Event) -> Change:
        self.entered = event["site"]
        first = next(iter(self.sites.values()), None)
        if first is not None and first.path == self.entered and first.done:
            self.forward += 1
            self._forget_forward()
        return Change.SITES

    def _on_site(self, event: Event) -> Change:
        site = self.sites.get(event["site"])
        if site is None:
            return Change.NONE
        site.done = True
        site.seconds = event.get("seconds")
        site.route = event.get("route") or site.route
        self.take_errors(site, event)
        return Change.SITES

    def take_errors(self, site: SiteInfo, entry: Event) -> None:
        """Errors and alarm of a site that ran.

        An alarm stays until the same forward pass runs the site again without one.
        """
        site.times = real(entry.get("times"))
        site.carried_error = real(entry.get("carried_error"))
        text = entry.get("alarm") or ""
        if text or site.alarm_forward == self.forward:
            site.alarm, site.alarm_forward = text, self.forward
            site.anomaly = entry.get("anomaly") or ("broken" if text else "")

    def _on_log(self, event: Event) -> Change:
        return self.note(event.get("stream", "worker"), event.get("text", ""))

    def _on_died(self, event: Event) -> Change:
        self.death, self.run_sent = event, None
        self.state = {**self.state, "state": "dead"}
        self.note("error", event.get("message", "the worker died"))
        return Change.DEATH | Change.STATE | Change.SITES | Change.LOG

    def _on_fatal(self, event: Event) -> Change:
        """The worker could not open the checkpoint, or gave up with a reason."""
        return self._on_died({"event": "died", "fatal": True, **event["error"]})

    def _on_reply(self, event: Event) -> Change:
        from dsv4_bench.workbench.tui.replies import take_reply

        change = Change.NONE
        if event.get("id") == self.run_sent:
            self.run_sent, change = None, Change.STATE
        quiet = event.get("id") in self.silent
        self.silent.discard(event.get("id", -1))
        line = event.get("line", "")
        if event.get("ok"):
            return change | take_reply(self, line, event.get("result") or {}, quiet)
        if quiet and command_name(line) in WATCH_LINES:
            self.watched = {"error": (event.get("error") or {}).get("message", "")}
            return Change.WATCHED
        if quiet:
            return Change.NONE
        return self.fail(event.get("error") or {}) | Change.STATE


def command_name(line: str) -> str:
    """The command a line starts with, aliases resolved."""
    try:
        return parse(line).command.name
    except DSV4Error:
        return line.split(" ")[0]
