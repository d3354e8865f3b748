"""Where a run shall stop: one small class per way of moving, judged after every op.

`order` is the schedule of the present forward pass, `index` the op that has just run.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_bench.engine.registry import matches


def group_of(path: str) -> str:
    """The group a site is in: ``L3/attn`` for ``L3/attn/core``, empty at the top."""
    return path.rpartition("/")[0]


def layer_of(path: str) -> str:
    """``L3`` for ``L3/attn/core``; the first part of the path for the rest (embed, head)."""
    return path.partition("/")[0]


def level_of(order: list[str], index: int) -> str:
    """The group in which `next` moves on from op `index` (-1: nothing has run).

    It is the op's own, or where that group ends here, the one around it that goes on: after the
    compressor's last op, its attention sublayer. From one sublayer to the next it is the next one's.
    """
    if not 0 <= index < len(order) - 1:
        return ""
    group, following = group_of(order[index]), order[index + 1]
    while group and not _inside(following, group):
        group = group_of(group)
    return group if "/" in group else group_of(following)


def _inside(path: str, group: str) -> bool:
    return not group or path.startswith(group + "/")


@dataclass
class Goal:
    """`exact` goals restore a position: no breakpoint may stop them on the way."""

    exact: bool = False

    def reached(self, order: list[str], index: int) -> str | None:
        """Why to stop after op `index` of `order`, or None."""
        return None


@dataclass
class Steps(Goal):
    count: int = 1

    def reached(self, order: list[str], index: int) -> str | None:
        self.count -= 1
        return "step" if self.count <= 0 else None


@dataclass
class Over(Goal):
    """Over `count` units of `group`: an op of it, or the whole of a group below it.

    Leaving the group, or the forward pass, ends it early.
    """

    group: str = ""
    count: int = 1

    def reached(self, order: list[str], index: int) -> str | None:
        if index + 1 >= len(order) or not _inside(order[index], self.group):
            return "step"
        if self._unit(order[index]) == self._unit(order[index + 1]):
            return None
        self.count -= 1
        return "step" if self.count <= 0 else None

    def _unit(self, path: str) -> str:
        rest = path.removeprefix(self.group + "/") if self.group else path
        head, slash, _ = rest.partition("/")
        return head if slash else rest  # an op is a unit of its own


@dataclass
class EndOfGroup(Goal):
    group: str = ""

    def reached(self, order: list[str], index: int) -> str | None:
        left = index + 1 >= len(order) or not _inside(order[index + 1], self.group)
        return f"end of {self.group or 'the forward pass'}" if left else None


@dataclass
class Layers(Goal):
    """To the end of a layer; embed belongs to the first one, the head is one of its own."""

    count: int = 1

    def reached(self, order: list[str], index: int) -> str | None:
        here = layer_of(order[index])
        if index == 0 or (index + 1 < len(order) and layer_of(order[index + 1]) == here):
            return None
        self.count -= 1
        return f"end of {here}" if self.count <= 0 else None


@dataclass
class Until(Goal):
    pattern: str = ""

    def reached(self, order: list[str], index: int) -> str | None:
        return f"until {self.pattern}" if matches(order[index], self.pattern) else None


@dataclass
class Index(Goal):
    """To op `index` of this forward pass."""

    index: int = 0
    why: str = "back"

    def reached(self, order: list[str], index: int) -> str | None:
        return self.why if index >= self.index else None


class Run(Goal):
    """Until a breakpoint or the end."""


class Anomaly(Goal):
    """Until an op raises an alarm; the debugger knows which do."""
