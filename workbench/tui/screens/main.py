"""The main screen: composes the widgets, turns keys into lines, shows what changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui import keys, panes
from dsv4_bench.workbench.tui.layout import RIGHT, VERY_WIDE, panes_shown, too_small
from dsv4_bench.workbench.tui.op_view import op_lines, stub_view
from dsv4_bench.workbench.tui.screens.help import contract_screen, help_screen
from dsv4_bench.workbench.tui.site_model import neighbour, search
from dsv4_bench.workbench.tui.store import Change, Store
from dsv4_bench.workbench.tui.widgets.break_list import BreakList
from dsv4_bench.workbench.tui.widgets.command_line import CommandLine
from dsv4_bench.workbench.tui.widgets.death_banner import DeathBanner
from dsv4_bench.workbench.tui.widgets.lines_pane import Draw, LinesPane
from dsv4_bench.workbench.tui.widgets.log_pane import LogPane
from dsv4_bench.workbench.tui.widgets.site_tree import SiteTree
from dsv4_bench.workbench.tui.widgets.status_bar import StatusBar
from dsv4_bench.workbench.tui.widgets.tab_strip import TabStrip

GREY_AFTER = 0.2  # seconds of running before the footer shows it; short steps do not flicker


class MainScreen(Screen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [*keys.session_bindings(), *keys.ui_bindings()]
    AUTO_FOCUS = "#tree"
    HORIZONTAL_BREAKPOINTS: ClassVar = [(0, "-narrow"), (100, "-wide"), (160, "-very-wide")]
    VERTICAL_BREAKPOINTS: ClassVar = [(0, "-short"), (30, "-tall")]

    class Rearranged(Message):
        """Other panes are shown than before."""

    def __init__(self, store: Store, send: Callable[[str], None], checkpoint: str = "") -> None:
        super().__init__()
        self.store = store
        self.send = send
        self.chosen = "op"
        self.browsed = False
        self._checkpoint = checkpoint
        self._progress = ""
        self._values_asked = False
        self._before_search: str | None = None
        self._grey: Timer | None = None

    def compose(self) -> ComposeResult:
        yield StatusBar(self.store, id="status")
        yield DeathBanner(id="death")
        with Horizontal(id="body"):
            yield SiteTree(id="tree")
            with Vertical(id="panes"):
                yield TabStrip(id="tabs")
                with Horizontal(id="columns"):
                    with Vertical(id="centre"):
                        yield LinesPane("1 op", id="op")
                        yield LinesPane("2 values", id="values")
                    with Vertical(id="right"):
                        yield LinesPane("3 readings", id="readings")
                        yield BreakList(id="breaks")
                        yield LinesPane("5 watches", id="watches")
        yield LogPane(id="log")
        yield Static(id="message", markup=False)
        yield CommandLine(id="command")
        yield Footer(show_command_palette=False)
        yield Static("the terminal is too small: 60×16 is the least", classes="too-small")

    def on_mount(self) -> None:
        for change in (Change.STATE, Change.VALUES, Change.BREAKS, Change.WATCHES):
            self.show(change)

    # -- what the app reads

    @property
    def tree(self) -> SiteTree:
        return self.query_one("#tree", SiteTree)

    @property
    def cursor(self) -> str | None:
        """The site that the op pane shows and that b, t and k act on."""
        return self.tree.site or self.store.current

    @property
    def shown(self) -> tuple[str, ...]:
        return panes_shown(self.size.width, self.chosen)

    # -- showing

    def show(self, change: Change, elapsed: float | None = None) -> None:
        """Bring every widget that `change` touches up to date."""
        store = self.store
        if Change.HELLO in change:
            self.tree.load(store.sites)
            self.query_one(CommandLine).sites = list(store.sites)
        if Change.STOPPED in change:
            self._stopped()
        if Change.SITES in change:
            self.tree.show(store.sites, store.current)
        if Change.LOG in change:
            self._show_log()
        if Change.ERROR in change:
            self.message(store.error.get("message", ""), store.error.get("hint", ""))
        if Change.DEATH in change:
            self.query_one(DeathBanner).show(store.death)
        if Change.VALUES in change:
            self._show_values()
        if Change.BREAKS in change:
            self.query_one(BreakList).show(store.breaks)
        if Change.STATE in change:
            self._show_state()
        if change & (Change.STATE | Change.SITES | Change.BREAKS | Change.VALUES):
            self._show_counts()
        if change & (Change.OP | Change.STATE | Change.LOG):
            self.show_op()
        if change & (Change.READINGS | Change.STOPPED | Change.HELLO):
            self._lines("#readings", lambda w, h: panes.readings_lines(store, w, h))
        if Change.WATCHES in change:
            self._lines("#watches", lambda w, h: panes.watches_lines(store.watches, w))
        self.query_one(StatusBar).show(elapsed)

    def _lines(self, selector: str, draw: Draw, topic: object = None) -> None:
        self.query_one(selector, LinesPane).show(draw, topic)

    def _stopped(self) -> None:
        site = self.store.state.get("site")
        if site and site != self.tree.current:
            self.tree.follow(site)
            if self.chosen == "values" and self._values_asked:
                self.action_pane("op", focus=False)
        self._values_asked = False

    def _show_log(self) -> None:
        lines = self.store.take_log()
        worker = [line.text for line in lines if line.stream == "worker"]
        self._progress = worker[-1] if worker else self._progress
        self.query_one(LogPane).add(lines)

    def _show_values(self) -> None:
        values = self.store.values
        self._lines("#values", lambda w, h: panes.values_lines(values), topic=len(values))
        if values and "values" not in self.shown:
            self._values_asked = True
            self.action_pane("values", focus=False)

    def _show_state(self) -> None:
        if self.store.running:
            self._grey = self._grey or self.set_timer(GREY_AFTER, self.refresh_bindings)
            return
        if self._grey is not None:
            self._grey.stop()
        self._grey = None
        self.refresh_bindings()

    def _show_counts(self) -> None:
        counts = {fmt.ALARM: len(self.store.anomalies()), fmt.BREAK: len(self.store.breaks)}
        texts = [f" {sign}{count}" if count else "" for sign, count in counts.items()]
        strip = self.query_one(TabStrip)
        strip.counts = dict(zip(("readings", "breaks"), texts, strict=True))

    def show_op(self) -> None:
        store, site = self.store, self.cursor
        if store.name == "opening" or (store.name == "dead" and not store.hello):
            progress = self._progress
            opening = panes.opening_lines(self._checkpoint, progress)
            self._lines("#op", lambda w, h: opening)
        elif store.state.get("site") is None and not self.browsed:
            self._lines("#op", lambda w, h: panes.ready_lines(store))
        elif site is not None:
            view = store.op if store.op.get("site") == site else stub_view(store.sites[site])
            self._lines("#op", lambda w, h: op_lines(view, w), topic=site)

    def message(self, text: str, hint: str = "") -> None:
        """One line above the footer, until the next command; nothing clears it."""
        line = self.query_one("#message", Static)
        line.update(f"error: {text}" + (f"   hint: {hint}" if hint else ""))
        line.display = bool(text)

    def show_site(self, path: str) -> None:
        self.browsed = True
        self.tree.select(path)
        self.action_pane("op", focus=False)

    # -- layout

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(too_small(event.size.width, event.size.height), "-too-small")
        self._arrange()

    def _arrange(self) -> None:
        shown = self.shown
        for pane in keys.PANES:
            self.query_one(f"#{pane}").display = pane in shown
        self.query_one("#right").display = any(pane in shown for pane in RIGHT)
        self.query_one("#centre").display = any(pane not in RIGHT for pane in shown)
        self.query_one(TabStrip).chosen = self.chosen
        both = self.size.width >= VERY_WIDE
        self.query_one("#op").border_title = "1 op" if both else "[b]1 op[/b]  2 values"
        self.query_one("#values").border_title = "2 values" if both else "1 op  [b]2 values[/b]"
        self.post_message(self.Rearranged())

    # -- messages from widgets

    @on(SiteTree.Moved)
    def _moved(self) -> None:
        self.browsed = self.browsed or self.tree.cursor > 0
        self.show_op()

    @on(BreakList.Removed)
    def _remove_break(self, event: BreakList.Removed) -> None:
        self.send(f"delete {event.number}")

    @on(CommandLine.Entered)
    def _entered(self, event: CommandLine.Entered) -> None:
        self.send(event.line)

    @on(CommandLine.Searched)
    def _searched(self, event: CommandLine.Searched) -> None:
        paths = list(self.store.sites)
        start = neighbour(paths, self.store.order, self.tree.site, event.step or 1)
        start = start if event.step else self._before_search
        path = search(paths, event.text, start, event.step or 1)
        if path:
            self.browsed = True
            self.tree.select(path)
        self.query_one(CommandLine).found(path)

    @on(CommandLine.Closed)
    def _closed(self, event: CommandLine.Closed) -> None:
        if not event.kept and self._before_search:
            self.tree.select(self._before_search)
        self._before_search = None
        self.tree.focus()

    # -- actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action != "command":
            return True
        name, state = str(parameters[0]), self.store.name
        if name == "pause":
            return self.store.running
        if keys.allowed(name, state) or name not in keys.FOOTER:
            return True  # what is not in the footer answers with a message instead
        return None

    def action_command(self, name: str) -> None:
        if not keys.allowed(name, self.store.name):
            self.message(*keys.refusal(name, self.store.name))
            return
        action = keys.action_for(name, self.store, self.cursor)
        if isinstance(action, keys.Send):
            self.send(action.line)
        else:
            self.query_one(CommandLine).open(action.text)
        if name == "breaks":
            self.action_pane("breaks")

    def action_command_line(self) -> None:
        self.query_one(CommandLine).open()

    def action_search(self) -> None:
        self._before_search = self.tree.node.key if self.tree.node else None
        self.query_one(CommandLine).open(search=True)

    def action_anomaly(self, step: int) -> None:
        path = neighbour(self.store.anomalies(), self.store.order, self.tree.site, step)
        if path is None:
            self.message("no anomaly so far", "c runs on; :break nan > 0 stops at the first NaN")
        else:
            self.show_site(path)

    def action_follow(self) -> None:
        if self.store.current:
            self.show_site(self.store.current)

    def action_tree_level(self, step: int) -> None:
        self.tree.level(step)

    def action_contract(self) -> None:
        if self.store.op:
            self.app.push_screen(contract_screen(self.store.op["site"], self.store.op["doc"]))

    def action_log(self) -> None:
        log = self.query_one(LogPane)
        log.display = not log.display

    def action_pane(self, name: str, focus: bool = True) -> None:
        self.chosen = name
        self._arrange()
        if focus:
            self.query_one(f"#{name}").focus()

    def action_help(self) -> None:
        self.app.push_screen(help_screen())
