"""The heat map of an output's error, over the main screen: arrows move, enter and backspace zoom."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

from dsv4_bench.workbench.tui import heat_view as view
from dsv4_bench.workbench.tui.format import shape
from dsv4_bench.workbench.tui.widgets.lines_pane import LinesPane

HINT = "arrows  m worst  enter, backspace zoom  tab next output  esc closes"
ZOOM = 4


class HeatScreen(ModalScreen[None]):
    """Shows one heat map at a time; `ask(line)` asks the session for another one, by `command`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,h", "dismiss", "Close"),
        Binding("up,k", "move(-1, 0)", "Up"),
        Binding("down,j", "move(1, 0)", "Down"),
        Binding("left", "move(0, -1)", "Left"),
        Binding("right,l", "move(0, 1)", "Right"),
        Binding("pageup", "move(-8, 0)", "Up 8"),
        Binding("pagedown", "move(8, 0)", "Down 8"),
        Binding("home", "move(0, -100000)", "First column"),
        Binding("end", "move(0, 100000)", "Last column"),
        Binding("m", "worst", "Worst cell"),
        Binding("enter,plus", "zoom(True)", "Zoom in", priority=True),
        Binding("backspace,minus", "zoom(False)", "Zoom out"),
        Binding("tab", "output", "Next output", priority=True),
    ]

    def __init__(
        self, heat: view.Heat, ask: Callable[[str], None], command: str = "heatmap"
    ) -> None:
        super().__init__()
        self.heat = heat
        self._command = command
        self.cursor = view.worst_cell(heat)
        self._ask = ask
        self._asked = (0, 0)
        self._pane = LinesPane("", id="heat")

    def compose(self) -> ComposeResult:
        self._pane.border_subtitle = HINT
        yield self._pane

    def on_mount(self) -> None:
        self._pane.can_focus = False

    def show(self, heat: view.Heat) -> None:
        """Take another map: of another area, output or size."""
        same = all(heat[name] == self.heat[name] for name in ("output", "area", "block", "site"))
        self.heat = heat
        self.cursor = self.cursor if same else view.worst_cell(heat)
        self._draw()

    def _draw(self) -> None:
        heat, cursor = self.heat, self.cursor
        title = f"{heat['site']}  {heat['output']} {shape(heat['shape'])}  "
        self._pane.border_title = title + f"{heat['route']} against {heat['against']}"
        self._pane.show(lambda w, h: view.heat_lines(heat, cursor, w, h))

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._fit)

    def _fit(self) -> None:
        """Ask for as many cells as there is room for, if they are not what was asked for last."""
        cells = self._cells()
        if cells != self._asked:
            self._request(self.heat["output"], self._area())
        self._draw()

    def _cells(self) -> tuple[int, int]:
        region = self._pane.scrollable_content_region
        return view.cells_for(region.width, region.height)

    def _area(self) -> str:
        area = self.heat["area"]
        rows, columns = f"{area['top']}:{area['bottom']}", f"{area['left']}:{area['right']}"
        return f"rows={rows} columns={columns}"

    def _request(self, output: str, area: str) -> None:
        self._asked = self._cells()
        high, wide = self._asked
        self._ask(" ".join(f"{self._command} {output} {area} cells={high}x{wide}".split()))

    # -- actions

    def action_move(self, rows: int, columns: int) -> None:
        self.cursor = view.moved(self.heat, self.cursor, rows, columns)
        self._draw()

    def action_worst(self) -> None:
        self.cursor = view.worst_cell(self.heat)
        self._draw()

    def action_zoom(self, closer: bool) -> None:
        area = view.zoomed(self.heat, self.cursor, 1 / ZOOM if closer else ZOOM)
        if area is not None:
            self._request(self.heat["output"], area)

    def action_output(self) -> None:
        names = self.heat["outputs"]
        following = names[(names.index(self.heat["output"]) + 1) % len(names)]
        if following != self.heat["output"]:
            self._request(following, "")
