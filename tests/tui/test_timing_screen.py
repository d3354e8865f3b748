"""The timing screen: order, bars and rows as pure functions, and the keys that sort."""

from __future__ import annotations

from typing import Any

import pytest
from fake_session import FakeSession
from harness import Driver, drive

from dsv4_bench.workbench.tui import timing_view as view
from dsv4_bench.workbench.tui.screens.timing import TimingScreen
from dsv4_bench.workbench.tui.spans import plain


def row(name: str, seconds: float, floor: float, error: Any = None, **more: Any) -> view.Row:
    base = {
        "site": f"L1/{name}", "kernel": "cpu", "floor": floor, "own_error": error, "limit": 1e-6,
        "seconds": {"cpu": seconds, "reference": 2 * seconds}, "of_floor": floor / seconds,
        "speedup": 2.0, "verdict": "ok",
    }  # fmt: skip
    return {**base, **more}


TIMING: view.Timing = {
    "group": "L1", "kind": "CSA", "tokens": [0, 64], "device": "cpu",
    "sites": [
        row("near", 4e-3, 3.9e-3, 1e-7), row("far", 3e-3, 1e-5, 2e-7),
        row("wrong", 1e-3, 9e-4, "inf", verdict="over"),
        row("plain", 1e-3, 1e-3, None, kernel="reference", speedup=None),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("order", ["near", "far", "wrong", "plain"]),
        ("time", ["near", "far", "plain", "wrong"]),
        ("gap", ["far", "plain", "near", "wrong"]),
        ("error", ["wrong", "far", "near", "plain"]),
    ],
)
def test_orders(order: str, names: list[str]):
    assert [r["site"].partition("/")[2] for r in view.ordered(TIMING, order)] == names


def test_bars_are_exact_to_an_eighth():
    assert view.bar(1.0, 1.0, 4) == "████" and view.bar(0.0, 1.0, 4) == ""
    assert view.bar(0.5, 1.0, 3) == "█▌" and view.bar(1.0, 0.0, 4) == ""
    assert view.bar(1 / 32, 1.0, 4) == "▏"


@pytest.mark.parametrize("width", [70, 130])
def test_rows(width: int):
    header, rows = view.table(TIMING, "time", width)
    assert "time" in header and ("reference" in header) == (width >= 100)
    assert all(len(text) <= width for text, _ in rows)
    near, wrong, plain_row = rows[0][0], rows[3][0], rows[2][0]
    assert near.split()[:2] == ["near", "4"] and "98%" in near and near.endswith("█")
    assert wrong.startswith("!  wrong") and "inf×" in wrong
    assert "2.0×" not in plain_row


def test_the_head_has_totals():
    text = plain(view.head_lines(TIMING, "gap", 100))
    for part in ("L1 CSA", "tokens 0–63", "all ops 10 ms", "reference 18 ms", "! 1 over the limit",
                 "furthest above the floor first"):  # fmt: skip
        assert part in text
    assert "below the floor" not in text
    cached = {**TIMING, "sites": [row("a", 1e-6, 1e-3)]}
    assert "below the floor" in plain(view.head_lines(cached, "gap", 100))


def test_the_screen_sorts_and_leads_to_the_op():
    async def script(ui: Driver) -> None:
        await ui.do("until L2/attn/norm")
        await ui.press("T")
        assert ui.sent()[-1] == "timing"
        screen = ui.app.screen
        assert isinstance(screen, TimingScreen)
        await ui.shows("L2 CSA  tokens 0–127", "as they run", "attn/hc_pre")
        await ui.press("t")
        await ui.shows("longest first")
        await ui.press("g", "e")
        await ui.shows("largest error first")
        await ui.press("down", "enter")
        assert ui.app.screen is ui.main
        assert ui.main.site_tree.site == "L2/attn/core"
        await ui.press("T", "escape")
        assert ui.app.screen is ui.main

    drive(script, size=(80, 24))


def test_nothing_to_time_is_said():
    def refuse(session: FakeSession) -> None:
        from dsv4_bench.engine.errors import DSV4Error

        def timing(site: str = "*") -> Any:
            raise DSV4Error("nothing has run yet", "`step` runs the first op")

        session._do_timing = timing  # type: ignore[method-assign]

    async def script(ui: Driver) -> None:
        await ui.press("T")
        await ui.shows("error: nothing has run yet")
        assert ui.app.screen is ui.main and not ui.app.store.running

    drive(script, prepare=refuse)
