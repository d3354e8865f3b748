"""Breakpoints: how they are read, and what they hit."""

from __future__ import annotations

import pytest

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.readings import Reading
from dsv4_bench.workbench.breakpoints import parse_breakpoint

KNOWN = ["nan", "abs_max", "own_error"]
SITE = "L3/attn/core"


def reading(name, value, limit=None, detail=""):
    return Reading(SITE, "p", name, value, limit=limit, detail=detail)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("*/core", ("*/core", "", "", 0.0)),
        ("nan > 0", ("*", "nan", ">", 0.0)),
        ("nan>0", ("*", "nan", ">", 0.0)),
        ("if nan > 0", ("*", "nan", ">", 0.0)),
        ("L3/* own_error > limit", ("L3/*", "own_error", ">", "limit")),
        ("L3/* if abs_max >= 1e4", ("L3/*", "abs_max", ">=", 1e4)),
        ("  */core  ", ("*/core", "", "", 0.0)),
    ],
)
def test_parse(text, parts):
    point = parse_breakpoint(4, text, KNOWN)
    assert (point.pattern, point.name, point.op, point.value) == parts
    assert point.to_dict() == {"number": 4, "text": text.strip(), "hits": 0}


@pytest.mark.parametrize(
    "text", ["nan >", "> 0", "a b", "nam > 0", "nan > zero", "nan = 0", "x y z > 1"]
)
def test_refused(text):
    with pytest.raises(DSV4Error) as error:
        parse_breakpoint(1, text, KNOWN)
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "found", "hits"),
    [
        ("*/core", [], True),
        ("*/gate", [], False),
        ("L3", [], True),
        ("nan > 0", [reading("nan", 3)], True),
        ("nan > 0", [reading("nan", 0)], False),
        ("nan > 0", [reading("inf", 3)], False),
        ("L4 nan > 0", [reading("nan", 3)], False),
        ("nan == 3", [reading("nan", 3)], True),
        ("nan != 3", [reading("nan", 3)], False),
        ("abs_max < 2", [reading("abs_max", 5.0), reading("abs_max", 1.0)], True),
        ("abs_max > 1", [reading("abs_max", float("nan"))], True),
        ("abs_max > 1", [reading("abs_max", [5.0, 6.0])], False),
        ("own_error > limit", [reading("own_error", 2.0, limit=1.0)], True),
        ("own_error > limit", [reading("own_error", 0.5, limit=1.0)], False),
        ("own_error > limit", [reading("own_error", 2.0)], False),
        ("own_error > limit", [reading("own_error", float("inf"), limit=1.0)], True),
    ],
)
def test_hit(text, found, hits):
    why = parse_breakpoint(1, text, KNOWN).hit(SITE, found)
    assert (why is not None) == hits
    assert why is None or why.startswith(f"breakpoint 1: {text}")


def test_why_holds_the_numbers():
    point = parse_breakpoint(2, "own_error > limit", KNOWN)
    why = point.hit(SITE, [reading("own_error", 0.01234567, 1e-3, "o[0, 3]: 1.25, reference 1.26")])
    assert why == (
        "breakpoint 2: own_error > limit (own_error = 0.01235; o[0, 3]: 1.25, reference 1.26)"
    )


def test_again_keeps_number_and_hits():
    assert parse_breakpoint(1, "*/core", KNOWN).again(5, 3).to_dict()["hits"] == 3
