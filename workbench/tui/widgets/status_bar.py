"""The status line: state, place, route, shadow, time, memory; as much as fits."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from dsv4_bench.workbench.tui.panes import status_line
from dsv4_bench.workbench.tui.store import Store


class StatusBar(Widget):
    def __init__(self, store: Store, id: str) -> None:
        super().__init__(id=id)
        self._store = store
        self._elapsed: float | None = None

    def show(self, elapsed: float | None) -> None:
        """`elapsed`: seconds since the command started, while it runs."""
        self._elapsed = elapsed
        self.refresh()

    def render(self) -> Content:
        return Content.assemble(*status_line(self._store, self.size.width, self._elapsed))
