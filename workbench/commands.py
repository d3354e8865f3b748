"""Every command in one table: CLI sub-commands, session commands, palette entries, keys and help.

A *session command* is a line of text, such as ``step 3`` or ``break */core own_error > limit``. The
same line is what a key press sends, what the palette offers, what a script file holds and what the
session logs. To add one: a row here, and a method `do_<name>` in engine_commands.py (where="worker")
or in session.py (where="client").
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from dsv4_bench.engine.errors import DSV4Error, did_you_mean


@dataclass(frozen=True)
class Argument:
    """`kind`: int, site, word, rest (the rest of the line, as written)."""

    name: str
    kind: str = "word"
    optional: bool = False


@dataclass(frozen=True)
class SessionCommand:
    """One row; `runs` marks commands that let the engine run until the next stop, `long` those that
    keep it busy where it stands. `pause` ends both.
    """

    name: str
    help: str
    arguments: tuple[Argument, ...] = ()
    keys: tuple[str, ...] = ()
    where: str = "worker"
    runs: bool = False
    logged: bool = True
    long: bool = False
    group: str = "Look"

    @property
    def usage(self) -> str:
        parts = [f"[{a.name.upper()}]" if a.optional else a.name.upper() for a in self.arguments]
        return " ".join([self.name, *parts])


def _n(name: str = "n") -> tuple[Argument, ...]:
    return (Argument(name, "int", optional=True),)


_SITE = Argument("site", "site", optional=True)
_REST = Argument("expression", "rest")

SESSION_COMMANDS: tuple[SessionCommand, ...] = (
    # -- move
    SessionCommand(
        "step", "run the next op (n of them)", _n(), ("s", "f11"), runs=True, group="Move"
    ),
    SessionCommand(
        "next",
        "next op on this level: runs over a deeper group",
        _n(),
        ("n", "f10"),
        runs=True,
        group="Move",
    ),
    SessionCommand("finish", "run to the end of this group", (), ("f",), runs=True, group="Move"),
    SessionCommand(
        "layer", "run to the end of this layer (n layers)", _n(), ("l",), runs=True, group="Move"
    ),
    SessionCommand(
        "continue", "run until a breakpoint or the end", (), ("c", "f5"), runs=True, group="Move"
    ),
    SessionCommand(
        "anomaly",
        "run until an op has NaN or Inf, an own error over its limit, or breaks a promise",
        (),
        ("a",),
        runs=True,
        group="Move",
    ),
    SessionCommand(
        "until",
        "run until a site (glob) has run",
        (Argument("site", "site"),),
        ("t",),
        runs=True,
        group="Move",
    ),
    SessionCommand("back", "go back n ops within the layer", _n(), ("N",), runs=True, group="Move"),
    SessionCommand(
        "rerun",
        "re-run this layer from its snapshot up to here",
        (),
        ("r",),
        runs=True,
        group="Move",
    ),
    SessionCommand(
        "goto",
        "go to the end of a layer, forward or back",
        (Argument("layer", "int"),),
        ("g",),
        runs=True,
        group="Move",
    ),
    SessionCommand(
        "reset", "start over: empty cache, first token", (), (), runs=True, group="Move"
    ),
    SessionCommand("pause", "stop at the next op", (), ("space",), logged=False, group="Move"),
    # -- change
    SessionCommand(
        "route",
        "switch implementations: SITE_GLOB=IMPL or IMPL",
        (Argument("entry", "rest", True),),
        (),
        group="Change",
    ),
    SessionCommand(
        "faults",
        "known bugs to switch on by route: [NAME, GLOB or FAMILY ...]",
        (Argument("names", "rest", True),),
        (),
        logged=False,
        group="Change",
    ),
    SessionCommand(
        "toggle",
        "switch this site (or glob) between reference and kernel",
        (_SITE,),
        ("k",),
        group="Change",
    ),
    SessionCommand(
        "reload",
        "take up saved changes of this op's code, and run it again on its inputs",
        logged=False,
        group="Change",
    ),
    SessionCommand(
        "sources",
        "the files that this op's implementation is made of",
        (_SITE,),
        (),
        logged=False,
    ),
    SessionCommand(
        "shadow",
        "run the other route on the same inputs: on, off, or a glob",
        (Argument("what", "word", True),),
        ("x",),
        group="Change",
    ),
    SessionCommand(
        "carried",
        "run the whole reference beside this run, show how far errors have spread: on, off",
        (Argument("what", "word", True),),
        ("X",),
        long=True,
        group="Change",
    ),
    SessionCommand(
        "probes",
        "choose probes: all, none, or names",
        (Argument("names", "rest", True),),
        (),
        group="Change",
    ),
    SessionCommand(
        "restart",
        "start a new worker at the last layer snapshot",
        (),
        ("R",),
        where="client",
        group="Change",
    ),
    # -- breakpoints
    SessionCommand(
        "break",
        "stop at SITE_GLOB, at a reading (nan > 0), or at both",
        (Argument("condition", "rest", True),),
        ("b",),
        group="Break",
    ),
    SessionCommand("breaks", "list breakpoints", (), ("B",), group="Break"),
    SessionCommand(
        "delete", "delete breakpoint n", (Argument("number", "int"),), (), group="Break"
    ),
    # -- look
    SessionCommand("status", "where we are", (), (), logged=False),
    SessionCommand(
        "op",
        "inputs, outputs, statistics, route, error and time of an op",
        (_SITE,),
        (),
        logged=False,
    ),
    SessionCommand(
        "heatmap",
        "the error over rows and columns: [OUTPUT] [rows=A:B] [columns=A:B] [cells=HxW]",
        (Argument("request", "rest", True),),
        ("h",),
        logged=False,
    ),
    SessionCommand("sites", "every site with state, route, time and error", (), (), logged=False),
    SessionCommand(
        "readings",
        "what the probes read: [SITE_GLOB] [PROBE]",
        (_SITE, Argument("probe", "word", True)),
        (),
    ),
    SessionCommand(
        "honesty",
        "run the prompt with and without the probes: coverage, slow-down, changed bits",
        (),
        (),
    ),
    SessionCommand("print", "values: print o[0,:8]", (_REST,), ("p",)),
    SessionCommand(
        "eval", "a torch expression over the current inputs and outputs", (_REST,), ("e",)
    ),
    SessionCommand(
        "watch",
        "evaluate an expression at every stop; no argument lists",
        (Argument("expression", "rest", True),),
        ("w",),
    ),
    SessionCommand(
        "bundle",
        "write this layer's ops, or those under SITES, to OUT or OUT.zip for a bug report",
        (Argument("out"), Argument("sites", "site", True)),
        ("W",),
        long=True,
    ),
    SessionCommand(
        "timing",
        "time this layer's ops, or those under SITES: reference, kernel, floor and error",
        (_SITE,),
        ("T",),
        logged=False,
        long=True,
    ),
    SessionCommand(
        "history",
        "earlier times of this op (or glob), newest first: profile, timing, watch",
        (_SITE,),
        ("H",),
        logged=False,
    ),
    SessionCommand(
        "ncu",
        "count what this op's kernels do with Nsight Compute, in a process of its own",
        (_SITE,),
        (),
        logged=False,
        long=True,
    ),
    SessionCommand(
        "compare",
        "two bundles of the same run: which ops differ, and where first",
        (Argument("a"), Argument("b")),
        (),
        logged=False,
        long=True,
    ),
    SessionCommand(
        "difference",
        "the map of op N of the comparison: N [OUTPUT] [rows=A:B] [columns=A:B] [cells=HxW]",
        (Argument("request", "rest"),),
        (),
        logged=False,
    ),
    SessionCommand("stamps", "what really ran at each site", (), ()),
    SessionCommand(
        "save",
        "save the session so far as a script",
        (Argument("file", "rest"),),
        ("ctrl+s",),
        where="client",
        logged=False,
    ),
    SessionCommand("quit", "end the session", (), ("q",), where="client", logged=False),
)

BY_NAME = {command.name: command for command in SESSION_COMMANDS}
_ALIASES = {"s": "step", "n": "next", "c": "continue", "b": "break", "p": "print", "e": "eval"}


@dataclass(frozen=True)
class Parsed:
    """A command line, understood."""

    command: SessionCommand
    arguments: dict[str, str | int]
    line: str


def parse(line: str) -> Parsed:
    """Parse one session command. Raises DSV4Error with the usage or a near name."""
    text = line.strip()
    name, _, rest = text.partition(" ")
    name = _ALIASES.get(name, name)
    command = BY_NAME.get(name)
    if command is None:
        raise DSV4Error(f"unknown command {name!r}", did_you_mean(name, BY_NAME))
    return Parsed(command, _arguments(command, rest.strip()), text)


def _arguments(command: SessionCommand, rest: str) -> dict[str, str | int]:
    values: dict[str, str | int] = {}
    if command.arguments and command.arguments[0].kind == "rest":
        if not rest and not command.arguments[0].optional:
            raise DSV4Error(f"{command.name}: nothing given", f"usage: {command.usage}")
        return {command.arguments[0].name: rest} if rest else {}
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise DSV4Error(f"{command.name}: {error}", f"usage: {command.usage}") from None
    if len(words) > len(command.arguments):
        extra = words[len(command.arguments)]
        raise DSV4Error(f"{command.name}: too many arguments: {extra!r}", f"usage: {command.usage}")
    for index, argument in enumerate(command.arguments):
        if index >= len(words):
            if not argument.optional:
                raise DSV4Error(
                    f"{command.name}: {argument.name} is missing", f"usage: {command.usage}"
                )
            break
        values[argument.name] = _value(command, argument, words[index])
    return values


def _value(command: SessionCommand, argument: Argument, word: str) -> str | int:
    if argument.kind != "int":
        return word
    try:
        number = int(word.removeprefix("L") if argument.name == "layer" else word)
    except ValueError:
        raise DSV4Error(
            f"{command.name}: {argument.name} must be a number, not {word!r}",
            f"usage: {command.usage}",
        ) from None
    if argument.name == "n" and number < 1:
        raise DSV4Error(f"{command.name}: {number} is less than 1", f"usage: {command.usage}")
    return number
