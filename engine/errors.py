"""The one error class users see, and the exit codes it carries."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `dsv4-bench`; scripts depend on them."""

    OK = 0
    FOUND = 1  # the check ran and found something
    USAGE = 2
    CANNOT = 3  # cannot answer here: no GPU, no nsys, not covered
    BAD_INPUT = 4  # bad checkpoint or bundle
    CRASHED = 5  # the engine died
    INTERRUPTED = 130


class DSV4Error(Exception):
    """An error with a message that holds the values, a hint, and an exit code."""

    def __init__(self, message: str, hint: str = "", exit_code: int = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = int(exit_code)

    def to_dict(self) -> dict[str, object]:
        return {"message": self.message, "hint": self.hint, "exit_code": self.exit_code}


class BadCheckpoint(DSV4Error):
    """The checkpoint cannot be used; the message names file, tensor and values."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.BAD_INPUT)


class CannotAnswer(DSV4Error):
    """The request is fine, this machine or build cannot serve it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.CANNOT)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A hint such as ``did you mean 'cpu'?``, or the candidates when none is close."""
    names = list(dict.fromkeys(candidates))
    close = get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(names[:12])
    return f"known: {shown}{', ...' if len(names) > 12 else ''}"
