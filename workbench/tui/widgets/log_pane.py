"""The log: output of the engine and its kernels, narration, commands and their results."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text
from textual.widgets import RichLog

from dsv4_bench.workbench.tui.records import LogLine

LABELS = {
    "stdout": ("out  ", ""),
    "stderr": ("err  ", "text-warning"),
    "worker": ("     ", "text-disabled"),
    "command": ("›    ", "text-accent"),
    "result": ("     ", ""),
    "error": ("!    ", "text-error"),
}
MAX_LINES = 5000


class LogPane(RichLog):
    def __init__(self, id: str) -> None:
        super().__init__(id=id, max_lines=MAX_LINES, wrap=True, auto_scroll=True, min_width=20)
        self.border_title = "log  (o hides)"

    def add(self, lines: Iterable[LogLine]) -> None:
        colours = self.app.theme_variables
        for line in lines:
            label, name = LABELS.get(line.stream, LABELS["worker"])
            colour = colours.get(name, "")
            style = colour if colour.startswith("#") else ""
            self.write(Text.assemble((label, style), Text.from_ansi(line.text, style=style)))
