"""Why the worker is gone, and how to go on. Hidden while it lives."""

from __future__ import annotations

from textual import events
from textual.widgets import Static

from dsv4_bench.workbench.tui.panes import death_lines
from dsv4_bench.workbench.tui.records import Event
from dsv4_bench.workbench.tui.widgets.lines_pane import to_content


class DeathBanner(Static):
    _death: Event | None = None

    def show(self, death: Event) -> None:
        self._death = death
        self.display = bool(death)
        self._redraw()

    def on_resize(self, event: events.Resize) -> None:
        self._redraw()

    def _redraw(self) -> None:
        if self._death:
            width = self.size.width or self.app.size.width
            self.update(to_content(death_lines(self._death, width - 4)))
