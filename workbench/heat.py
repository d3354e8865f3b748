"""The error of the held op as a picture: what `heatmap` asks for, and its answer"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error, did_you_mean
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.error_map import Area, error_map
from dsv4_bench.probes.metrics import rows_of
from dsv4_bench.workbench.debugger import Debugger
from dsv4_bench.workbench.records import Held

_FIELDS = {"rows": r"(\d+):(\d+)", "columns": r"(\d+):(\d+)", "cells": r"(\d+)x(\d+)"}
_CELLS = (16, 64)
USAGE = "heatmap [OUTPUT] [rows=A:B] [columns=A:B] [cells=HxW]"


@dataclass(frozen=True)
class Request:
    """Which output (None: the worst), which part of it, in how many cells."""

    output: str | None = None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    cells: tuple[int, int] = _CELLS


def parse_request(text: str) -> Request:
    """Parse ``y rows=0:64 columns=0:512 cells=20x90``. Raises DSV4Error with the usage."""
    output: str | None = None
    pairs: dict[str, tuple[int, int]] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals and output is None:
            output = word
            continue
        match = re.fullmatch(_FIELDS.get(name, "(?!)"), value)
        if match is None or name in pairs:
            raise DSV4Error(f"heatmap: cannot read {word!r}", f"usage: {USAGE}")
        pairs[name] = (int(match[1]), int(match[2]))
    return Request(output, **pairs)  # type: ignore[arg-type]


def heat_view(debugger: Debugger, text: str) -> dict[str, Any]:
    """The answer to `heatmap TEXT`: an ErrorMap with what was compared. Raises DSV4Error."""
    request, held = parse_request(text), debugger.held
    if held is None or not held.call.outputs:
        raise DSV4Error("no op is held", "`step` to one first")
    record = debugger.records[held.call.site.path]
    worst = record.own_error.output if record.own_error else None
    name = request.output or worst or next(iter(held.call.outputs))
    if name not in held.call.outputs:
        hint = did_you_mean(name, held.call.outputs)
        raise DSV4Error(f"{held.call.site.path} has no output {name!r}", hint)
    route = held.call.site.stamp.implementation
    against, others = _others(debugger, held)
    ours, theirs = held.call.outputs[name], others[name]
    if route == "reference" and against != "float64":
        ours, theirs, route, against = theirs, ours, against, route
    found = error_map(ours, theirs, *request.cells, area_of(theirs, request))
    return {
        **found.to_dict(),
        "site": held.call.site.path,
        "output": name,
        "outputs": list(others),
        "route": route,
        "against": against,
    }


def _others(debugger: Debugger, held: Held) -> tuple[str, dict[str, Tensor]]:
    """What the held op's outputs are compared with; float64 where there is no other implementation."""
    other = debugger.shadow.other(held.call.site)
    name = other.name if other else "float64"
    if name not in held.others:
        if other is None:
            held.others[name] = Captured(held.call.site, held.args, held.call.before).oracle()
        else:
            held.others[name] = debugger.shadow.rerun(held.call, held.args, other)[1]
    return name, held.others[name]


def area_of(tensor: Tensor, request: Request) -> Area | None:
    """The part of an output that is asked for; None for all of it."""
    if tensor.numel() == 0 or not (request.rows or request.columns):
        return None
    rows, columns = rows_of(tensor).shape if tensor.dim() else (1, 1)
    return Area(*(request.rows or (0, rows)), *(request.columns or (0, columns)))
