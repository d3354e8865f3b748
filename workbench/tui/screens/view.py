"""What the main screen looks like: its widgets, and how they show what changed in the store."""

from __future__ import annotations

from collections.abc import Callable

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Static

from dsv4_bench.workbench.commands import BY_NAME
from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui import keys, panes
from dsv4_bench.workbench.tui.layout import (
    MIN_HEIGHT,
    MIN_WIDTH,
    RIGHT,
    VERY_WIDE,
    panes_shown,
    too_small,
)
from dsv4_bench.workbench.tui.op_view import op_lines
from dsv4_bench.workbench.tui.results import error_text
from dsv4_bench.workbench.tui.screens.compare import CompareScreen
from dsv4_bench.workbench.tui.screens.heat import HeatScreen
from dsv4_bench.workbench.tui.screens.help import counters_screen
from dsv4_bench.workbench.tui.screens.history import HistoryScreen
from dsv4_bench.workbench.tui.screens.timing import TimingScreen
from dsv4_bench.workbench.tui.screens.watching import WatchScreen
from dsv4_bench.workbench.tui.store import Change, Store
from dsv4_bench.workbench.tui.widgets.break_list import BreakList
from dsv4_bench.workbench.tui.widgets.command_line import CommandLine
from dsv4_bench.workbench.tui.widgets.death_banner import DeathBanner
from dsv4_bench.workbench.tui.widgets.key_bar import KeyBar
from dsv4_bench.workbench.tui.widgets.lines_pane import LinesPane
from dsv4_bench.workbench.tui.widgets.log_pane import LogPane
from dsv4_bench.workbench.tui.widgets.site_tree import SiteTree
from dsv4_bench.workbench.tui.widgets.status_bar import StatusBar
from dsv4_bench.workbench.tui.widgets.tab_strip import TabStrip
from dsv4_bench.workbench.tui.widgets.tree_head import TreeHead

TOO_SMALL = f"the terminal is too small: {MIN_WIDTH}×{MIN_HEIGHT} is the least"
GREY_AFTER = 0.2  # seconds of running before the key bar shows it; short steps do not flicker


class MainView(Screen[None]):
    AUTO_FOCUS = "#tree"

    class LooksElsewhere(Message):
        """Another site, or other panes, are shown than before."""

    def __init__(
        self,
        store: Store,
        send: Callable[[str], None],
        ask: Callable[[str], None],
        checkpoint: str = "",
    ) -> None:
        super().__init__()
        self.store = store
        self.send = send
        self.ask = ask
        self.chosen = "op"
        self.browsed = False
        self._checkpoint = checkpoint
        self._progress = ""
        self._values_asked = False
        self._grey: Timer | None = None
        self.status = StatusBar(store, id="status")
        self.death = DeathBanner(id="death")
        self.site_tree = SiteTree(id="tree")
        self.tree_head = TreeHead(self.site_tree, id="tree-head")
        self.tabs = TabStrip(id="tabs")
        self.op = LinesPane("1 op", id="op")
        self.values = LinesPane("2 values", id="values")
        self.readings = LinesPane("3 readings", id="readings")
        self.breaks = BreakList(id="breaks")
        self.watches = LinesPane("5 watches", id="watches")
        self.log_pane = LogPane(id="log")
        self.message_line = Static(id="message", markup=False)
        self.command_line = CommandLine(id="command")
        self.key_bar = KeyBar(self.usable, id="keys")
        self.panes = {name: getattr(self, name) for name in keys.PANES}

    def compose(self) -> ComposeResult:
        with Vertical(id="all"):
            yield self.status
            yield self.death
            with Horizontal(id="body"):
                with Vertical(id="left"):
                    yield self.tree_head
                    yield self.site_tree
                with Vertical(id="panes"):
                    yield self.tabs
                    with Horizontal():
                        with Vertical(id="centre"):
                            yield from (self.op, self.values)
                        with Vertical(id="right"):
                            yield from (self.readings, self.breaks, self.watches)
            yield self.log_pane
            yield self.message_line
            yield self.command_line
            yield self.key_bar
        yield Static(TOO_SMALL, classes="too-small")

    def on_mount(self) -> None:
        for change in (Change.STATE, Change.VALUES, Change.BREAKS, Change.WATCHES):
            self.show(change)

    # -- what the app reads

    @property
    def cursor(self) -> str | None:
        """The site that the op pane shows and that b, t and k act on."""
        return self.site_tree.site or self.store.current

    @property
    def shown(self) -> tuple[str, ...]:
        return panes_shown(self.size.width, self.chosen)

    # -- showing

    def show(self, change: Change, elapsed: float | None = None) -> None:
        """Bring every widget that `change` touches up to date."""
        store = self.store
        if Change.HELLO in change:
            self.site_tree.load(store.sites)
            self.command_line.names.sites = {path: site.op for path, site in store.sites.items()}
            self.command_line.names.implementations = store.implementations
        if Change.STOPPED in change:
            self._stopped()
        if Change.SITES in change:
            self.site_tree.show(store.sites, store.current)
        if Change.LOG in change:
            self._show_log()
        if Change.ERROR in change:
            self.message(error_text(store.error.get("message", ""), store.error.get("hint", "")))
        if Change.DEATH in change:
            self.death.show(store.death)
        if change & (Change.WATCHED | Change.DEATH) and isinstance(self.app.screen, WatchScreen):
            self._show_watched(self.app.screen, change)
        if Change.VALUES in change:
            self._show_values()
        if Change.HEAT in change:
            self._show_heat()
        if Change.TIMING in change:
            self.app.push_screen(TimingScreen(self.store.timing, self.show_site, self.send))
        if Change.HISTORY in change:
            self.app.push_screen(HistoryScreen(store.history))
        if Change.COUNTERS in change:
            self.app.push_screen(counters_screen(store.counters))
        if Change.COMPARISON in change:
            self.app.push_screen(CompareScreen(self.store.comparison, self.ask))
        if Change.BREAKS in change:
            self.breaks.show(store.breaks)
        if Change.STATE in change:
            self._show_state()
        if change & (Change.STATE | Change.SITES | Change.BREAKS | Change.VALUES):
            self._show_counts()
        if Change.OP in change:
            self.command_line.names.expressions = store.tensor_names()
        if change & (Change.OP | Change.STATE | Change.LOG):
            self.show_op()
        if change & (Change.READINGS | Change.STOPPED | Change.HELLO | Change.SITES):
            self.readings.show(lambda w, h: panes.readings_lines(store, w, h))
        if Change.WATCHES in change:
            self.watches.show(lambda w, h: panes.watches_lines(store.watches, w))
        self.status.show(elapsed)

    def _stopped(self) -> None:
        site = self.store.state.get("site")
        if site:
            self.site_tree.follow(site)
            if self.chosen == "values" and self._values_asked:
                self.choose("op")
        self._values_asked = False

    def _show_log(self) -> None:
        lines = self.store.take_log()
        worker = [line.text for line in lines if line.stream == "worker"]
        self._progress = worker[-1] if worker else self._progress
        self.log_pane.add(lines)

    def _show_values(self) -> None:
        values = self.store.values
        self.values.show(lambda w, h: panes.values_lines(values), topic=len(values))
        if values and "values" not in self.shown:
            self._values_asked = True
            self.choose("values")

    def _show_watched(self, screen: WatchScreen, change: Change) -> None:
        if Change.WATCHED in change:
            screen.replied(self.store.watched)
        if Change.DEATH in change and self.store.death:
            screen.died(str(self.store.death.get("message", "the worker died")))

    def _show_heat(self) -> None:
        if isinstance(self.app.screen, HeatScreen):
            self.app.screen.show(self.store.heat)
        elif isinstance(self.app.screen, CompareScreen):
            self.app.screen.show_map(self.store.heat)
        elif self.app.screen is self:
            self.app.push_screen(HeatScreen(self.store.heat, self.ask))

    def _show_state(self) -> None:
        if self.store.running:
            self._grey = self._grey or self.set_timer(GREY_AFTER, self.key_bar.refresh)
            return
        if self._grey is not None:
            self._grey.stop()
        self._grey = None
        self.key_bar.refresh()

    def usable(self, name: str) -> bool | None:
        """Whether a command can be sent now: None greys it out, False hides it."""
        if name == "pause":
            return self.store.running
        if name not in BY_NAME or keys.allowed(name, self.store.name):
            return True
        return None

    def _show_counts(self) -> None:
        counts = {fmt.ALARM: len(self.store.anomalies()), fmt.BREAK: len(self.store.breaks)}
        texts = [f" {sign}{count}" if count else "" for sign, count in counts.items()]
        self.tabs.counts = dict(zip(("readings", "breaks"), texts, strict=True))

    def show_op(self) -> None:
        store, site = self.store, self.cursor
        if store.name == "opening" or (store.name == "dead" and not store.hello):
            progress = self._progress
            opening = panes.opening_lines(self._checkpoint, progress)
            self.op.show(lambda w, h: opening)
        elif store.state.get("site") is None and not self.browsed:
            self.op.show(lambda w, h: panes.ready_lines(store))
        elif site is not None:
            view = store.view_of(site)
            self.op.show(lambda w, h: op_lines(view, w), topic=site)

    def message(self, text: str) -> None:
        """A line above the footer, until the next command; an empty text clears it."""
        if isinstance(self.app.screen, TimingScreen):
            self.app.screen.message(text)
        if text or self.message_line.display:
            self.message_line.update(text)
            self.message_line.display = bool(text)

    def _refusal(self, name: str) -> str:
        return error_text(*keys.refusal(name, self.store.name))

    def show_site(self, path: str) -> None:
        self.select(path)
        self.choose("op")

    def select(self, path: str) -> None:
        """Put the tree's cursor on a site or group."""
        self.site_tree.select(path)
        self.cursor_moved()

    def cursor_moved(self) -> None:
        self.browsed = self.browsed or self.site_tree.cursor > 0
        self.show_op()
        self.post_message(self.LooksElsewhere())

    # -- layout

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(too_small(event.size.width, event.size.height), "-too-small")
        self._arrange()

    def choose(self, pane: str) -> None:
        """Bring a pane to the front, where not all of them have room."""
        self.chosen = pane
        self._arrange()

    def _arrange(self) -> None:
        shown = self.shown
        for name, pane in self.panes.items():
            pane.display = name in shown
        self.query_one("#right").display = any(pane in shown for pane in RIGHT)
        self.query_one("#centre").display = any(pane not in RIGHT for pane in shown)
        if self.focused is not None and not self.focused.display:
            self.set_focus(self.site_tree)
        self.tabs.chosen = self.chosen
        both = self.size.width >= VERY_WIDE
        self.op.border_title = "1 op" if both else "[b]1 op[/b]  2 values"
        self.values.border_title = "2 values" if both else "1 op  [b]2 values[/b]"
        self.post_message(self.LooksElsewhere())
