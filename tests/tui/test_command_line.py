"""The line at the bottom: completion, history, errors."""

from __future__ import annotations

from harness import Driver, drive
from textual import events

from dsv4_bench.workbench.tui.completion import History, Names, common, complete, hint
from dsv4_bench.workbench.tui.widgets.command_line import CommandLine

OPS = {
    "embed": "embed", "L0/attn/core": "attention", "L0/attn/norm": "rms_norm",
    "L1/attn/core": "attention", "L12/ffn/gate": "gate", "head/logits": "linear",
}  # fmt: skip
SITES = Names(OPS, (), {"attention": ["cpu", "fault/sink_missing"], "gate": ["cpu"]})


def test_complete_names_and_sites():
    assert complete("st", SITES) == ["step ", "status", "stamps"]
    assert complete("until L", SITES) == ["until L0/", "until L1/", "until L12/"]
    assert complete("until L0/attn/", SITES) == ["until L0/attn/core", "until L0/attn/norm"]
    assert complete("break embed own", SITES) == ["break embed own_error > limit"]
    assert complete("route ref", SITES) == ["route reference"]
    assert complete("print win", Names(OPS, ["window", "o"])) == ["print window"]
    assert complete("nonsense x", SITES) == []


def test_complete_implementations_of_the_op():
    core = "route L0/attn/core="
    assert complete(core, SITES) == [
        core + name for name in ("kernel", "reference", "cpu", "fault/sink_missing")
    ]
    assert complete("route */core=f", SITES) == ["route */core=fault/sink_missing"]
    assert complete("route L12=f", SITES) == []
    assert complete("route L12=c", SITES) == ["route L12=cpu"]


def test_faults_are_asked_for_once_a_route_may_name_one():
    async def script(ui: Driver) -> None:
        line = ui.main.query_one(CommandLine)
        await ui.press("colon")
        await ui.type("route L3/attn/hc_post=f")
        await ui.press("tab")
        assert line.input.value == "route L3/attn/hc_post=fault/comb_transposed"
        assert ui.session.lines.count("faults") == 1
        await ui.press("escape")
        await ui.line("faults hyper")
        await ui.shows("1 known bugs", "L2/attn/hc_post=fault/comb_transposed", "The mixing sum")

    drive(script)


def test_common_and_hint():
    assert common(["until L0/", "until L1/"]) == "until L"
    assert common([]) == ""
    assert hint("goto").startswith("goto LAYER")
    assert "step" in hint("ste")
    assert "no command" in hint("zzz")


def test_history_walks_lines_with_the_same_beginning():
    history = History()
    for line in ("step 3", "print q", "step 4", "step 4"):
        history.add(line)
    assert history.move("st", -1) == "step 4"
    assert history.move("step 4", -1) == "step 3"
    assert history.move("step 3", -1) == "step 3"
    assert history.move("step 3", 1) == "step 4"
    assert history.move("step 4", 1) == "st"


def test_typing_completing_and_recalling():
    async def script(ui: Driver) -> None:
        line = ui.main.query_one(CommandLine)
        await ui.press("colon")
        await ui.type("got")
        await ui.press("tab")
        assert line.input.value == "goto "
        await ui.type("3")
        await ui.press("enter")
        assert ui.sent() == ["goto 3"] and not line.display
        await ui.press("colon", "up")
        assert line.input.value == "goto 3"
        await ui.press("down", "escape")
        assert not line.display and ui.app.focused is ui.main.site_tree

    drive(script)


def test_errors_are_shown_where_they_arise():
    async def script(ui: Driver) -> None:
        line = ui.main.query_one(CommandLine)
        await ui.line("stpe")
        await ui.shows("error: unknown command 'stpe'")
        assert line.display
        await ui.shows("did you mean 'step'")
        await ui.press("escape")
        assert ui.sent() == []
        await ui.line("goto 99")
        await ui.shows("error: goto: no layer 99   hint: layers are 0 to 15")
        await ui.press("s")
        assert "no layer 99   hint" not in ui.screen_text()

    drive(script)


def test_fast_typing_loses_nothing():
    async def script(ui: Driver) -> None:
        names = {":": "colon", " ": "space"}
        for key in ":goto 2":
            ui.app.post_message(events.Key(names.get(key, key), key))
        await ui.until(lambda: ui.main.command_line.input.value == "goto 2")
        assert ui.sent() == []

    drive(script)


def test_letters_are_text_while_the_line_is_open():
    async def script(ui: Driver) -> None:
        await ui.press("colon")
        await ui.type("snbq")
        assert ui.sent() == [] and ui.main.query_one(CommandLine).input.value == "snbq"

    drive(script)


def test_quit_typed_as_a_line():
    async def script(ui: Driver) -> None:
        await ui.press("colon")
        await ui.type("quit")
        await ui.pilot.press("enter")
        await ui.until(lambda: ui.app._exit)

    assert drive(script).closed
