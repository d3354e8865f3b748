"""Fixtures of the UI tests: a still UI, and snapshots of screens as text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["TEXTUAL_ANIMATIONS"] = "none"
for _name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL", "COLORTERM"):
    os.environ.pop(_name, None)

SNAPSHOTS = Path(__file__).parent / "snapshots"
UPDATE = "DSV4_UPDATE_SNAPSHOTS"


def normalise(svg: str) -> str:
    """An SVG screenshot without what differs between two equal screens."""
    unique = re.search(r"terminal-(\w+?)-", svg)
    return svg.replace(unique[1], "0") if unique else svg


def visible_text(svg: str) -> list[str]:
    """The words of a screenshot, for a readable difference."""
    return [text.replace("&#160;", " ") for text in re.findall(r">([^<>]+)</text>", svg)]


@pytest.fixture
def snapshot() -> Callable[[str, Any], None]:
    """`snapshot(name, app)`: the screen is as in snapshots/NAME.svg.

    DSV4_UPDATE_SNAPSHOTS=1 rewrites the files instead; look at them before you commit them.
    """

    def check(name: str, app: Any) -> None:
        path = SNAPSHOTS / f"{name}.svg"
        found = normalise(app.export_screenshot(title="dsv4-bench"))
        if os.environ.get(UPDATE):
            SNAPSHOTS.mkdir(exist_ok=True)
            path.write_text(found)
            return
        assert path.exists(), f"no snapshot {path.name}; {UPDATE}=1 writes it"
        expected = path.read_text()
        assert visible_text(found) == visible_text(expected)
        assert found == expected, f"{path.name}: same words, other colours or places"

    return check
