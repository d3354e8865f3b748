"""Where the time of the current layer goes: a bar an op, sorted by time, floor gap or error."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from dsv4_bench.workbench.tui import timing_view as view
from dsv4_bench.workbench.tui.widgets.lines_pane import to_content

HINT = "t time  g gap  e error  o order  n ncu  h history  enter op  esc closes"
COUNTING = "counting under ncu; every kernel is replayed many times, so this takes a while"


class TimingScreen(ModalScreen[None]):
    """Shows the reply of `timing`; `go(site)` shows a site on the main screen, `send` sends a line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,T", "dismiss", "Close"),
        Binding("t", "sort('time')", "Longest first"),
        Binding("g", "sort('gap')", "Furthest above the floor first"),
        Binding("e", "sort('error')", "Largest error first"),
        Binding("o", "sort('order')", "As they run"),
        Binding("n", "ask('ncu')", "Count what its kernels do, with Nsight Compute"),
        Binding("h", "ask('history')", "What it took before"),
    ]

    def __init__(
        self, timing: view.Timing, go: Callable[[str], None], send: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.timing = timing
        self.order = "order"
        self._go = go
        self._send = send
        self._message = Static(id="timing-message", markup=False)
        self._head = Static(id="timing-head")
        self._columns = Static(id="timing-columns", markup=False)
        self._list = OptionList(id="timing-list", compact=True)

    def compose(self) -> ComposeResult:
        with Vertical(id="timing") as box:
            yield from (self._head, self._columns, self._list, self._message)
        box.border_title = "timing"
        box.border_subtitle = HINT

    def on_mount(self) -> None:
        self._list.focus()

    def on_screen_resume(self) -> None:
        self.message("")

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        width = self._list.scrollable_content_region.width - 2
        if width <= 0:
            return
        self._head.update(to_content(view.head_lines(self.timing, self.order, width)))
        header, rows = view.table(self.timing, self.order, width)
        self._columns.update(header)
        self._list.clear_options()
        self._list.add_options([Option(Content.styled(*row)) for row in rows])
        self._list.highlighted = 0 if rows else None

    def action_sort(self, order: str) -> None:
        self.order = order
        self._fill()

    def action_ask(self, command: str) -> None:
        row = self._list.highlighted
        if row is not None:
            self._send(f"{command} {self._site(row)}")
            if command == "ncu" and not self._message.display:
                self.message(COUNTING)

    def message(self, text: str) -> None:
        """What became of a command that was sent from here; nothing clears it."""
        self._message.update(text)
        self._message.display = bool(text)

    def _site(self, row: int) -> str:
        return str(view.ordered(self.timing, self.order)[row]["site"])

    @on(OptionList.OptionSelected)
    def _show_op(self, event: OptionList.OptionSelected) -> None:
        site = self._site(event.option_index)
        self.dismiss()
        self._go(site)
