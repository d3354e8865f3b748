"""ctrl+p: every session command, and every site to run to or to show."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content
from textual.markup import escape

from dsv4_bench.workbench.commands import SESSION_COMMANDS
from dsv4_bench.workbench.tui.keys import key_text
from dsv4_bench.workbench.tui.site_model import holds

if TYPE_CHECKING:
    from dsv4_bench.workbench.tui.screens.main import MainScreen

SITES_SHOWN = 40


class SessionProvider(Provider):
    @property
    def main(self) -> MainScreen | None:
        from dsv4_bench.workbench.tui.screens.main import MainScreen

        return self.screen if isinstance(self.screen, MainScreen) else None

    def _commands(self) -> list[tuple[str, str, Callable[[], None]]]:
        if self.main is None:
            return []
        entries: list[tuple[str, str, Callable[[], None]]] = []
        for command in SESSION_COMMANDS:
            keys = " ".join(key_text(key) for key in command.keys)
            title = f"{command.usage}  ({keys})" if keys else command.usage
            entries.append((title, command.help, partial(self.main.action_command, command.name)))
        return entries

    async def discover(self) -> Hits:
        for title, text, callback in self._commands():
            yield DiscoveryHit(Content(title), callback, text=title, help=escape(text))

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for title, text, callback in self._commands():
            score = max(matcher.match(title), matcher.match(text) * 0.8)
            if score > 0:
                yield Hit(score, matcher.highlight(title), callback, text=title, help=escape(text))
        if self.main is None:
            return
        words = [word for word in query.lower().split() if word not in ("run", "to", "show")]
        paths = [path for path in self.app_sites() if words and holds(path.lower(), words)]
        for rank, path in enumerate(paths[:SITES_SHOWN]):
            score = 0.9 - rank / 100
            run_to, show = f"run to {path}", f"show {path}"
            yield Hit(score, run_to, partial(self.main.send, f"until {path}"), help="until")
            yield Hit(score - 0.001, show, partial(self.main.show_site, path), help="op")

    def app_sites(self) -> list[str]:
        return list(self.main.store.sites) if self.main else []
