"""The heat map: shades, axes, cursor and zoom as pure functions, and the screen that shows them."""

from __future__ import annotations

import math

import pytest
from fake_session import FakeSession
from harness import Driver, drive

from dsv4_bench.workbench.tui import heat_view as view
from dsv4_bench.workbench.tui.screens.heat import HeatScreen
from dsv4_bench.workbench.tui.spans import plain, width_of


def heat(error: list[list[object]], block: tuple[int, int] = (1, 1)) -> view.Heat:
    """A map whose cells cover `block`, of an output with as many rows and columns."""
    rows, columns = len(error) * block[0], len(error[0]) * block[1]
    places = [
        [(r * block[0], c * block[1]) for c in range(len(error[0]))] for r in range(len(error))
    ]
    return {
        "shape": [rows, columns], "block": block, "rms": 2.0, "error": error, "at": places,
        "area": {"top": 0, "bottom": rows, "left": 0, "right": columns},
        "ours": [[1.5] * len(error[0])] * len(error), "theirs": [[1.0] * len(error[0])] * len(error),
        "site": "L1/attn/core", "output": "o", "outputs": ["o"], "route": "cpu",
        "against": "reference",
    }  # fmt: skip


def test_a_shade_a_decade():
    values = [0.0, 1e-9, 2e-4, 2e-3, 2e-2, 0.2, 1.0, math.inf, math.nan]
    assert [view.shade_of(v, 1.0) for v in values] == [0, 1, 2, 3, 4, 5, 5, -1, -1]
    assert view.shade_of(0.0, 0.0) == 0


def test_rows_axes_legend_and_cursor():
    lines = view.heat_lines(heat([[1.0, 0.0], [0.02, "inf"]]), view.Cursor(1, 1), 60, 20)
    text = plain(lines).split("\n")
    assert text[0] == "    0┤██████      "  # two cells, six columns each
    assert text[1] == "    1┤▓▓▓▓▓▓NNNNNN"
    assert text[2].strip() == "└0"  # the next label would be too near
    assert text[3] == "o[1, 1]  cpu 1.5  reference 1  error inf × rms"
    assert text[4] == "this value"
    assert "█>1e-1 ▓>1e-2 ▒>1e-3 ░>1e-4 · less  blank equal  N not finite" in text[5]
    assert "rows 0–1 of 2, columns 0–1 of 2; a cell is 1×1; rms 2" in text[6]


def test_a_cell_of_a_block_says_what_it_covers():
    text = plain(view.heat_lines(heat([[0.5, 0.25]], (8, 128)), view.Cursor(0, 1), 60, 20))
    assert "o[0, 128]" in text and "worst of rows 0–7, columns 128–255" in text


def test_equal_is_said_and_a_blank_cursor_is_seen():
    lines = view.heat_lines(heat([[0.0, 0.0]]), view.Cursor(0, 0), 60, 20)
    assert "++++++" in plain(lines) and "equal where both are finite" in plain(lines)


@pytest.mark.parametrize(("width", "height"), [(74, 20), (114, 36), (194, 46)])
def test_it_fits(width: int, height: int):
    high, wide = view.cells_for(width, height)
    lines = view.heat_lines(heat([[1.0] * wide] * high, (4, 64)), view.Cursor(0, 0), width, height)
    assert len(lines) <= height and all(width_of(line) <= width for line in lines)


def test_coordinates():
    assert view.coordinate([128, 8, 512], 5, 3 * 512 + 17) == [5, 3, 17]
    assert view.coordinate([7], 3, 0) == [3] and view.coordinate([], 0, 0) == []


def test_zoom_goes_to_the_worst_place_and_stops_at_the_ends():
    shown = heat([[0.1] * 16] * 16, (4, 4))  # 64 x 64
    shown["at"][15][15] = (63, 62)
    assert view.zoomed(shown, view.Cursor(15, 15), 1 / 4) == "rows=48:64 columns=48:64"
    assert view.zoomed(shown, view.Cursor(0, 0), 4) is None
    shown["area"] = {"top": 8, "bottom": 16, "left": 8, "right": 16}
    shown["at"][0][0] = (12, 12)
    assert view.zoomed(shown, view.Cursor(0, 0), 1 / 4) is None  # eight by eight is close enough
    assert view.zoomed(shown, view.Cursor(0, 0), 4) == "rows=0:32 columns=0:32"


def test_the_cursor_starts_at_the_worst_and_stays_inside():
    shown = heat([[0.1, 0.5], [0.5, 0.2]])
    assert view.worst_cell(shown) == view.Cursor(0, 1)  # the first of two
    assert view.worst_cell(heat([[1.0, "inf"]])) == view.Cursor(0, 1)
    assert view.moved(shown, view.Cursor(1, 1), 5, -9) == view.Cursor(1, 0)


def asked(session: FakeSession) -> list[str]:
    return [line for line in session.lines if line.startswith("heatmap")]


def test_the_screen_asks_for_its_size_zooms_and_closes():
    async def script(ui: Driver) -> None:
        await ui.do("until L4/attn/core")
        await ui.press("h")
        await ui.until(lambda: len(asked(ui.session)) == 2)
        screen = ui.app.screen
        assert isinstance(screen, HeatScreen)
        await ui.shows("L4/attn/core  o 128×8×512  cpu against reference", "not finite")
        assert asked(ui.session)[1] == "heatmap o rows=0:128 columns=0:4096 cells=17x68"
        await ui.pilot.press("down", "down", "right")
        assert screen.cursor == view.Cursor(2, 1)
        await ui.press("enter")
        await ui.until(lambda: screen.heat["area"]["bottom"] == 32)
        assert asked(ui.session)[-1] == "heatmap o rows=0:32 columns=0:1024 cells=17x68"
        await ui.press("backspace")
        await ui.until(lambda: screen.heat["area"]["bottom"] == 128)
        await ui.press("tab")
        await ui.shows("lse 128×8×512")
        await ui.pilot.resize_terminal(120, 40)
        await ui.until(lambda: asked(ui.session)[-1].endswith("cells=33x108"))
        await ui.press("escape")
        assert ui.app.screen is ui.main

    drive(script, size=(80, 24))


def test_without_a_held_op_it_says_so():
    async def script(ui: Driver) -> None:
        await ui.press("h")
        await ui.shows("error: no op is held")
        assert ui.app.screen is ui.main

    drive(script)


def test_a_typed_line_opens_it_too():
    async def script(ui: Driver) -> None:
        await ui.do("until L4/attn/core")
        await ui.line("heatmap lse rows=0:16 columns=0:64")
        await ui.until(lambda: isinstance(ui.app.screen, HeatScreen))
        await ui.shows("lse", "rows 0–15 of 128")

    drive(script)
