"""The app: owns the session, passes lines to it and its events to the screen."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from textual import on
from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.tui import keys
from dsv4_bench.workbench.tui.inbox import Inbox
from dsv4_bench.workbench.tui.layout import HEIGHT_CLASSES, WIDTH_CLASSES
from dsv4_bench.workbench.tui.palette import SessionProvider
from dsv4_bench.workbench.tui.queries import Queries
from dsv4_bench.workbench.tui.records import Event
from dsv4_bench.workbench.tui.screens.main import MainScreen
from dsv4_bench.workbench.tui.store import Change, Store

if TYPE_CHECKING:
    from dsv4_bench.workbench.session import SessionOptions

OnEvent = Callable[[Event], None]
CLOCK_TICK = 0.5
SHOWN_AFTER = 1.0  # seconds of running before the status line counts them
DEBOUNCE = 0.08  # seconds the tree cursor rests before the session is asked about its site


class SessionLike(Protocol):
    """What the UI needs of a session."""

    def send(self, line: str, log: bool = True) -> int: ...

    def close(self) -> None: ...


SessionFactory = Callable[[OnEvent], SessionLike]


class WorkbenchApp(App[None]):
    """Everything the user does becomes a line for `session.send`."""

    TITLE = "dsv4-bench"
    CSS_PATH = "app.tcss"
    COMMANDS: ClassVar = {SessionProvider}
    HORIZONTAL_BREAKPOINTS = WIDTH_CLASSES
    VERTICAL_BREAKPOINTS = HEIGHT_CLASSES
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "quit", "Quit", show=False, priority=True),
    ]

    class Arrived(Message):
        """A batch of events."""

        def __init__(self, events: list[Event]) -> None:
            super().__init__()
            self.events = events

    def __init__(
        self,
        session_factory: SessionFactory,
        checkpoint: str = "",
        clock: Callable[[], float] = time.monotonic,
        lines: Sequence[str] = (),
    ) -> None:
        """`lines` are sent once the checkpoint is open."""
        super().__init__()
        self._lines = list(lines)
        self.store = Store()
        self.queries = Queries()
        self.session: SessionLike | None = None
        self.inbox: Inbox | None = None
        self._factory = session_factory
        self._clock = clock
        self._since = clock()
        self._main = MainScreen(self.store, self.send, self.ask, checkpoint)

    def get_default_screen(self) -> MainScreen:
        return self._main

    def on_mount(self) -> None:
        self._quit_on_signals()
        self.call_after_refresh(self._open)

    def _quit_on_signals(self) -> None:
        """A hangup or a kill ends the UI the orderly way: terminal restored, worker ended."""
        if self.is_headless or sys.platform == "win32":
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self.exit)

    def _open(self) -> None:
        self.inbox = Inbox(asyncio.get_running_loop(), self._deliver)
        self._since = self._clock()
        try:
            self.session = self._factory(self.inbox.put)
        except (DSV4Error, OSError) as error:
            self._deliver([{"event": "died", "returncode": None, "message": str(error)}])
        self.set_interval(CLOCK_TICK, self._tick)

    def close_session(self) -> None:
        """End the worker; after the terminal was restored, so that nobody waits before a blank."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    # -- session to screen

    def _deliver(self, events: list[Event]) -> None:
        self.post_message(self.Arrived(events))

    @on(Arrived)
    def _arrived(self, message: Arrived) -> None:
        change = self.store.apply_all(message.events)
        for event in message.events:
            if event.get("event") == "reply":
                self.queries.replied(event)
        self.queries.changed(change, self.store)
        self._show(change)
        if self._lines and self.store.hello and self.store.idle:
            self.send(self._lines.pop(0))
        self._ask()

    def _show(self, change: Change) -> None:
        self._main.show(change, self._elapsed())

    def _elapsed(self) -> float | None:
        busy = self.store.running or self.store.name == "opening"
        elapsed = self._clock() - self._since
        return elapsed if busy and elapsed >= SHOWN_AFTER else None

    def _tick(self) -> None:
        if self._elapsed() is not None:
            self._show(Change.NONE)

    # -- screen to session

    def send(self, line: str) -> None:
        """Send a line the user asked for; say why not if it cannot be sent now."""
        try:
            command = parse(line).command
        except DSV4Error as error:
            self._show(self.store.fail(error.to_dict()))
            return
        if command.name == "quit":
            self.exit()
            return
        self.store.note("command", line)
        if not keys.allowed(command.name, self.store.name):
            message, hint = keys.refusal(command.name, self.store.name)
            self._show(self.store.fail({"message": message, "hint": hint}))
            return
        self._main.message("")
        number = self._transmit(line)
        if command.name == "restart":
            self._since = self._clock()
            self._show(self.store.restarting())
        if (command.runs or command.long) and number is not None:
            self.store.run_sent, self._since = number, self._clock()
        self._show(Change.LOG | Change.STATE)

    def _transmit(self, line: str, log: bool = True) -> int | None:
        try:
            return self.session.send(line, log) if self.session else None
        except (DSV4Error, OSError, ValueError) as error:
            self._show(self.store.fail({"message": str(error), "hint": "R restarts the worker"}))
            return None

    def ask(self, line: str) -> None:
        """Send a line that a screen needs answered; it is neither logged nor refused aloud."""
        number = self._transmit(line, log=False)
        if number is not None:
            self.store.silent.add(number)

    def _ask(self) -> None:
        """Send the quiet lines that bring the shown panes up to date."""
        main = self._main
        for kind, line in self.queries.next(self.store, main.cursor, main.shown):
            number = self._transmit(line, log=False)
            if number is not None:
                self.store.silent.add(number)
                self.queries.sent(kind, number, main.cursor)

    @on(MainScreen.LooksElsewhere)
    def _looks_elsewhere(self) -> None:
        self.set_timer(DEBOUNCE, self._ask)


def _draw_on_the_terminal() -> None:
    """Textual draws on stderr; with `2> file` that is not the terminal, so use stdout."""
    out, err = sys.__stdout__, sys.__stderr__
    if out is not None and out.isatty() and (err is None or not err.isatty()):
        sys.__stderr__ = out  # type: ignore[misc]


def run_tui(
    options: SessionOptions,
    session_factory: SessionFactory | None = None,
    lines: Sequence[str] = (),
    **run: Any,
) -> int:
    """Run the terminal UI until the user quits. `run` goes to Textual's App.run."""

    def from_options(on_event: OnEvent) -> SessionLike:
        from dsv4_bench.workbench.session import Session

        return Session(options, on_event)

    _draw_on_the_terminal()
    checkpoint = str(getattr(options, "checkpoint", None) or "")
    app = WorkbenchApp(session_factory or from_options, checkpoint, lines=lines)
    try:
        app.run(**run)
    finally:
        app.close_session()
    return app.return_code or 0
