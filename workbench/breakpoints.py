"""Breakpoints: a site glob, a condition on a reading, or both.

*/attn/core                      stop after that op
nan > 0                          stop wherever a reading called `nan` is above 0
L3/* own_error > limit           both; `limit` is the reading's own limit
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from dsv4_bench.engine.errors import DSV4Error, did_you_mean
from dsv4_bench.engine.registry import matches
from dsv4_bench.probes.readings import Reading

_OPERATORS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(
    r"^(?:(?P<glob>(?!if\s)\S+)\s+)?(?:if\s+)?(?P<name>[a-z_]\w*)\s*(?P<op>>=|<=|==|!=|>|<)\s*(?P<value>\S+)$"
)


@dataclass
class Breakpoint:
    """`name`, `op` and `value` are empty for a plain site breakpoint; `value` may be ``limit``."""

    number: int
    text: str
    pattern: str
    name: str = ""
    op: str = ""
    value: float | str = 0.0
    hits: int = 0

    def hit(self, path: str, readings: Iterable[Reading]) -> str | None:
        """Why this op stops the run, or None."""
        if not matches(path, self.pattern):
            return None
        if not self.name:
            return f"breakpoint {self.number}: {self.text}"
        for reading in readings:
            if reading.name == self.name and self._holds(reading):
                found = f"{reading.name} = {reading.value:.4g}"
                where = f"; {reading.detail}" if reading.detail else ""
                return f"breakpoint {self.number}: {self.text} ({found}{where})"
        return None

    def _holds(self, reading: Reading) -> bool:
        bound = reading.limit if self.value == "limit" else self.value
        if bound is None or not isinstance(reading.value, (int, float)):
            return False
        if reading.value != reading.value:  # a NaN reading never passes silently
            return True
        return bool(_OPERATORS[self.op](reading.value, bound))

    def to_dict(self) -> dict[str, Any]:
        return {"number": self.number, "text": self.text, "hits": self.hits}

    def again(self, number: int, hits: int) -> Breakpoint:
        """The same breakpoint with the number and the hits it had before a restart."""
        return replace(self, number=number, hits=hits)


def parse_breakpoint(number: int, text: str, known: Iterable[str]) -> Breakpoint:
    """Parse ``[SITE_GLOB] [READING OP VALUE]``. Raises DSV4Error; `known` are the reading names."""
    text = text.strip()
    match = _CONDITION.match(text)
    if match is None:
        if re.search(r"[<>=!]", text) or " " in text:
            raise DSV4Error(
                f"cannot read breakpoint {text!r}",
                "e.g. `*/core`, `nan > 0`, `L3/* own_error > limit`",
            )
        return Breakpoint(number, text, text)
    name, value = match["name"], match["value"]
    names = list(known)
    if name not in names:
        raise DSV4Error(f"no probe reads {name!r}", did_you_mean(name, names))
    if value != "limit":
        try:
            value = float(value)
        except ValueError:
            raise DSV4Error(
                f"breakpoint {text!r}: {value!r} is not a number", "a number, or `limit`"
            ) from None
    return Breakpoint(number, text, match["glob"] or "*", name, match["op"], value)
