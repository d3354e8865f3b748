"""Symptoms: how `check --minimise` tells a broken output from a right one"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from dsv4_bench.workbench.checking.calibration import Calibration, LogitsError


class Symptom(Protocol):
    """A test of a run's logits [n, v], which come with their distance from the reference's."""

    settles_ties: bool  # whether near ties are to be decided as the reference decides them

    def describe(self) -> str: ...
    def shows(self, logits: Tensor, error: LogitsError) -> bool: ...


@dataclass(frozen=True)
class LogitsOff:
    """The logits are further from the reference's than honest kernels bring them."""

    limits: Calibration
    settles_ties = True

    def describe(self) -> str:
        return f"logits off by more than {self.limits.error:.1e} (a position: {self.limits.row_error:.1e})"

    def shows(self, logits: Tensor, error: LogitsError) -> bool:
        return not error.within(self.limits)


@dataclass(frozen=True)
class Top1Changed:
    """The most likely token of some position is another one, by more than honest kernels move logits."""

    settles_ties = True

    def describe(self) -> str:
        return "another most likely token"

    def shows(self, logits: Tensor, error: LogitsError) -> bool:
        return error.top1 > 0 or error.masks > 0


@dataclass(frozen=True)
class Says:
    """What the model says greedily, beginning with the row `first`: the ids `text`, or not.

    The logits come from feeding the prompt and the text. Greedy decoding says the text exactly when
    each of its tokens is the most likely one after those before it.
    """

    ids: tuple[int, ...]
    first: int
    text: str
    wanted: bool  # True: broken is what does not say it; False: broken is what says it
    settles_ties = False

    def describe(self) -> str:
        return f"the answer is {'not ' if self.wanted else ''}{self.text!r}"

    def shows(self, logits: Tensor, error: LogitsError) -> bool:
        rows = logits[self.first : self.first + len(self.ids)]
        said: Sequence[int] = rows.argmax(-1).tolist()
        return (tuple(said) == self.ids and not bool(rows.isnan().any())) != self.wanted


@dataclass(frozen=True)
class Outcome:
    """One trial: whether the symptom showed, how far the logits were off, and what a kernel raised."""

    broken: bool
    error: LogitsError
    seconds: float
    raised: str = ""

    @property
    def text(self) -> str:
        """What happened, in a few words."""
        if self.raised:
            return f"raises {self.raised}"
        text = f"logits off by {self.error.error:.2g}, {self.error.top1} top-1 tokens changed"
        return text + (f", {self.error.masks} positions not finite" if self.error.masks else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "broken": self.broken,
            **asdict(self.error),
            "seconds": self.seconds,
            "raised": self.raised,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        error = LogitsError(
            float(data["error"]), float(data["row_error"]), int(data["masks"]), int(data["top1"])
        )
        return cls(bool(data["broken"]), error, float(data["seconds"]), str(data["raised"]))
