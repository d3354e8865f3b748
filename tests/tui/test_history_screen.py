"""The history of times: ratios, order and colours as pure functions, the screen and its baseline."""

from __future__ import annotations

from typing import Any

import pytest
from fake_session import FakeSession
from harness import Driver, drive

from dsv4_bench.workbench.tui import history_view as view
from dsv4_bench.workbench.tui.screens.history import HistoryScreen
from dsv4_bench.workbench.tui.spans import BAD, GOOD, PLAIN, plain


def row(seconds: float | None, **more: Any) -> dict[str, Any]:
    base = {
        "when": "2026-11-23T08:12:59+00:00", "what": "profile", "checkpoint": "c", "device": "H200",
        "conditions": "decode", "process": 1, "site": "L1/attn/core", "implementation": "sm90",
        "hash": "abcdef123456", "seconds": seconds, "own_error": 2e-6, "limit": 1e-6,
        "verdict": "ok", "problem": "", "here": False,
    }  # fmt: skip
    return {**base, **more}


def test_ratios_are_to_the_same_op_under_the_same_conditions():
    base = row(2.0)
    assert view.ratio(row(1.0), base) == 0.5
    assert view.ratio(row(None), base) is None and view.ratio(row(1.0), None) is None
    for name in ("site", "device", "conditions", "checkpoint"):
        assert view.ratio(row(1.0, **{name: "other"}), base) is None
    assert view.ratio(row(1.0, implementation="reference"), base) == 0.5


def test_the_first_baseline_is_the_oldest_of_the_newest_implementation():
    rows = [row(None), row(1.0), row(3.0, implementation="reference"), row(2.0)]
    assert view.first_baseline(rows) == 3
    assert view.first_baseline([*rows, row(4.0, checkpoint="another")]) == 3
    assert view.first_baseline([row(None)]) is None and view.first_baseline([]) is None


@pytest.mark.parametrize("width", [76, 150])
def test_rows(width: int):
    rows = [
        row(0.9),
        row(1.2, here=True),
        row(None, problem="no"),
        row(1.0),
        row(1.0, verdict="over"),
    ]
    header, lines = view.table(rows, 3, width)
    assert ("conditions" in header) == (width >= view.WIDE)
    assert [style for _, style in lines] == [GOOD, BAD, BAD, PLAIN, BAD]
    texts = [text for text, _ in lines]
    assert "0.90" in texts[0] and "1.20" in texts[1] and "failed" in texts[2]
    assert texts[3].startswith("=") and texts[1].startswith(" •") and texts[4].startswith("!")
    assert "11-23 08:12" in texts[0] and "abcdef1 " in texts[0] and "2.0×" in texts[0]
    assert all(len(text) <= width for text in texts)


def test_the_head_names_the_baseline():
    rows = [row(0.9), row(1.0, process=2)]
    text = plain(view.head_lines("L1/attn/core", rows, 1, 100))
    assert "2 times from 2 runs" in text and "= sm90 abcdef1 of 11-23 08:12, 1.0 s; decode" in text
    assert "T times this layer" in plain(view.head_lines("L1/attn/core", [], None, 100))


def test_the_screen_takes_another_baseline():
    async def script(ui: Driver) -> None:
        await ui.do("until L2/attn/core")
        await ui.press("H")
        assert ui.sent()[-1] == "history L2/attn/core"
        screen = ui.app.screen
        assert isinstance(screen, HistoryScreen)
        await ui.shows("5 times from 5 runs", "failed", "profile")
        assert screen.base == 3  # the one below it is of another machine
        await ui.shows("0.90", "1.00")
        await ui.press("down", "down", "b")
        assert screen.base == 2
        await ui.press("up", "b")  # the attempt that failed is no baseline
        assert screen.base == 2
        await ui.press("escape")
        assert ui.app.screen is ui.main

    drive(script, size=(80, 24))


def test_an_op_that_was_never_timed():
    def empty(session: FakeSession) -> None:
        session._do_history = lambda site="": {"pattern": site, "rows": []}  # type: ignore[method-assign]

    async def script(ui: Driver) -> None:
        await ui.do("step")
        await ui.press("H")
        await ui.shows("nothing was timed here yet")
        await ui.press("b", "escape")
        assert ui.app.screen is ui.main

    drive(script, prepare=empty)


def test_an_op_is_counted_from_the_timing_screen():
    def with_gpu(session: FakeSession) -> None:
        session.gpu = True

    async def script(ui: Driver) -> None:
        await ui.do("until L2/attn/norm")
        await ui.press("T", "down", "n")
        assert ui.sent()[-1] == "ncu L2/attn/norm"
        await ui.shows(
            "1 kernel, 24 µs",
            "cold 25 µs",
            "attention_kernel",
            "71 %",
            "168 registers",
            "3.20 TB/s",
        )
        await ui.press("escape")
        await ui.shows("as they run")
        await ui.press("h")
        await ui.shows("5 times from 5 runs")

    drive(script, prepare=with_gpu)


def test_without_a_gpu_the_timing_screen_shows_what_to_run_elsewhere():
    async def script(ui: Driver) -> None:
        await ui.do("until L2/attn/norm")
        await ui.press("T", "n")
        await ui.shows("runs on the CPU", "dsv4-bench profile demo --sites", "--ncu")
        assert ui.app.screen is not ui.main

    drive(script, size=(80, 24))
