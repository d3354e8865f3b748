"""Drives the app with a FakeSession: waits for conditions, never for a length of time."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fake_session import FakeSession
from textual.pilot import Pilot
from textual.widgets import Input, Static

from dsv4_bench.workbench.tui.app import WorkbenchApp
from dsv4_bench.workbench.tui.screens.main import MainScreen

PATIENCE = 10.0  # seconds until a condition that does not come true fails the test


class Driver:
    """The app, its pilot and its session, with the questions tests ask."""

    def __init__(self, app: WorkbenchApp, pilot: Pilot[None], session: FakeSession) -> None:
        self.app = app
        self.pilot = pilot
        self.session = session

    @property
    def main(self) -> MainScreen:
        return self.app._main

    async def until(self, condition: Callable[[], Any], what: str = "") -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what or "the condition did not come true"
            await asyncio.sleep(0.01)

    async def settle(self) -> None:
        """Until no event is under way and nothing more is to be asked."""

        def still() -> bool:
            app, shown = self.app, self.main
            wanted = app.queries.next(app.store, shown.cursor, shown.shown)
            inbox = app.inbox
            return not wanted and not app.queries.waiting and (inbox is None or not inbox.busy)

        await self.until(still, "the screen does not settle")
        await self.pilot.pause()

    async def still(self) -> None:
        """Until the picture no longer changes."""
        before = ""
        while before != (now := self.screen_text()):
            before = now
            await self.pilot.pause(0.2)

    async def shows(self, *texts: str) -> None:
        """Until all of `texts` are on the screen."""
        for text in texts:
            await self.until(lambda text=text: text in self.screen_text(), f"not shown: {text}")

    async def press(self, *keys: str) -> None:
        """One key after the other, each having had its effect."""
        for key in keys:
            await self.pilot.press(key)
            await self.settle()

    async def type(self, text: str) -> None:
        """Text for the focused input, at once."""
        focused = self.app.focused
        assert isinstance(focused, Input)
        focused.insert_text_at_cursor(text)
        await self.settle()

    async def line(self, text: str) -> None:
        """A line typed at the `:` prompt."""
        await self.pilot.press("colon")
        await self.type(text)
        await self.press("enter")

    async def do(self, *lines: str) -> None:
        """Lines as if typed, without the typing."""
        for line in lines:
            self.main.send(line)
            await self.settle()

    def sent(self) -> list[str]:
        """The lines that the user's keys sent: those the UI asks by itself left out."""
        own = re.compile(r"(op L|op embed|op head|sites$|readings L\d+/\*$|readings \*/hc_post)")
        return [line for line in self.session.lines if not own.match(line)]

    def text(self, selector: str) -> str:
        """What a pane of lines shows."""
        return str(self.main.query_one(f"{selector} Static", Static).content)

    def screen_text(self) -> str:
        """Everything on the screen, as a person would read it."""
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip) for strip in lines)


def drive(
    script: Callable[[Driver], Awaitable[None]],
    size: tuple[int, int] = (120, 40),
    prepare: Callable[[FakeSession], None] | None = None,
    lines: Sequence[str] = (),
    **session: Any,
) -> FakeSession:
    """Run the app at `size` with a new FakeSession, and `script` on it; the session afterwards."""
    made: list[FakeSession] = []

    def factory(on_event: Callable[[dict[str, Any]], None]) -> FakeSession:
        made.append(FakeSession(on_event, **session))
        if prepare:
            prepare(made[0])
        return made[0]

    async def run() -> None:
        app = WorkbenchApp(factory, clock=lambda: 0.0, lines=lines)
        async with app.run_test(size=size) as pilot:
            driver = Driver(app, pilot, None)  # type: ignore[arg-type]
            await driver.until(lambda: bool(made), "no session was started")
            driver.session = made[0]
            await driver.settle()
            await script(driver)
        app.close_session()

    asyncio.run(run())
    return made[0]
