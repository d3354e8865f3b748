"""The README's file map names every source file, and every file it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".tcss"}
FOLDERS = ("engine", "csrc", "probes", "workbench", "tests")


def sources() -> set[str]:
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and path.name != "__init__.py":
                found.add(str(path.relative_to(ROOT)))
    return found


def listed() -> set[str]:
    text = (ROOT / "README.md").read_text().partition("## Files")[2]
    named, folder = set(), ""
    for line in text.splitlines():
        heading = re.match(r"^    ([\w/]+/)(?:\s|$)", line)
        entry = re.match(r"^      ([\w./]+)\s{2,}\S", line)
        if heading:
            folder = heading[1]
        elif entry:
            named.add(folder + entry[1])
    return named


def test_the_file_map_is_complete_and_true() -> None:
    assert listed() - sources() == set()
    assert sources() - listed() == set()


def test_the_two_commands_come_first() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.strip()]
    assert lines[1].split()[:2] == ["make", "tui"] and lines[2].split()[:2] == ["make", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ntui:" in makefile and "\ntest:" in makefile


def test_pictures_are_there() -> None:
    for name in re.findall(r"\]\((docs/[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).stat().st_size > 1000
