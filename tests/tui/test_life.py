"""Death, restart, quitting, floods: the UI outlives its worker."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from fake_session import FakeSession
from harness import Driver, drive

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.tui.app import run_tui


def test_death_shows_a_banner_and_restart_clears_it():
    async def script(ui: Driver) -> None:
        await ui.do("until L4/attn/core")
        ui.session.die()
        await ui.until(lambda: ui.main.death.display)
        await ui.still()
        text = ui.screen_text()
        assert "the worker died at L4/attn/core: SIGSEGV" in text
        assert "Segmentation fault" in text and "R restarts at layer 4" in text
        await ui.press("s", "up", "3", "o", "o")
        assert ui.sent() == ["until L4/attn/core"]
        await ui.press("R")
        assert ui.sent()[-1] == "restart" and not ui.main.death.display
        await ui.press("s")
        assert ui.app.store.state["site"] == "embed"

    drive(script)


def test_death_while_running():
    async def script(ui: Driver) -> None:
        ui.session.slow = True
        await ui.press("c")
        assert ui.app.store.running
        ui.session.die("L3/ffn/experts", signal=None)
        await ui.shows("return code -11")
        assert not ui.app.store.running

    drive(script)


def test_a_checkpoint_that_cannot_be_opened():
    async def script(ui: Driver) -> None:
        error = {"message": "no such folder: x", "hint": "give a checkpoint", "exit_code": 4}
        ui.session.on_event({"event": "fatal", "error": error})
        await ui.shows("no such folder: x")
        await ui.shows("hint: give a checkpoint")

    drive(script, opened=False)


def test_a_session_that_cannot_start():
    def factory(on_event: Any) -> FakeSession:
        raise DSV4Error("cannot start the worker")

    async def script(pilot: Any) -> None:
        app = pilot.app
        for _ in range(200):
            if app.store.death:
                break
            await pilot.pause(0.02)
        assert app.store.death["message"] == "cannot start the worker"
        await pilot.press("q")

    assert run_tui(None, factory, headless=True, size=(80, 24), auto_pilot=script) == 0  # type: ignore[arg-type]


def quit_with(key: str, **session: Any) -> tuple[FakeSession, float]:
    """Quit with `key` while a command runs; the session, and the seconds it took."""
    made: list[FakeSession] = []
    started: list[float] = []

    def factory(on_event: Any) -> FakeSession:
        made.append(FakeSession(on_event, **session))
        made[0].slow = True
        return made[0]

    async def script(pilot: Any) -> None:
        while not made:
            await pilot.pause(0.02)
        await pilot.press("c")
        started.append(time.monotonic())
        await pilot.press(key)

    code = run_tui(None, factory, headless=True, size=(80, 24), auto_pilot=script)  # type: ignore[arg-type]
    assert code == 0
    return made[0], time.monotonic() - started[0]


def test_quit_while_running_and_while_opening():
    for session in ({}, {"opened": False}):
        for key in ("q", "ctrl+q"):
            closed, seconds = quit_with(key, **session)
            assert closed.closed and seconds < 3


def test_ctrl_c_tells_how_to_quit():
    async def script(ui: Driver) -> None:
        await ui.press("ctrl+c")
        assert ["ctrl+q" in note.message for note in ui.app._notifications] == [True]
        assert not ui.app._exit

    drive(script)


def test_a_flood_of_events_does_not_stall_keys():
    async def script(ui: Driver) -> None:
        batches: list[int] = []
        deliver = ui.app._deliver
        assert ui.app.inbox is not None
        ui.app.inbox._deliver = lambda events: (batches.append(len(events)), deliver(events))
        ui.session.slow = True
        await ui.press("c")
        for _ in range(40):
            for path in ui.session.paths:
                ui.session.on_event({"event": "enter", "site": path})
                ui.session.on_event(ui.session._site_event(0, path))
        ui.session.log("stdout", "\n".join(f"line {i}" for i in range(20000)))
        await ui.press("question_mark")
        assert ui.app.screen is not ui.main
        await ui.until(lambda: sum(batches) > 40_000)
        assert len(batches) < 40  # batches, not one by one
        await ui.press("escape")
        ui.session.release()
        await ui.settle()
        assert ui.app.store.name == "finished"

    drive(script)


def test_the_tui_imports_no_torch():
    code = (
        "import sys, dsv4_bench.workbench.tui.app as a; "
        "heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules); "
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
