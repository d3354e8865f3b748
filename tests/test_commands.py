"""The table of session commands, and how a line is read."""

from __future__ import annotations

from itertools import chain

import pytest

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.commands import BY_NAME, SESSION_COMMANDS, parse


@pytest.mark.parametrize(
    ("line", "name", "arguments"),
    [
        ("step", "step", {}),
        ("  s 3 ", "step", {"n": 3}),
        ("goto L12", "goto", {"layer": 12}),
        ("until L3/attn/core", "until", {"site": "L3/attn/core"}),
        ("break */core own_error > limit", "break", {"condition": "*/core own_error > limit"}),
        ("print o[0, 'x  y']", "print", {"expression": "o[0, 'x  y']"}),
        ("readings '*/core' softmax", "readings", {"site": "*/core", "probe": "softmax"}),
        ("route", "route", {}),
        ("save my file.txt", "save", {"file": "my file.txt"}),
    ],
)
def test_parse(line, name, arguments):
    parsed = parse(line)
    assert (parsed.command.name, parsed.arguments, parsed.line) == (name, arguments, line.strip())


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("stepp", "unknown command 'stepp'", "'step'"),
        ("", "unknown command ''", "known: "),
        ("step x", "n must be a number, not 'x'", "usage: step [N]"),
        ("step 0", "0 is less than 1", "usage: step [N]"),
        ("step L3", "n must be a number", "usage: step [N]"),
        ("goto", "layer is missing", "usage: goto LAYER"),
        ("goto 1.5", "must be a number", "usage: goto LAYER"),
        ("step 1 2", "too many arguments: '2'", "usage: step [N]"),
        ("print", "nothing given", "usage: print EXPRESSION"),
        ("until 'L3", "No closing quotation", "usage: until SITE"),
    ],
)
def test_refused(line, message, hint):
    with pytest.raises(DSV4Error) as error:
        parse(line)
    assert message in error.value.message and hint in error.value.hint


def test_names_and_keys_are_unique():
    assert len(BY_NAME) == len(SESSION_COMMANDS)
    keys = list(chain.from_iterable(command.keys for command in SESSION_COMMANDS))
    assert len(keys) == len(set(keys))


def test_every_command_is_implemented():
    from dsv4_bench.workbench.engine_commands import EngineCommands
    from dsv4_bench.workbench.session import Session

    for command in SESSION_COMMANDS:
        owner = Session if command.where == "client" else EngineCommands
        method = getattr(owner, f"do_{command.name}")
        taken = method.__code__.co_varnames[1 : method.__code__.co_argcount]
        assert taken == tuple(argument.name for argument in command.arguments), command.name
