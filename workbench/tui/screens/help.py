"""Help, an op's full contract, counters of its kernels: text over the main screen, closed with escape, q or ?."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from dsv4_bench.workbench.tui.counters_view import counter_lines
from dsv4_bench.workbench.tui.help_text import help_lines
from dsv4_bench.workbench.tui.records import Event
from dsv4_bench.workbench.tui.spans import Line
from dsv4_bench.workbench.tui.widgets.lines_pane import LinesPane


class TextScreen(ModalScreen[None]):
    """A titled, scrolling text."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,f1,i", "dismiss", "Close"),
    ]

    def __init__(self, title: str, draw: Callable[[int], list[Line]]) -> None:
        super().__init__()
        self._title = title
        self._draw = draw

    def compose(self) -> ComposeResult:
        pane = LinesPane(self._title, id="text")
        pane.border_subtitle = "escape closes"
        yield pane

    def on_mount(self) -> None:
        pane = self.query_one(LinesPane)
        pane.show(lambda width, height: self._draw(width))
        pane.focus()


def help_screen() -> TextScreen:
    return TextScreen("keys and commands", help_lines)


def counters_screen(found: Event) -> TextScreen:
    return TextScreen(f"ncu {found['site']}", lambda width: counter_lines(found, width))


def contract_screen(site: str, doc: str) -> TextScreen:
    text = doc.strip() or "this op has no contract text"
    return TextScreen(site, lambda width: [[(line, "")] for line in text.split("\n")])
