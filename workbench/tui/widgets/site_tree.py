"""The site tree: a flat, virtual list; only visible rows are ever rendered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.layout import TREE_COLUMNS, tree_columns
from dsv4_bench.workbench.tui.records import SiteInfo
from dsv4_bench.workbench.tui.site_model import Node, SiteModel, Summary

MARKS = 3  # columns of signs before the name
ROOMY = 24  # with this much room for names, indent by two


class SiteTree(ScrollView, can_focus=True):
    """Rows of a SiteModel with a cursor. `show` redraws, `follow` goes to the current site."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        f"site-tree--{name}"
        for name in (
            "done",
            "current",
            "break",
            "alarm",
            "pending",
            "muted",
            "cursor",
            "group",
            "site",
        )
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Up", show=False),
        Binding("down", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home", "move(-100000)", "First", show=False),
        Binding("end", "move(100000)", "Last", show=False),
        Binding("left", "fold(False)", "Close", show=False),
        Binding("right", "fold(True)", "Open", show=False),
        Binding("enter", "flip", "Open or close", show=False),
    ]

    class Moved(Message):
        """The user put the cursor on another row."""

    class ColumnsChanged(Message):
        """Other columns are shown than before."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self.model = SiteModel()
        self.infos: dict[str, SiteInfo] = {}
        self.current: str | None = None
        self.cursor = 0
        self.known: tuple[str, ...] = ()  # the errors that any site has

    # -- what others ask of it

    @property
    def node(self) -> Node | None:
        rows = self.model.rows
        return rows[self.cursor] if self.cursor < len(rows) else None

    @property
    def site(self) -> str | None:
        return self.node.key if self.node and self.node.is_site else None

    def load(self, infos: dict[str, SiteInfo]) -> None:
        """Take the sites of a model."""
        self.infos = infos
        self.model = SiteModel.build(infos)
        self.cursor, self.current = 0, None
        self._resized()

    def show(self, infos: dict[str, SiteInfo], current: str | None) -> None:
        self.infos, self.current = infos, current
        errors = ("times", "carried_error")
        known = tuple(e for e in errors if any(getattr(i, e) is not None for i in infos.values()))
        if known != self.known:
            self.known = known
            self.post_message(self.ColumnsChanged())
        self.refresh()

    def follow(self, path: str) -> None:
        """Put the cursor on the current site; its layer opens, the layer before closes."""
        if path in self.model.nodes:
            self.model.reveal(path, following=True)
            self._resized()
            self.select(path)

    def select(self, path: str) -> None:
        """Put the cursor on any node, opening what hides it."""
        if path in self.model.nodes:
            row = self.model.reveal(path)
            self._resized()
            self._set_cursor(row, center=True)

    def level(self, step: int) -> None:
        """Up to the enclosing group, or down to its first member."""
        node = self.node
        if node is None:
            return
        if step < 0 and node.parent:
            self._set_cursor(self.model.row_of[node.parent])
        elif step > 0 and not node.is_site:
            self.action_fold(True)
            self._set_cursor(self.cursor + 1)

    # -- actions

    def action_move(self, step: int) -> None:
        self._set_cursor(self.cursor + step)

    def action_page(self, step: int) -> None:
        self._set_cursor(self.cursor + step * max(1, self.size.height - 1))

    def action_fold(self, is_open: bool) -> None:
        node = self.node
        if node is None:
            return
        closed = node.is_site or node.key not in self.model.open
        if not is_open and closed and node.parent:
            self._set_cursor(self.model.row_of[node.parent])
            return
        self.model.set_open(node.key, is_open)
        self._resized()

    def action_flip(self) -> None:
        if self.node and not self.node.is_site:
            self.action_fold(self.node.key not in self.model.open)

    def on_click(self, event: events.Click) -> None:
        row = int(event.y + self.scroll_offset.y)
        if row < len(self.model.rows):
            again = row == self.cursor
            self._set_cursor(row)
            if again:
                self.action_flip()

    def _set_cursor(self, row: int, center: bool = False) -> None:
        row = max(0, min(row, len(self.model.rows) - 1))
        moved, self.cursor = row != self.cursor, row
        region = Region(0, row, self.size.width, 1)
        self.scroll_to_region(region, animate=False, center=center, x_axis=False)
        self.refresh()
        if moved:
            self.post_message(self.Moved())

    def _resized(self) -> None:
        self.virtual_size = Size(0, len(self.model.rows))
        self.cursor = max(0, min(self.cursor, len(self.model.rows) - 1))
        self.refresh()

    # -- drawing

    def columns(self, width: int) -> tuple[str, ...]:
        """The columns after the name, in a tree `width` columns wide."""
        return tree_columns(width, self.known)

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        row = y + int(self.scroll_offset.y)
        if row >= len(self.model.rows):
            return Strip.blank(width, self.rich_style)
        node = self.model.rows[row]
        summary = self.model.summary(node.key, self.infos, self.current)
        segments = self._segments(node, summary, width)
        strip = Strip(segments).adjust_cell_length(width, self.rich_style)
        if row == self.cursor:
            strip = strip.apply_style(self._style("cursor"))
        return strip.apply_style(self.rich_style)

    def _segments(self, node: Node, summary: Summary, width: int) -> Iterable[Segment]:
        for mark, name in _marks(summary):
            yield Segment(mark, self._style(name))
        columns = self.columns(width)
        label, kind = self._label(node)
        room = max(1, width - MARKS - 1 - sum(TREE_COLUMNS[name] for name in columns))
        indent = 1 + node.depth * (2 if room >= ROOMY else 1)
        text = fmt.clip(" " * indent + label, room)
        style = "current" if summary.current else "site" if node.is_site else "group"
        yield Segment(text, self._style(style))
        kind = fmt.clip(kind, max(0, room - len(text)))
        yield Segment(kind.ljust(room - len(text)), self._style("muted"))
        for name in columns:
            over = name == "times" and (summary.times or 0) > 1
            colour = self._style("alarm" if over else "muted")
            yield Segment(_cell(summary, name).rjust(TREE_COLUMNS[name]), colour)
        yield Segment(" ")

    def _label(self, node: Node) -> tuple[str, str]:
        """The name with its twisty, and the attention kind of a layer."""
        if node.is_site:
            return f"  {node.label}", ""
        twisty = "▾" if node.key in self.model.open else "▸"
        first = self.infos[self.model.sites_below[node.key][0]]
        kind = first.kind if node.depth == 0 and first.kind else ""
        return f"{twisty} {node.label:<3}", f" {kind}"

    def _style(self, name: str) -> Style:
        """The foreground of a component class: the row's background may be the cursor's."""
        style = self.get_component_rich_style(f"site-tree--{name}")
        if name == "cursor":
            return style
        return Style(color=style.color, bold=style.bold)


def _marks(summary: Summary) -> Iterable[tuple[str, str]]:
    """Three signs, each with its style: breakpoint, current, and what became of the op."""
    yield (fmt.BREAK if summary.stops else " "), "break"
    yield (fmt.CURRENT if summary.current else " "), "current"
    if summary.anomaly:
        yield fmt.ANOMALY_MARKS[summary.anomaly], "alarm"
    else:
        yield summary.mark, "done" if summary.mark == fmt.DONE else "pending"


def _cell(summary: Summary, column: str) -> str:
    if column == "seconds":
        return fmt.seconds(summary.seconds) if summary.seconds is not None else ""
    if column == "times":
        return fmt.times(summary.times)
    if column == "carried_error":
        return fmt.number(summary.carried_error) if summary.carried_error is not None else ""
    return fmt.clip(summary.route, TREE_COLUMNS["route"] - 1)
