"""Watch mode: the op the session stands at is built and run again whenever its source is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from dsv4_bench.workbench.tui import watching_view as view
from dsv4_bench.workbench.tui.records import Event
from dsv4_bench.workbench.tui.store import Store
from dsv4_bench.workbench.tui.watching import Watching
from dsv4_bench.workbench.tui.widgets.lines_pane import LinesPane, to_content

HINT = "edit and save the source elsewhere   esc ends watching"
TICK = 0.25  # seconds between two looks
BUSY_AFTER = 2  # ticks without a reply that mean that something is being built


class WatchScreen(ModalScreen[None]):
    """Watches `site`; `ask(line)` sends a quiet line and `send(line)` one that the user sees."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,S", "dismiss", "Close")]

    def __init__(
        self, site: str, store: Store, ask: Callable[[str], None], send: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.watching = Watching(site)
        self._store = store
        self._ask = ask
        self._send = send
        self._waited = 0
        self._head = Static(id="watching-head")
        self._pane = LinesPane("attempts", id="watching-attempts")

    def compose(self) -> ComposeResult:
        with Vertical(id="watching") as box:
            yield from (self._head, self._pane)
        box.border_title = "watch mode"
        box.border_subtitle = HINT

    def on_mount(self) -> None:
        self._pane.focus()
        self.set_interval(TICK, self.tick)
        self.call_after_refresh(self.tick)

    def on_resize(self) -> None:
        self.call_after_refresh(self._show)

    def tick(self) -> None:
        """Send what is to be sent now."""
        watching, store = self.watching, self._store
        self._waited = self._waited + 1 if watching.waiting else 0
        for line in watching.tick(store.name, store.state.get("site")):
            quiet = line.startswith(("reload", "sources"))
            (self._ask if quiet else self._send)(line)
        self._show()

    def replied(self, reply: Event) -> None:
        self.watching.replied(reply)
        self._show()

    def died(self, message: str) -> None:
        self.watching.died(message)
        self._show()

    def _show(self) -> None:
        width = self._pane.scrollable_content_region.width
        if width <= 0:
            return
        busy = self._waited >= BUSY_AFTER
        self._head.update(to_content(view.head_lines(self.watching, busy, width)))
        attempts = list(self.watching.attempts)
        self._pane.show(lambda w, h: view.attempt_lines(attempts, w), topic=len(attempts))
