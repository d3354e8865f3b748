"""Which key sends which line. Bindings come from the table of session commands."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding

from dsv4_bench.workbench.commands import BY_NAME, SESSION_COMMANDS, SessionCommand
from dsv4_bench.workbench.tui.store import Store

BAR_LABELS = {
    "pause": "Pause",
    "step": "Step",
    "next": "Next",
    "finish": "Finish",
    "continue": "Continue",
    "break": "Break",
    "toggle": "Switch",
}
WHILE_RUNNING = ("pause", "quit", "restart", "save")
WHILE_DEAD = ("restart", "quit", "save")
WHILE_OPENING = ("quit", "restart")

PANES = ("op", "values", "readings", "breaks", "watches")
UI_KEYS: tuple[tuple[str, str, str], ...] = (
    ("colon", "command_line", "type any session command"),
    ("slash", "search", "search the site tree"),
    ("right_square_bracket", "anomaly(1)", "next anomaly"),
    ("left_square_bracket", "anomaly(-1)", "previous anomaly"),
    ("full_stop", "follow", "back to the current site"),
    ("u", "tree_level(-1)", "up: to the enclosing group"),
    ("d", "tree_level(1)", "down: into the group"),
    ("i", "contract", "the op's full contract"),
    ("o", "log", "show or hide the log"),
    ("S", "watch_saves", "watch mode: build and run this op again on every save of its source"),
    ("1", "pane('op')", "pane: op"),
    ("2", "pane('values')", "pane: values"),
    ("3", "pane('readings')", "pane: readings"),
    ("4", "pane('breaks')", "pane: breakpoints"),
    ("5", "pane('watches')", "pane: watches"),
    ("question_mark,f1", "help", "this help"),
)
TYPING = ("command_line", "search")  # these open the line: what is typed next must not overtake
_SHOWN = {"colon": ":", "slash": "/", "right_square_bracket": "]", "left_square_bracket": "["}
_SHOWN |= {"question_mark": "?", "full_stop": "."}


@dataclass(frozen=True)
class Send:
    """Send this line now."""

    line: str


@dataclass(frozen=True)
class Prompt:
    """Open the command line with this text."""

    text: str


def session_bindings() -> list[Binding]:
    bindings = []
    for command in SESSION_COMMANDS:
        if not command.keys:
            continue
        bindings.append(
            Binding(
                ",".join(command.keys),
                f"command('{command.name}')",
                command.help,
                show=False,
                tooltip=command.help,
                priority=prompts(command),
                id=f"command.{command.name}",
            )
        )
    return bindings


def ui_bindings() -> list[Binding]:
    return [
        Binding(
            key,
            action,
            text,
            show=False,
            tooltip=text,
            priority=action in TYPING,
            key_display=key_text(key.split(",")[0]),
            id=f"ui.{action.replace('(', '.').strip(')').replace(chr(39), '')}",
        )
        for key, action, text in UI_KEYS
    ]


def key_text(key: str) -> str:
    """A key as it is written on the keyboard: colon is `:`, f10 is F10."""
    if key in _SHOWN:
        return _SHOWN[key]
    return key.upper() if key[:1] == "f" and key[1:].isdigit() else key


BAR = [
    *(
        (name, key_text(BY_NAME[name].keys[0]), label, f"command('{name}')")
        for name, label in BAR_LABELS.items()
    ),
    ("command_line", ":", "Command", "command_line"),
    ("help", "?", "Help", "help"),
]

_NO_PROMPT = ("heatmap", "timing")
_ON_SITE = (
    "break",
    "shadow",
    "carried",
    "toggle",
    "until",
    "op",
    "history",
    "ncu",
)  # these know what they act on


def action_for(name: str, store: Store, cursor: str | None) -> Send | Prompt:
    """What a key or palette entry of command `name` does: send a line, or ask for the rest of it."""
    command = BY_NAME[name]
    here = cursor or store.current
    if name == "break":
        number = store.break_number(here) if here else None
        if number is not None:
            return Send(f"delete {number}")
        return Send(f"break {here}") if here else Prompt("break ")
    if name == "shadow":
        return Send("shadow off" if store.state.get("shadow", "off") != "off" else "shadow on")
    if name == "carried":
        return Send("carried off" if store.state.get("carried") else "carried on")
    if name in ("toggle", "until", "op", "history", "ncu"):
        return Send(f"{name} {here}") if here else Prompt(f"{name} ")
    return Prompt(f"{name} ") if prompts(command) else Send(name)


def prompts(command: SessionCommand) -> bool:
    """Whether the command's key asks for the rest of the line."""
    if command.name in (*_ON_SITE, *_NO_PROMPT):
        return False
    return any(not a.optional or a.kind != "int" for a in command.arguments)


def allowed(name: str, state: str) -> bool:
    """Whether the session can take command `name` in `state`."""
    if state == "running":
        return name in WHILE_RUNNING
    if state == "dead":
        return name in WHILE_DEAD
    if state == "opening":
        return name in WHILE_OPENING
    return True


def refusal(name: str, state: str) -> tuple[str, str]:
    """Why `name` cannot be sent now, and what to do about it."""
    if state == "running":
        return f"{name}: the engine is running", "space pauses it at the next op"
    if state == "dead":
        return f"{name}: the worker is gone", "R restarts it at the last layer snapshot"
    return f"{name}: the checkpoint is still opening", "wait for ready, or q to quit"
