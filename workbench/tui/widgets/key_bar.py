"""The bottom line: the keys used most, greyed while they cannot be used.

One line of text, where Textual's Footer mounts a widget a key at every change of focus or state.
"""

from __future__ import annotations

from collections.abc import Callable

from textual import events
from textual.content import Content
from textual.widget import Widget

from dsv4_bench.workbench.tui.keys import BAR

KEY, LABEL, GREY = "bold $footer-key-foreground", "$footer-foreground", "$foreground-disabled"


class KeyBar(Widget):
    ALLOW_SELECT = False

    def __init__(self, usable: Callable[[str], bool | None], id: str) -> None:
        """`usable` of an entry's name: True, None for greyed, False for hidden."""
        super().__init__(id=id)
        self._usable = usable
        self._ends: list[tuple[int, str]] = []  # column after an entry, and its action

    def render(self) -> Content:
        self._ends = []
        bar = Content("")
        for name, key, label, action in BAR:
            usable = self._usable(name)
            if usable is False:
                continue
            styles = (KEY, LABEL) if usable else (GREY, GREY)
            bar += Content.assemble((f" {key} ", styles[0]), (f"{label} ", styles[1]))
            self._ends.append((bar.cell_length, action))
        return bar

    async def on_click(self, event: events.Click) -> None:
        action = next((action for end, action in self._ends if event.x < end), None)
        if action:
            await self.screen.run_action(action)
