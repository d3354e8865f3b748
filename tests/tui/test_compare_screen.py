"""The compare screen: what it lists, where it starts, and the maps it asks for."""

from __future__ import annotations

import pytest
from fake_session import FakeSession
from harness import Driver, drive

from dsv4_bench.workbench.tui import compare_view as view
from dsv4_bench.workbench.tui.screens.compare import CompareScreen
from dsv4_bench.workbench.tui.screens.heat import HeatScreen
from dsv4_bench.workbench.tui.spans import plain, width_of


def op(site: str, blame: str, **more: object) -> view.Report:
    base = {
        "site": site, "forward": 0, "a": "reference", "b": "cpu", "blame": blame, "limit": 1e-6,
        "input_error": 0.0, "output_error": "inf", "output": "y", "sentence": f"{site} differs",
    }  # fmt: skip
    return {**base, **more}


def report(*ops: view.Report, **more: object) -> view.Report:
    base = {"status": "different", "sentence": "L1 differs", "around": [], "ops": list(ops)}
    return {**base, "a": "a.zip", "b": "b.zip", **more}


def test_what_is_listed_and_where_it_starts():
    found = report(op("e", "equal"), op("f", "within"), op("g", "carried"), op("h", "here"))
    assert view.shown(found, everything=False) == [1, 2, 3]
    assert view.shown(found, everything=True) == [0, 1, 2, 3]
    assert view.first_shown(found, [1, 2, 3]) == 1  # the first beyond its limit
    assert view.first_shown(found, [1]) == 0


@pytest.mark.parametrize(("width", "columns"), [(70, 6), (130, 9)])
def test_rows_fit_and_show_signs(width: int, columns: int):
    found = report(op("L12/attn/index/compressor/write", "here"), op("embed", "equal"))
    header, rows = view.table(found, [0, 1], width)
    assert len(header.split("  ")) >= columns - 2
    assert rows[0][0].startswith("!  L12/attn/index/compressor/write") and "inf" in rows[0][0]
    assert rows[1][0].startswith("=  embed")
    assert all(len(text) <= width for text, _ in rows)
    assert ("cpu" in rows[0][0]) == (width >= 100)


def test_the_head_counts_and_says_what_else_differs():
    found = report(op("a", "here"), op("b", "equal"), op("c", "equal"), around=["torch: 1 / 2"])
    lines = view.head_lines(found, 60)
    text = plain(lines)
    for part in ("! L1 differs", "torch: 1 / 2", "! 1 here", "= 2 equal"):
        assert part in text
    assert "carried" not in text and all(width_of(line) <= 60 for line in lines)
    assert plain(view.head_lines(report(status="equal", sentence="all equal"), 60)).startswith("✓")


def maps(session: FakeSession) -> list[str]:
    return [line for line in session.lines if line.startswith("difference")]


def test_the_screen_starts_at_the_first_difference_and_follows_the_selection():
    async def script(ui: Driver) -> None:
        await ui.line("compare a.zip b.zip")
        await ui.until(lambda: isinstance(ui.app.screen, CompareScreen) and maps(ui.session))
        screen = ui.app.screen
        assert isinstance(screen, CompareScreen)
        first = ui.session.paths.index("L2/attn/core")
        assert screen.number == first and maps(ui.session) == [f"difference {first} cells=11x107"]
        await ui.shows("A a.zip   B b.zip", "! L2/attn/core #0", "L2/attn/core  o", "B cpu 1.25")
        await ui.press("down")
        await ui.until(lambda: len(maps(ui.session)) == 2)
        await ui.shows("L2/attn/wo_a  o")
        await ui.press("e")
        assert len(screen.numbers) == 200 and screen.report["ops"][screen.number]["site"] == (
            "L2/attn/wo_a"
        )
        await ui.press("enter")
        await ui.until(lambda: isinstance(ui.app.screen, HeatScreen))
        await ui.until(lambda: "rows=" in maps(ui.session)[-1])
        assert maps(ui.session)[-1].startswith(f"difference {screen.number} o rows=0:128 ")
        await ui.press("escape", "escape")
        assert ui.app.screen is ui.main

    drive(script)


def test_it_opens_at_once_when_the_command_line_asks_for_it():
    async def script(ui: Driver) -> None:
        await ui.until(lambda: isinstance(ui.app.screen, CompareScreen))
        assert ui.session.lines.count("compare 'a b.zip' c.zip") == 1

    drive(script, lines=["compare 'a b.zip' c.zip"])


def test_two_equal_bundles():
    def same(session: FakeSession) -> None:
        session._do_compare = lambda a, b: report(  # type: ignore[method-assign]
            op("embed", "equal"), status="equal", sentence="1 ops are bitwise equal"
        )

    async def script(ui: Driver) -> None:
        await ui.do("compare a b")
        await ui.shows("✓ 1 ops are bitwise equal", "every op has the same bits in both")
        await ui.press("enter", "escape")
        assert ui.app.screen is ui.main

    drive(script, prepare=same, size=(80, 24))


def test_a_long_command_can_be_paused():
    async def script(ui: Driver) -> None:
        ui.session.slow_reply = True
        await ui.pilot.press("colon")
        await ui.type("bundle bug.zip")
        await ui.pilot.press("enter")
        await ui.until(lambda: ui.app.store.running)
        await ui.press("space")
        assert ui.sent()[-2:] == ["bundle bug.zip", "pause"]
        ui.session.finish_reply()
        await ui.until(lambda: not ui.app.store.running)
        await ui.shows("wrote bug.zip: 41 ops, 1.3 MB", "dsv4-bench replay bug.zip")

    drive(script)
