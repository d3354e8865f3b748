"""What the main screen shows, and how it reacts."""

from __future__ import annotations

from fake_session import FakeSession
from harness import Driver, drive

from dsv4_bench.workbench.tui.widgets.break_list import BreakList
from dsv4_bench.workbench.tui.widgets.log_pane import LogPane


def row(ui: Driver, name: str) -> str:
    """The tree row that ends a path with `name`, as drawn."""
    tree = ui.main.site_tree
    y = tree.model.row_of[name] - int(tree.scroll_offset.y)
    return tree.render_line(y).text


def test_tree_marks():
    async def script(ui: Driver) -> None:
        ui.session.alarms = {
            "L1/attn/norm": "row_sum 1.2",
            "L2/attn/norm": "3 NaN",
            "L2/attn/wq_a": "own_error 0.3",
        }
        await ui.do("break L2/attn/core")
        await ui.do("continue")
        assert row(ui, "L2/attn/core").startswith("●▶✓")
        assert row(ui, "L2/attn/norm").startswith("  N")
        assert row(ui, "L2/attn/wq_a").startswith("  !")
        assert row(ui, "L2/attn/wq_b").startswith("  ✓")
        assert row(ui, "L2/attn/o_rope").startswith("  ·")
        assert row(ui, "L3").startswith("  · ▸ L3  HCA")
        assert row(ui, "L1").startswith("  ≠") and row(ui, "L2").startswith("●▶!")

    drive(script, size=(120, 60))


def test_tree_follows_and_folds():
    async def script(ui: Driver) -> None:
        tree = ui.main.site_tree
        await ui.do("goto 2")
        assert tree.site == "L2/ffn/hc_post" and "L2" in tree.model.open
        await ui.press("l")
        assert tree.site == "L3/ffn/hc_post"
        assert "L2" not in tree.model.open and "L3" in tree.model.open
        await ui.press("u")
        assert tree.node and tree.node.key == "L3/ffn"
        await ui.press("left", "u", "left")
        assert "L3" not in tree.model.open
        await ui.press("d")
        assert tree.node and tree.node.key == "L3/attn"
        await ui.press("full_stop")
        assert tree.site == "L3/ffn/hc_post"

    drive(script)


def test_search_and_anomalies():
    async def script(ui: Driver) -> None:
        tree = ui.main.site_tree
        await ui.press("slash")
        await ui.type("12 topk")
        assert tree.site == "L12/attn/index/topk"
        await ui.press("escape")
        assert tree.site == "embed"
        await ui.press("slash")
        await ui.type("core")
        await ui.press("down", "enter")
        assert tree.site == "L1/attn/core"
        await ui.press("right_square_bracket")
        await ui.shows("no anomaly so far")
        ui.session.alarms = {"L2/attn/core": "3 NaN", "L3/ffn/gate": "load"}
        await ui.do("goto 4")
        await ui.press("left_square_bracket")
        assert tree.site == "L3/ffn/gate"
        await ui.shows("anomaly 2 of 2  ≠ L3/ffn/gate: load")
        await ui.press("left_square_bracket")
        assert tree.site == "L2/attn/core"
        await ui.press("right_square_bracket")
        assert tree.site == "L3/ffn/gate"

    drive(script)


def test_op_pane():
    async def script(ui: Driver) -> None:
        ui.session.alarms = {"L2/attn/core": "3 NaN"}
        await ui.press("x")
        await ui.do("until L2/attn/core")
        text = ui.text("#op")
        for part in (
            "L2/attn/core  attention", "current, tensors held", "cpu  hash a1b2c3d4  1 launch",
            "✗ sm90 (needs sm_90, this is cpu)", "cpu 120 µs  reference 500 µs", "4.2× faster",
            "✓ <0.1× its limit", "limit 2e-6", "128×8×512  float32", "! 3 nan", "nvfp4",
            "softmax.sink_mass",
        ):  # fmt: skip
            assert part in text, part
        ui.main.site_tree.select("L9/attn/wo_b")
        await ui.settle()
        await ui.until(lambda: "L9/attn/wo_b" in ui.text("#op"))
        assert "not run yet" in ui.text("#op")

    drive(script)


def test_errors_have_columns_with_a_head():
    async def script(ui: Driver) -> None:
        head = ui.main.tree_head
        await ui.do("goto 1")
        assert str(head.render()).split() == ["op", "time"]
        ui.session.alarms = {"L2/attn/wq_a": "own_error 0.31"}
        await ui.do("shadow on", "goto 3")
        assert str(head.render()).split() == ["op", "×limit", "time"]
        assert row(ui, "L3/ffn/sum").split()[:2] == ["✓", "sum"]
        assert row(ui, "L2").split()[:5] == ["!", "▸", "L2", "CSA", "2e5×"]
        await ui.do("carried on")
        await ui.until(lambda: str(head.render()).split() == ["op", "×limit", "carried"])
        assert "e-6" in row(ui, "L3/ffn/sum")
        await ui.pilot.resize_terminal(80, 24)
        await ui.settle()
        assert str(head.render()).split() == ["op", "×limit"]
        assert len(row(ui, "L3/ffn/sum")) == 28 and "×" in row(ui, "L3/ffn/sum")

    drive(script, size=(120, 60))


def test_an_op_over_its_limit_says_what_kind_of_wrong():
    async def script(ui: Driver) -> None:
        ui.session.alarms = {"L2/attn/wq_a": "own_error 0.31"}
        await ui.do("shadow on", "carried on", "anomaly")
        assert ui.app.store.state["site"] == "L2/attn/wq_a"
        text = " ".join(ui.text("#op").split())
        for part in (
            "! 2e5× its limit", "0.31 rel. L2 vs float64",
            "kind constant_factor: o = 0.69 x reference for rows 0-7 of 128", "carried 2e-6",
        ):  # fmt: skip
            assert part in text, part

    drive(script)


def test_a_switch_without_effect_says_so():
    async def script(ui: Driver) -> None:
        ui.session.stuck = {"embed"}
        await ui.press("s", "k")
        assert "NO EFFECT: both are cpu" in ui.text("#op")
        await ui.shows("embed: cpu → cpu  NO EFFECT")
        await ui.press("s")
        assert "NO EFFECT" not in ui.text("#op")

    drive(script)


def test_contract_opens_and_closes():
    async def script(ui: Driver) -> None:
        await ui.press("s", "i")
        await ui.still()
        await ui.shows("window [n, w, hd]")
        await ui.press("escape")
        await ui.still()
        assert "window [n, w, hd]" not in ui.screen_text()

    drive(script)


def test_breakpoint_list_deletes():
    async def script(ui: Driver) -> None:
        await ui.press("s", "b", "B")
        assert ui.app.focused is ui.main.query_one(BreakList)
        await ui.shows("● 1  embed")
        await ui.press("down", "delete")
        assert ui.sent()[-1] == "delete 1"
        await ui.still()
        assert "● 1  embed" not in ui.screen_text()

    drive(script)


def test_values_come_to_the_front_and_go_back():
    async def script(ui: Driver) -> None:
        await ui.press("s")
        await ui.do("print o[0,:3]")
        assert ui.main.chosen == "values"
        await ui.shows("-2.1200")
        await ui.press("1")
        assert ui.main.chosen == "op"

    drive(script, size=(80, 24))


def test_readings_pane():
    async def script(ui: Driver) -> None:
        ui.session.alarms = {"L2/attn/core": "3 NaN"}
        await ui.do("goto 4")
        text = ui.text("#readings")
        assert "largest growth" in text and "L4" in text
        assert "alarms: 1" in text and "N L2/attn/core  3 NaN" in text
        assert "L4/ffn/gate" in text

    drive(script)


def test_watches_and_shadow_show():
    async def script(ui: Driver) -> None:
        await ui.do("watch o.max()")
        await ui.press("x")
        assert "tensor(1.0021)" in ui.text("#watches")
        await ui.shows("shadow *")

    drive(script)


def test_log_shows_everything_and_hides():
    async def script(ui: Driver) -> None:
        ui.session.log("stderr", "nvcc: warning")
        ui.session.log("stdout", "hello from a kernel\n")
        await ui.press("s")
        await ui.still()
        text = ui.screen_text()
        assert "nvcc: warning" in text and "hello from a kernel" in text and "›    step" in text
        await ui.press("o")
        assert not ui.main.query_one(LogPane).display
        await ui.press("o")
        assert ui.main.query_one(LogPane).display

    drive(script)


def test_resizing_rearranges():
    async def script(ui: Driver) -> None:
        await ui.do("goto 3")
        await ui.pilot.resize_terminal(80, 24)
        await ui.settle()
        assert ui.main.shown == ("op",)
        await ui.press("3")
        await ui.shows("residual norm")
        await ui.pilot.resize_terminal(200, 60)
        await ui.settle()
        assert len(ui.main.shown) == 5
        assert "µs" in row(ui, "L3/attn/core") and "cpu" in row(ui, "L3/attn/core")

    drive(script)


def test_too_small_says_so():
    async def script(ui: Driver) -> None:
        assert "too small" in ui.screen_text() and "Step" not in ui.screen_text()
        await ui.pilot.resize_terminal(80, 24)
        await ui.do("goto 99")
        await ui.pilot.resize_terminal(50, 12)
        await ui.still()
        assert "too small" in ui.screen_text() and "error" not in ui.screen_text()
        await ui.pilot.resize_terminal(80, 24)
        await ui.still()
        assert "too small" not in ui.screen_text() and "Step" in ui.screen_text()

    drive(script, size=(50, 12))


def test_opening_shows_progress():
    async def script(ui: Driver) -> None:
        ui.session.log("worker", "mapping shard 3 of 46")
        await ui.until(lambda: "mapping shard 3 of 46" in ui.text("#op"))
        await ui.shows("opening")
        await ui.press("s")
        assert ui.sent() == []
        ui.session.open()
        await ui.settle()
        assert "ready" in ui.screen_text() and "549 ops" in ui.text("#op")

    drive(script, opened=False)


def test_help_lists_every_key():
    async def script(ui: Driver) -> None:
        await ui.press("question_mark")
        text = str(ui.app.screen.query_one("#text Static").content)  # type: ignore[attr-defined]
        for part in ("goto LAYER", "F10", "next anomaly", "breakpoint", "CSA", "ctrl+s"):
            assert part in text, part
        await ui.press("q")
        assert ui.app.screen is ui.main and not ui.app._exit

    drive(script)


def test_palette_finds_commands_and_sites():
    async def script(ui: Driver) -> None:
        await ui.pilot.press("ctrl+p")
        await ui.type("run to L12/attn/core")
        await ui.until(lambda: "run to L12/attn/core" in ui.screen_text().split("\n", 6)[-1])
        await ui.pilot.press("enter", "enter")
        await ui.until(lambda: "until L12/attn/core" in ui.sent())
        await ui.settle()
        await ui.pilot.press("ctrl+p")
        await ui.type("goto LAY")
        await ui.shows("go to the end of a layer")

    drive(script)


def test_malformed_events_do_not_crash():
    async def script(ui: Driver) -> None:
        for event in ({"event": "site"}, {"event": "reply", "ok": True, "line": "break x",
                      "result": {"breaks": None, "text": 3}}, {"event": "nonsense"}, {}):  # fmt: skip
            ui.session.on_event(event)
        await ui.press("s")
        assert ui.app.store.state["site"] == "embed"

    drive(script)


def test_a_model_of_61_layers_draws():
    def prepare(session: FakeSession) -> None:
        assert len(session.paths) > 2000

    async def script(ui: Driver) -> None:
        await ui.do("goto 58")
        assert ui.main.site_tree.site == "L58/ffn/hc_post"

    drive(script, prepare=prepare, layers=61)
