"""Pictures of the screens, compared as text; see the `snapshot` fixture for how to rewrite them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_session import FakeSession
from harness import Driver, drive

SIZES = {"80x24": (80, 24), "120x40": (120, 40), "200x60": (200, 60)}


def alarms(session: FakeSession) -> None:
    session.alarms = {"L2/attn/core": "3 NaN in o", "L1/ffn/experts": "own_error 0.31"}


async def scene(ui: Driver) -> None:
    """Stopped in the middle of layer 4, with a little of everything."""
    await ui.do("shadow on", "goto 3", "break L4/attn/core", "break */core nan > 0", "continue")
    await ui.do("watch o.abs().max()")
    ui.session.log("worker", "built attention.cpp in 1.3 s")
    ui.session.log("stdout", "attention: 8 heads, 2 threads")
    ui.session.log("stderr", "warning: slow path")
    await ui.settle()


@pytest.mark.parametrize("name", SIZES)
def test_main_screen(name: str, snapshot: Callable[[str, Any], None]):
    async def script(ui: Driver) -> None:
        await scene(ui)
        await ui.still()
        snapshot(f"main-{name}", ui.app)

    drive(script, size=SIZES[name], prepare=alarms)


def test_ready(snapshot: Callable[[str, Any], None]):
    async def script(ui: Driver) -> None:
        await ui.still()
        snapshot("ready-120x40", ui.app)

    drive(script)


def test_dead(snapshot: Callable[[str, Any], None]):
    async def script(ui: Driver) -> None:
        await scene(ui)
        ui.session.die()
        await ui.until(lambda: ui.app.store.death)
        await ui.still()
        snapshot("dead-80x24", ui.app)

    drive(script, size=(80, 24), prepare=alarms)


def test_help(snapshot: Callable[[str, Any], None]):
    async def script(ui: Driver) -> None:
        await ui.press("question_mark")
        await ui.still()
        snapshot("help-100x30", ui.app)

    drive(script, size=(100, 30))


@pytest.mark.parametrize(
    ("name", "line", "size"),
    [
        ("heat-80x24", "heatmap", (80, 24)),
        ("heat-200x50", "heatmap", (200, 50)),
        ("compare-80x24", "compare a.zip b.zip", (80, 24)),
        ("timing-120x40", "timing", (120, 40)),
    ],
)
def test_screens_over_the_main_one(
    name: str, line: str, size: tuple[int, int], snapshot: Callable[[str, Any], None]
):
    async def script(ui: Driver) -> None:
        await ui.do("until L2/attn/core", line)
        await ui.until(lambda: ui.app.screen is not ui.main)
        await ui.still()
        snapshot(name, ui.app)

    drive(script, size=size)


def test_values_and_an_over_limit_op(snapshot: Callable[[str, Any], None]):
    async def script(ui: Driver) -> None:
        await ui.do("shadow on", "until L2/attn/core", "print o[0,:8]")
        await ui.still()
        snapshot("values-200x60", ui.app)

    drive(script, size=(200, 60), prepare=alarms)
