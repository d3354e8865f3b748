"""What a debugger is asked: the plan of a session, commands, and the ways out of a forward pass"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4_bench.engine.generate import split


class Rewind(Exception):
    """Leave the forward pass; it starts again at `layer`'s snapshot.

    -1 is embed, the number of layers is the head.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer


class Restart(Exception):
    """Leave the forward pass and begin again at the first token."""


class Paused(Exception):
    """A reference run was paused before it had caught up; the text says where."""


class Quit(BaseException):
    """Leave the forward pass for good."""


@dataclass(frozen=True)
class Plan:
    """What a session feeds: prompt ids in chunks, then greedy tokens.

    `chunks` are piece sizes, the last one repeats; empty means one prefill.
    """

    tokens: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    max_new_tokens: int = 0

    def spans(self) -> list[tuple[int, int]]:
        """The token range [start, stop) of every forward pass; generated tokens go one by one."""
        count = len(self.tokens)
        new = range(count, count + self.max_new_tokens - 1)
        return split(count, self.chunks) + [(position, position + 1) for position in new]


@dataclass
class Request:
    """One command from the client."""

    id: int
    name: str
    arguments: dict[str, Any]
