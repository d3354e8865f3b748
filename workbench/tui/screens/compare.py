"""Two bundles side by side: the ops that differ, and the map of the selected difference."""

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

from dsv4_bench.workbench.tui import compare_view as view
from dsv4_bench.workbench.tui import heat_view
from dsv4_bench.workbench.tui.screens.heat import HeatScreen
from dsv4_bench.workbench.tui.spans import DIM
from dsv4_bench.workbench.tui.widgets.lines_pane import LinesPane, to_content

HINT = "up, down select  enter map  e equal ones too  esc closes"
DEBOUNCE = 0.08  # seconds the selection rests before its map is asked for


class CompareScreen(ModalScreen[None]):
    """Shows the report of `compare`; `ask(line)` asks the session for a map."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss", "Close"),
        Binding("e", "everything", "Equal ops too"),
    ]

    def __init__(self, report: view.Report, ask: Callable[[str], None]) -> None:
        super().__init__()
        self.report = report
        self.heat: heat_view.Heat = {}
        self.numbers: list[int] = []
        self._ask = ask
        self._everything = False
        self._head = Static(id="compare-head")
        self._columns = Static(id="compare-columns", markup=False)
        self._list = OptionList(id="compare-list", compact=True)
        self._map = LinesPane("the difference", id="compare-map")

    def compose(self) -> ComposeResult:
        with Vertical(id="compare") as box:
            yield from (self._head, self._columns, self._list, self._map)
        box.border_title = f"A {self.report['a']}   B {self.report['b']}"
        box.border_subtitle = HINT

    def on_mount(self) -> None:
        self._map.can_focus = False
        self._list.focus()

    @property
    def number(self) -> int | None:
        """The number of the selected op in the report."""
        row = self._list.highlighted
        return self.numbers[row] if row is not None and row < len(self.numbers) else None

    def show_map(self, heat: heat_view.Heat) -> None:
        """Take the map of a difference."""
        self.heat = heat
        cursor = heat_view.worst_cell(heat)
        self._map.border_title = f"{heat['site']}  {heat['output']}"
        self._map.show(lambda w, h: heat_view.heat_lines(heat, cursor, w, h))

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        """The list for the present width, its selection kept, or at the first difference."""
        width = self._list.scrollable_content_region.width - 2
        if width <= 0:
            return
        before = self.number
        self._head.update(to_content(view.head_lines(self.report, width)))
        self.numbers = view.shown(self.report, self._everything)
        header, rows = view.table(self.report, self.numbers, width)
        self._columns.update(header)
        self._list.clear_options()
        self._list.add_options([Option(Content.styled(*row)) for row in rows])
        if not rows:
            self._map.show(lambda w, h: [[("every op has the same bits in both", DIM)]])
            return
        start = view.first_shown(self.report, self.numbers)
        kept = self.numbers.index(before) if before in self.numbers else start
        self._list.highlighted = kept

    @on(OptionList.OptionHighlighted)
    def _selected(self) -> None:
        number = self.number
        self.set_timer(DEBOUNCE, lambda: self._request(number))

    def _request(self, number: int | None) -> None:
        if number is None or number != self.number or self.app.screen is not self:
            return
        region = self._map.scrollable_content_region
        high, wide = heat_view.cells_for(region.width, region.height)
        self._ask(f"difference {number} cells={high}x{wide}")

    @on(OptionList.OptionSelected)
    def _open_map(self) -> None:
        if self.heat and self.number is not None:
            self.app.push_screen(HeatScreen(self.heat, self._ask, f"difference {self.number}"))

    def action_everything(self) -> None:
        self._everything = not self._everything
        self._fill()
