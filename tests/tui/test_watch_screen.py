"""Watch mode: what it sends when, how attempts look, and a worker that dies of an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Driver, drive

from dsv4_bench.workbench.tui.screens.watching import WatchScreen
from dsv4_bench.workbench.tui.spans import plain
from dsv4_bench.workbench.tui.watching import Watching
from dsv4_bench.workbench.tui.watching_view import attempt_lines, head_lines

SITE = "L2/attn/core"
RIGHT = {"hash": "a1b2c3", "own_error": 1e-8, "limit": 1e-7, "verdict": "ok", "seconds": 1e-5,
         "error": "", "took": 1.4}  # fmt: skip
WRONG = {**RIGHT, "hash": "d4e5f6", "own_error": 5e-7, "verdict": "over", "seconds": 5e-6}
BROKEN = {"error": "core.cpp failed to build:\ncore.cpp:7: error: expected ';'", "took": 0.3}


def watching(contents: list[str], files: bool = True) -> Watching:
    """A watch whose files have the last of `contents`, and that knows them already."""
    found = Watching(SITE, of=lambda files: contents[-1])
    assert found.tick("stopped", SITE) == [f"sources {SITE}"]
    assert found.tick("stopped", SITE) == []  # not answered yet
    found.replied({"implementation": "cpu", "files": ["/core.cpp"] if files else []})
    return found


def test_it_asks_again_and_again_while_the_session_rests_at_the_op():
    found = watching(["a"])
    assert found.tick("running", SITE) == []
    assert found.tick("stopped", SITE) == ["reload"] and found.tick("stopped", SITE) == []
    found.replied({"reloaded": False, "history": []})
    assert found.tick("stopped", SITE) == ["reload"]
    found.replied({"reloaded": True, "history": [RIGHT, WRONG]})
    assert found.attempts == [WRONG] and found.files == [Path("/core.cpp")]


def test_it_ends_where_there_is_nothing_to_watch():
    assert "no file" in watching(["a"], files=False).problem
    moved = watching(["a"])
    assert moved.tick("stopped", "L3/attn/core") == [] and moved.phase == "stopped"
    refused = watching(["a"])
    refused.replied({"error": "the session stands at no op"})
    assert refused.problem == "the session stands at no op"
    assert refused.tick("stopped", SITE) == []


def test_a_dead_worker_is_started_again_after_the_next_save_and_led_back():
    contents = ["fatal"]
    found = watching(contents)
    assert found.tick("stopped", SITE) == ["reload"]
    found.died("SIGABRT in L2/attn/core")
    assert found.attempts[-1]["error"] == "SIGABRT in L2/attn/core"
    assert found.tick("dead", SITE) == []
    contents.append("repaired")
    assert found.tick("dead", SITE) == ["restart"]
    assert found.tick("opening", None) == []
    assert found.tick("stopped", "L1/ffn/hc_post") == [f"route {SITE}=cpu", f"until {SITE}"]
    assert found.tick("running", None) == []
    assert found.tick("stopped", SITE) == ["reload"]


def test_it_dies_again_on_the_way_back():
    contents = ["fatal"]
    found = watching(contents)
    found.tick("stopped", SITE)
    found.died("SIGABRT")
    contents.append("as bad")
    found.tick("dead", SITE)
    found.tick("stopped", None)
    found.died("SIGSEGV")
    assert found.tick("dead", SITE) == []
    contents.append("repaired")
    assert found.tick("dead", SITE) == ["restart"]


@pytest.mark.parametrize("width", [76, 130])
def test_attempts_as_rows(width: int):
    text = plain(attempt_lines([RIGHT, WRONG, BROKEN], width))
    header, newest, wrong, right, *problem = text.splitlines()
    assert "verdict" in header and ("own error" in header) == (width >= 100)
    assert newest.split()[:2] == ["3", "failed"] and "300 ms" in newest
    assert "over" in wrong and "5.0×" in wrong and "0.50×" in wrong and "5 µs" in wrong
    assert right.split()[:3] == ["1", "a1b2c3", "ok"] and "1.00×" in right
    assert problem[1:] == BROKEN["error"].splitlines()
    assert all(len(line) <= width for line in text.splitlines())


def test_the_head_says_what_is_done():
    found = watching(["a"])
    assert "waiting for a save" in plain(head_lines(found, False, 80))
    assert "building and running" in plain(head_lines(found, True, 80))
    assert "1 file: core.cpp" in plain(head_lines(found, False, 80))
    found.died("SIGABRT")
    assert "the next save starts another" in plain(head_lines(found, True, 80))


def test_saves_show_up_on_the_screen(tmp_path: Path):
    source = tmp_path / "core.cpp"

    async def script(ui: Driver) -> None:
        source.write_text("first")
        ui.session.sources, ui.session.edits = [source], [RIGHT]
        await ui.do(f"until {SITE}")
        await ui.pilot.press("S")
        await ui.shows("watch mode", "1 file: core.cpp", "a1b2c3", "waiting for a save")
        ui.session.edits = [WRONG, BROKEN]
        await ui.shows("d4e5f6", "5.0×", "expected ';'")
        ui.session.die(SITE, "SIGABRT")
        await ui.shows("the next save starts another", "crashed inside a kernel")
        ui.session.edits = [RIGHT]
        source.write_text("repaired")
        await ui.until(lambda: f"until {SITE}" in ui.session.lines[-6:], "not led back")
        await ui.until(lambda: len(screen(ui).watching.attempts) == 5)
        sent = [line for line in ui.session.lines if line.split()[0] in ("restart", "route")]
        assert sent == ["restart", f"route {SITE}=cpu"]
        await ui.pilot.press("escape")
        assert ui.app.screen is ui.main

    drive(script, size=(80, 24))


def screen(ui: Driver) -> WatchScreen:
    assert isinstance(ui.app.screen, WatchScreen)
    return ui.app.screen


def test_it_needs_an_op_to_stand_at():
    async def script(ui: Driver) -> None:
        await ui.press("S")
        await ui.shows("watch mode needs a session that stands at an op")
        assert ui.app.screen is ui.main

    drive(script)


def test_the_reference_has_no_source_to_watch():
    async def script(ui: Driver) -> None:
        await ui.do(f"until {SITE}")
        await ui.press("k")
        await ui.pilot.press("S")
        await ui.shows("the route is reference", "not watching")

    drive(script)


def test_reload_by_hand_says_what_it_did(tmp_path: Path):
    async def script(ui: Driver) -> None:
        await ui.do(f"until {SITE}", "reload")
        await ui.shows("no source has changed")
        ui.session.edits = [RIGHT]
        asked: list[Any] = list(ui.session.lines)
        await ui.do("reload")
        await ui.shows(f"{SITE}: taken up")
        assert f"op {SITE}" in ui.session.lines[len(asked) :]  # its outputs are other ones now
        await ui.do(f"sources {SITE}")
        await ui.shows("/kernels/core.cpp")

    drive(script)
