"""The breakpoints, with hits; delete removes the selected one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from dsv4_bench.workbench.tui.panes import break_text
from dsv4_bench.workbench.tui.records import Event


class BreakList(OptionList):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("delete,backspace", "remove", "Delete breakpoint", show=False),
    ]

    class Removed(Message):
        """The user wants breakpoint `number` gone."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    def __init__(self, id: str) -> None:
        super().__init__(id=id, classes="pane", compact=True)
        self.border_title = "4 breakpoints"
        self._breaks: Sequence[Event] = ()

    def show(self, breaks: Sequence[Event]) -> None:
        self._breaks = list(breaks)
        self._redraw()

    def on_resize(self, event: events.Resize) -> None:
        self._redraw()

    def _redraw(self) -> None:
        width = self.scrollable_content_region.width
        if width <= 0:
            return
        chosen = self.highlighted
        self.clear_options()
        for entry in self._breaks:
            text = Content(break_text(entry, width))
            self.add_option(Option(text, id=str(entry["number"])))
        if not self._breaks:
            self.add_option(Option("b  stop at the selected op", disabled=True))
            self.add_option(Option(":break nan > 0  stop at a reading", disabled=True))
        elif chosen is not None:
            self.highlighted = min(chosen, len(self._breaks) - 1)

    def action_remove(self) -> None:
        if self.highlighted is not None and self.highlighted < len(self._breaks):
            self.post_message(self.Removed(int(self._breaks[self.highlighted]["number"])))
