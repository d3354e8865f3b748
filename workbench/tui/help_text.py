"""The help screen's text, generated from the table of commands and the UI's own keys. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from dsv4_bench.workbench.commands import SESSION_COMMANDS
from dsv4_bench.workbench.tui.format import KINDS, MARKS
from dsv4_bench.workbench.tui.keys import UI_KEYS, key_text
from dsv4_bench.workbench.tui.spans import ACCENT, BOLD, DIM, PLAIN, TITLE, Line

ABOUT = (
    "Every key sends a line, the same one you can type after : or put in a script file.",
    "The session stops after an op and holds its inputs and outputs.",
    "The keys b, t, k and H act on the op selected in the tree.",
)
FIXED_KEYS = (
    ("tab", "next pane; shift+tab the one before"),
    ("ctrl+p", "palette: every command and every site"),
    ("del", "in the breakpoint list: delete the selected one"),
    ("ctrl+q", "quit from anywhere"),
)


def help_lines(width: int) -> list[Line]:
    lines: list[Line] = [[(text, PLAIN)] for text in ABOUT]
    for group in dict.fromkeys(command.group for command in SESSION_COMMANDS):
        rows = [
            (" ".join(key_text(key) for key in command.keys), command.usage, command.help)
            for command in SESSION_COMMANDS
            if command.group == group
        ]
        lines += _section(group, rows, width)
    ui = [(" ".join(key_text(k) for k in keys.split(",")), text) for keys, _, text in UI_KEYS]
    lines += [[], [("Screen", TITLE)]]
    for key, text in (*ui, *FIXED_KEYS):
        lines.append([(f"  {key:<9}", ACCENT), (text, PLAIN)])
    lines += _legend("Signs in the tree", MARKS)
    return lines + _legend("Attention kind of a layer", KINDS)


def _section(title: str, rows: list[tuple[str, str, str]], width: int) -> list[Line]:
    lines: list[Line] = [[], [(title, TITLE)]]
    for keys, usage, text in rows:
        line: Line = [(f"  {keys:<9}", ACCENT), (f"{usage:<18} ", BOLD)]
        if width >= 11 + max(19, len(usage) + 1) + len(text):
            lines.append([*line, (text, PLAIN)])
        else:
            lines += [line, [(" " * 11 + text, DIM)]]
    return lines


def _legend(title: str, entries: Iterable[tuple[str, str]]) -> list[Line]:
    lines: list[Line] = [[], [(title, TITLE)]]
    return lines + [[(f"  {sign:<9}", ACCENT), (text, PLAIN)] for sign, text in entries]
