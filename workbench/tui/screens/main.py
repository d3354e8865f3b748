"""The main screen: turns keys, and messages of its widgets, into lines for the session."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.binding import BindingType

from dsv4_bench.workbench.tui import keys
from dsv4_bench.workbench.tui.screens.help import contract_screen, help_screen
from dsv4_bench.workbench.tui.screens.view import MainView
from dsv4_bench.workbench.tui.screens.watching import WatchScreen
from dsv4_bench.workbench.tui.site_model import neighbour, search
from dsv4_bench.workbench.tui.store import command_name
from dsv4_bench.workbench.tui.widgets.break_list import BreakList
from dsv4_bench.workbench.tui.widgets.command_line import CommandLine
from dsv4_bench.workbench.tui.widgets.site_tree import SiteTree


class MainScreen(MainView):
    BINDINGS: ClassVar[list[BindingType]] = [*keys.session_bindings(), *keys.ui_bindings()]

    _before_search: str | None = None

    # -- messages from widgets

    @on(SiteTree.Moved)
    def _moved(self) -> None:
        self.cursor_moved()

    @on(SiteTree.ColumnsChanged)
    def _columns_changed(self) -> None:
        self.tree_head.refresh()

    @on(BreakList.Removed)
    def _remove_break(self, event: BreakList.Removed) -> None:
        self.send(f"delete {event.number}")

    @on(CommandLine.Opened)
    def _line_opened(self) -> None:
        self.key_bar.display = False

    @on(CommandLine.NamesFaults)
    def _names_faults(self) -> None:
        names = (name for table in self.store.implementations.values() for name in table)
        if self.store.idle and not any(name.startswith("fault/") for name in names):
            self.ask("faults")

    @on(CommandLine.Entered)
    def _entered(self, event: CommandLine.Entered) -> None:
        name = command_name(event.line)
        if keys.allowed(name, self.store.name):
            self.send(event.line)
        else:
            self.command_line.reopen(event.line, self._refusal(name))

    @on(CommandLine.Searched)
    def _searched(self, event: CommandLine.Searched) -> None:
        paths = list(self.store.sites)
        start = neighbour(paths, self.store.order, self.site_tree.site, event.step or 1)
        start = start if event.step else self._before_search
        path = search(paths, event.text, start, event.step or 1)
        if path:
            self.select(path)
        self.command_line.found(path)

    @on(CommandLine.Closed)
    def _line_closed(self, event: CommandLine.Closed) -> None:
        if not event.kept and self._before_search:
            self.select(self._before_search)
        self._before_search = None
        self.key_bar.display = True
        self.set_focus(self.site_tree)

    # -- actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if self.command_line.display and action in ("command", *keys.TYPING):
            return False  # letters are text
        if action != "command":
            return True
        name = str(parameters[0])
        return self.usable(name) if name in keys.BAR_LABELS else True  # the rest says why not

    def action_command(self, name: str) -> None:
        action = keys.action_for(name, self.store, self.cursor)
        refused = not keys.allowed(name, self.store.name)
        line = self.command_line
        if isinstance(action, keys.Prompt) and refused:
            line.reopen(action.text, self._refusal(name))
        elif isinstance(action, keys.Prompt):
            line.open(action.text)
        elif refused:
            self.message(self._refusal(name))
        else:
            self.send(action.line)
        if name == "breaks":
            self.action_pane("breaks")

    def action_command_line(self) -> None:
        self.command_line.open()

    def action_search(self) -> None:
        self._before_search = self.site_tree.node.key if self.site_tree.node else None
        self.command_line.open(search=True)

    def action_anomaly(self, step: int) -> None:
        found = self.store.anomalies()
        path = neighbour(found, self.store.order, self.site_tree.site, step)
        if path is None:
            self.message("no anomaly so far;  x compares every op, a runs to the next anomaly")
            return
        self.show_site(path)
        site = self.store.sites[path]
        place = f"anomaly {found.index(path) + 1} of {len(found)}"
        self.message(f"{place}  {site.mark} {path}: {site.alarm}")

    def action_follow(self) -> None:
        if self.store.current:
            self.show_site(self.store.current)

    def action_tree_level(self, step: int) -> None:
        self.site_tree.level(step)
        self.cursor_moved()

    def action_contract(self) -> None:
        if self.store.op:
            self.app.push_screen(
                contract_screen(self.store.op["site"], self.store.op.get("doc", ""))
            )

    def action_log(self) -> None:
        self.log_pane.display = not self.log_pane.display

    def action_watch_saves(self) -> None:
        site = self.store.state.get("site")
        if not self.store.idle or not site:
            self.message(
                "watch mode needs a session that stands at an op;  t goes to the selected one"
            )
            return
        self.app.push_screen(WatchScreen(site, self.store, self.ask, self.send))

    def action_pane(self, name: str) -> None:
        self.choose(name)
        self.panes[name].focus()

    def action_help(self) -> None:
        self.app.push_screen(help_screen())
