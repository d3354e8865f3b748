"""What an op took before: every run that was kept, with its ratio to a baseline."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from dsv4_bench.workbench.tui import history_view as view
from dsv4_bench.workbench.tui.records import Event
from dsv4_bench.workbench.tui.widgets.lines_pane import to_content

HINT = "b baseline for the ratios  • this session  esc closes"


class HistoryScreen(ModalScreen[None]):
    """Shows the reply of `history`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,H", "dismiss", "Close"),
        Binding("b", "baseline", "Ratios to the selected row"),
    ]

    def __init__(self, found: Event) -> None:
        super().__init__()
        self.found = found
        self.base = view.first_baseline(found["rows"])
        self._head = Static(id="history-head")
        self._columns = Static(id="history-columns", markup=False)
        self._list = OptionList(id="history-list", compact=True)

    def compose(self) -> ComposeResult:
        with Vertical(id="history") as box:
            yield from (self._head, self._columns, self._list)
        box.border_title = "history"
        box.border_subtitle = HINT

    def on_mount(self) -> None:
        self._list.focus()

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        width = self._list.scrollable_content_region.width - 2
        if width <= 0:
            return
        rows, kept = self.found["rows"], self._list.highlighted
        self._head.update(
            to_content(view.head_lines(self.found["pattern"], rows, self.base, width))
        )
        header, lines = view.table(rows, self.base, width)
        self._columns.update(header if rows else "")
        self._list.clear_options()
        self._list.add_options([Option(Content.styled(*line)) for line in lines])
        self._list.highlighted = (kept or 0) if rows else None

    def action_baseline(self) -> None:
        row = self._list.highlighted
        if row is not None and self.found["rows"][row]["seconds"] is not None:
            self.base = row
            self._fill()
