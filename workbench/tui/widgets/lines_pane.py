"""A scrolling pane of styled lines, redrawn for its width whenever that changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from textual import events
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from dsv4_bench.workbench.tui.spans import Line

Draw = Callable[[int, int], list[Line]]


def to_content(lines: Iterable[Line]) -> Content:
    return Content("\n").join(Content.assemble(*line) for line in lines)


class LinesPane(VerticalScroll):
    """`show` takes a function of (width, height); `topic` says what is shown: a new one scrolls up."""

    def __init__(self, title: str, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.border_title = title
        self._draw: Draw = lambda width, height: []
        self._topic: object = None
        self._lines: list[Line] = []
        self._text = Static()

    def compose(self) -> ComposeResult:
        yield self._text

    def show(self, draw: Draw, topic: object = None) -> None:
        self._draw = draw
        if topic != self._topic:
            self._topic = topic
            self.scroll_home(animate=False)
        self._redraw()

    def on_resize(self, event: events.Resize) -> None:
        self._redraw()

    def _redraw(self) -> None:
        region = self.scrollable_content_region
        if self.is_mounted and region.width > 0:
            lines = self._draw(region.width, region.height)
            if lines != self._lines:
                self._lines = lines
                self._text.update(to_content(lines))
