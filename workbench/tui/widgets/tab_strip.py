"""One line naming the panes with their keys; the chosen one is marked."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

from dsv4_bench.workbench.tui.keys import PANES


class TabStrip(Static):
    chosen: reactive[str] = reactive("op")
    counts: reactive[dict[str, str]] = reactive(dict)

    def render(self) -> Content:
        labels = [
            f"{number} {pane}{self.counts.get(pane, '')}"
            for number, pane in enumerate(PANES, start=1)
        ]
        pad = " " if sum(len(label) + 2 for label in labels) <= self.size.width else ""
        parts = []
        for pane, label in zip(PANES, labels, strict=True):
            style = "bold reverse" if pane == self.chosen else "$foreground-muted"
            click = f"@click=screen.pane('{pane}')"
            parts.append(Content.styled(f"{pad}{label}{pad}", f"{style} {click}"))
        return Content("" if pad else " ").join(parts)
