"""Every key is a line of the session."""

from __future__ import annotations

import pytest
from harness import Driver, drive

from dsv4_bench.workbench.commands import SESSION_COMMANDS
from dsv4_bench.workbench.tui import keys
from dsv4_bench.workbench.tui.store import Store
from dsv4_bench.workbench.tui.widgets.command_line import CommandLine

# From the end of layer 2; the cursor is on L2/ffn/hc_post.
LINES = {
    "s": "step",
    "f11": "step",
    "n": "next",
    "f10": "next",
    "f": "finish",
    "l": "layer",
    "c": "continue",
    "f5": "continue",
    "a": "anomaly",
    "t": "until L2/ffn/hc_post",
    "N": "back",
    "r": "rerun",
    "k": "toggle L2/ffn/hc_post",
    "x": "shadow on",
    "X": "carried on",
    "b": "break L2/ffn/hc_post",
    "B": "breaks",
    "R": "restart",
}
PROMPTS = {
    "W": "bundle ",
    "g": "goto ",
    "p": "print ",
    "e": "eval ",
    "w": "watch ",
    "ctrl+s": "save ",
}


def test_every_command_key_is_tested():
    table = {key for command in SESSION_COMMANDS for key in command.keys}
    assert table == {
        *LINES,
        *PROMPTS,
        "q",
        "space",
        "h",
        "T",
        "H",
    }  # h, T, H open screens: their tests


def test_keys_send_their_lines():
    async def script(ui: Driver) -> None:
        for key, line in LINES.items():
            if ui.app.store.state["site"] != "L2/ffn/hc_post":
                await ui.do("goto 2")
            before = len(ui.sent())
            await ui.press(key)
            assert ui.sent()[before:] == [line], key

    drive(script)


def test_prompting_keys_open_the_command_line():
    async def script(ui: Driver) -> None:
        line = ui.main.query_one(CommandLine)
        for key, text in PROMPTS.items():
            await ui.press(key)
            assert line.display and line.input.value == text
            await ui.press("escape")
            assert not line.display
        assert ui.sent() == []

    drive(script)


def test_site_keys_act_on_the_tree_cursor():
    async def script(ui: Driver) -> None:
        await ui.do("goto 2")
        ui.main.site_tree.select("L2/attn/core")
        await ui.press("k", "b", "b", "t")
        assert ui.sent()[1:] == [
            "toggle L2/attn/core", "break L2/attn/core", "delete 1", "until L2/attn/core"
        ]  # fmt: skip

    drive(script)


def test_shadow_key_switches_on_and_off():
    async def script(ui: Driver) -> None:
        await ui.press("x", "x")
        assert ui.sent() == ["shadow on", "shadow off"]

    drive(script)


def test_space_pauses_only_while_running():
    async def script(ui: Driver) -> None:
        await ui.press("space")
        assert ui.sent() == []
        ui.session.slow = True
        await ui.press("s", "space")
        assert ui.sent() == ["step", "pause"]
        ui.session.release()
        await ui.settle()

    drive(script)


def test_running_refuses_with_a_message():
    async def script(ui: Driver) -> None:
        ui.session.slow = True
        await ui.press("c")
        await ui.press("s", "n", "x", "b")
        assert ui.sent() == ["continue"]
        await ui.shows("error: shadow: the engine is running")
        await ui.press("p")
        await ui.shows("print: the engine is running")
        await ui.type("o")
        await ui.press("enter")
        assert ui.main.query_one(CommandLine).input.value == "print o"  # kept for later
        ui.session.release()
        await ui.settle()
        await ui.press("enter")
        assert ui.sent() == ["continue", "print o"]

    drive(script)


@pytest.mark.parametrize(
    ("state", "name", "ok"),
    [
        ("running", "pause", True),
        ("running", "step", False),
        ("dead", "restart", True),
        ("dead", "step", False),
        ("opening", "quit", True),
        ("opening", "step", False),
        ("stopped", "print", True),
    ],
)
def test_allowed(state: str, name: str, ok: bool):
    assert keys.allowed(name, state) is ok


def test_bindings_have_unique_ids_and_the_key_bar_is_short():
    bindings = [*keys.session_bindings(), *keys.ui_bindings()]
    ids = [binding.id for binding in bindings]
    assert len(set(ids)) == len(ids)
    assert len(keys.BAR) == 9  # one of them only while running
    assert all(binding.tooltip for binding in bindings)


def test_the_key_bar_can_be_clicked():
    async def script(ui: Driver) -> None:
        await ui.pilot.click("#keys", offset=(3, 0))
        await ui.settle()
        assert ui.sent() == ["step"]

    drive(script)


def test_every_command_has_an_action_without_a_site():
    for command in SESSION_COMMANDS:
        assert keys.action_for(command.name, Store(), None)
