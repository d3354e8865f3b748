"""The pure parts: numbers, plots, tree rows, views, what is asked when."""

from __future__ import annotations

import math

import pytest
from fake_session import FakeSession, site_entries, tensor

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.help_text import help_lines
from dsv4_bench.workbench.tui.layout import panes_shown, too_small, tree_columns
from dsv4_bench.workbench.tui.op_view import op_lines
from dsv4_bench.workbench.tui.panes import break_text, death_lines, residual_points, status_line
from dsv4_bench.workbench.tui.plot import line_plot, spark
from dsv4_bench.workbench.tui.queries import Queries
from dsv4_bench.workbench.tui.records import SiteInfo
from dsv4_bench.workbench.tui.results import any_result
from dsv4_bench.workbench.tui.site_model import SiteModel, neighbour, search
from dsv4_bench.workbench.tui.spans import plain, width_of
from dsv4_bench.workbench.tui.store import Change, Store


def told(*lines: str, **session: object) -> Store:
    """A store that heard a session do `lines`."""
    store = Store()
    fake = FakeSession(store.apply, **session)  # type: ignore[arg-type]
    for line in lines:
        fake.send(line)
    return store


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (3, "3"), (1234567, "1,234,567"), (1.0, "1"), (1.25, "1.25"),
        (0.0012345, "0.001234"), (1.2e-7, "1.2e-7"), (1e-7, "1e-7"), (123456.0, "1.2e5"),
        (math.nan, "nan"), (-math.inf, "-inf"), ("nan", "nan"), (None, "–"), (True, "True"),
    ],
)  # fmt: skip
def test_number(value: object, text: str):
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.2e-5, "12 µs"), (1.23e-4, "123 µs"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (3.42, "3.4 s"),
     (125, "2m05s"), (None, "–"), (0.99999, "1.0 s"), (9.999e-4, "1 ms")],
)  # fmt: skip
def test_seconds(value: float | None, text: str):
    assert fmt.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0, "0×"), (1e-5, "<0.1×"), (0.42, "0.4×"), (3.21, "3.2×"), (9.96, "10×"),
     (1234.5, "1234×"), (15500.0, "2e4×"), (1e12, "1e12×"), (math.inf, "inf×")],
)  # fmt: skip
def test_times(value: float | None, text: str):
    assert fmt.times(value) == text and len(text) < 7


def test_sizes_shapes_and_clips():
    assert fmt.size(2457600) == "2.3 MiB" and fmt.size(12) == "12 B" and fmt.size(None) == "–"
    assert fmt.shape([300, 4, 512]) == "300×4×512" and fmt.shape([]) == "scalar"
    assert fmt.clip("L3/attn/core", 6) == "L3/at…"
    assert fmt.clip("L3/attn/core", 6, left=True) == "…/core"
    assert fmt.numbers([1, 2, 3, 4, 5]) == "[1 2 3 4 …]"
    assert fmt.speed(0.1, 0.4) == "4.0× faster" and fmt.speed(0.4, 0.1) == "4.0× slower"


def test_plot_has_axes_and_degrades_to_a_sparkline():
    plot = line_plot([(0, 1.0), (1, 4.0), (2, 2.0)], 30, 8, mark=1)
    lines = plot.split("\n")
    assert len(lines) == 8 and all(len(line) <= 30 for line in lines)
    assert lines[0].startswith("4│") and "▲" in lines[-2] and "L0" in lines[-1]
    assert line_plot([(0, 1.0), (1, 4.0)], 10, 3) == "▁█"
    assert spark([], 10) == "" and spark([2, 2], 10) == "▁▁"


def test_status_line_keeps_the_important_and_fits():
    store = told("until L4/attn/core")
    for width in (20, 40, 80, 200):
        line = status_line(store, width)
        assert width_of(line) <= width + 2
        assert "stopped" in plain([line])
    assert "mem 700 MiB" in plain([status_line(store, 200)])
    assert "L4/attn/core" in plain([status_line(store, 40)])


def test_rows_show_what_is_open():
    paths = [entry["path"] for entry in site_entries(61)]
    assert len(paths) > 2000
    model = SiteModel.build(paths)
    assert len(model.rows) == 63
    model.reveal("L12/attn/core", following=True)
    assert model.rows[model.row_of["L12/attn/core"]].is_site
    model.reveal("L13/attn/core", following=True)
    assert "L12/attn/core" not in model.row_of
    model.set_open("L2", True)
    model.reveal("L14/attn/core", following=True)
    assert "L2/attn/core" in model.row_of


def test_skipped_sites_are_not_pending():
    sites = {path: SiteInfo(path) for path in ("L0/a", "L0/b", "L0/c", "L1/a")}
    sites["L0/a"].done = sites["L0/c"].done = sites["L1/a"].done = True
    model = SiteModel.build(sites)
    assert model.summary("L0/b", sites, "L1/a").mark == fmt.SKIPPED
    assert model.summary("L0", sites, "L1/a").mark == fmt.DONE
    assert model.summary("L0/b", sites, "L0/a").mark == fmt.PENDING


def test_errors_of_sites_that_have_not_run_in_this_pass_are_not_shown():
    sites = {path: SiteInfo(path, times=5.0, carried_error=0.1) for path in ("L0/a", "L0/b")}
    sites["L0/a"].done, sites["L0/a"].times = True, 2.0
    model = SiteModel.build(sites)
    assert model.summary("L0/a", sites, "L0/a").times == 2.0
    assert model.summary("L0/b", sites, "L0/a").times is None
    assert model.summary("L0/b", sites, "L0/a").carried_error is None
    assert model.summary("L0", sites, "L0/a").times == 2.0


def test_search_and_neighbours():
    paths = ["embed", "L1/attn/core", "L12/attn/core", "L12/attn/index/topk"]
    order = {path: i for i, path in enumerate(paths)}
    assert search(paths, "12 top") == "L12/attn/index/topk"
    assert search(paths, "core", after="L12/attn/core") == "L12/attn/core"
    assert search(paths, "zzz") is None and search([], "a") is None
    assert neighbour(paths, order, "L12/attn/index/topk", 1) == "embed"
    assert neighbour(paths, order, "embed", -1) == "L12/attn/index/topk"
    assert neighbour([], order, None, 1) is None


def test_layout():
    assert panes_shown(80, "readings") == ("readings",)
    assert panes_shown(120, "values")[0] == "values" and len(panes_shown(120, "op")) == 4
    assert len(panes_shown(200, "op")) == 5
    assert too_small(59, 30) and too_small(80, 15) and not too_small(60, 16)
    both = ("times", "carried_error")
    assert tree_columns(20, both) == () and tree_columns(28, both) == ("times",)
    assert tree_columns(28, ()) == ("seconds",) and tree_columns(37, both) == both
    assert tree_columns(61, both) == (*both, "seconds", "route")


@pytest.mark.parametrize("width", [40, 48, 84, 120])
def test_op_lines_fit(width: int):
    view = {
        "site": "L3/attn/index/compressor/pool", "op": "compressor", "doc": "One.\nTwo.",
        "state": "current", "held": True, "route": "cpu", "effect": "NO EFFECT: same bits",
        "stamp": {"implementation": "cpu", "hash": "abcdef0123", "launches": 2, "note": ""},
        "inputs": [tensor("x", [206, 4, 512]), {"name": "step", "value": "Step"}],
        "outputs": [tensor("o", [3], nan=1, expected_nonfinite=True)],
        "params": [tensor("bank[0].w1", [8, 8], format="nvfp4", stats=None, count=256)],
    }  # fmt: skip
    lines = op_lines(view, width)
    text = plain(lines)
    for part in ("NO EFFECT: same bits", "206×4×512", "1 nan (expected)", "256 of 8×8", "nvfp4"):
        assert part in text
    assert all(width_of(line) <= width for line in lines if "nan" not in plain([line]))


def test_help_names_every_mark():
    text = plain(help_lines(100))
    assert all(sign in text for sign, _ in fmt.MARKS)


def test_death_and_breaks():
    death = {"site": "L3/attn/core", "signal": "SIGSEGV", "returncode": -11,
             "stderr": ["x", "Fatal Python error: Segmentation fault", "a", "b", "c"]}  # fmt: skip
    text = plain(death_lines(death, 60))
    assert "L3/attn/core: SIGSEGV" in text and "Fatal" in text and "│ c" not in text
    assert break_text({"number": 1, "text": "nan > 0", "hits": 1}, 30).endswith("1 hit")
    assert "return code 1" in plain(death_lines({"returncode": 1}, 60))


def test_residual_points_are_of_the_newest_pass():
    rows = [{"name": "norm", "layer": n, "value": [1.0, "nan", n], "forward": n // 2} for n in (0, 1, 2, 3)]  # fmt: skip
    assert residual_points(rows) == [(2.0, 2.0), (3.0, 3.0)]


def test_any_result():
    assert any_result({"stamps": [{"site": "embed", "launches": 1}]}).split() == [
        "site", "launches", "embed", "1"
    ]  # fmt: skip
    assert any_result({"a": 1.5, "b": [1]}) == "a: 1.5\nb: [1]"
    assert any_result({}) == "done"


def test_a_new_forward_pass_starts_pending_and_alarms_stay():
    store = told("until L1/attn/core")
    store.apply({"event": "site", "site": "embed", "alarm": "3 NaN"})
    for path in store.sites:
        store.apply({"event": "enter", "site": path})
        store.apply({"event": "site", "site": path, "seconds": 1.0})
    assert store.forward == 1 and store.sites["embed"].alarm == "3 NaN"
    store.apply({"event": "enter", "site": "embed"})
    assert store.forward == 2 and not any(site.done for site in store.sites.values())


def test_going_back_makes_later_sites_pending():
    store = told("until L1/attn/core", "back 2")
    order = list(store.sites)
    here = order.index(store.state["site"])
    assert store.sites[order[here]].done and not store.sites[order[here + 1]].done


def test_a_long_log_is_shortened_and_says_so():
    store = Store()
    store.note("stdout", "\n".join(str(i) for i in range(10_000)))
    lines = store.take_log()
    assert len(lines) < 2100 and "too fast" in lines[0].text and lines[-1].text == "9999"


def test_queries_ask_once_and_only_when_idle():
    store, queries = told("goto 2"), Queries()
    queries.changed(Change.HELLO | Change.STOPPED, store)
    lines = queries.next(store, "embed", ("op", "readings"))
    assert {kind for kind, _ in lines} == {"op", "layer", "residual", "sites"}
    for number, (kind, _) in enumerate(lines):
        queries.sent(kind, number, "embed")
    assert queries.next(store, "embed", ("op", "readings")) == []
    assert queries.next(store, "L0/attn/core", ("op",)) == []  # one of a kind at a time
    for number in range(len(lines)):
        queries.replied({"id": number, "ok": True, "line": "op embed"})
    assert queries.next(store, "L0/attn/core", ("op",)) == [("op", "op L0/attn/core")]
    assert queries.next(store, "L0/attn/core", ("breaks",)) == []
    store.run_sent = 7
    assert queries.next(store, "L0/attn/core", ("op",)) == []
