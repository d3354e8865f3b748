"""Progress of long work on stderr, with the time it will still take"""

from __future__ import annotations

import sys
import time
from typing import TextIO

QUIET_SECONDS = 5.0  # between two lines where stderr is no terminal


class Progress:
    """Call it with a text, how much is done and how much there is, in any unit.

    On a terminal one line is written again and again; elsewhere a line at most every QUIET_SECONDS. Work
    that begins anew (less is done than before) has its own clock.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self._began = self._written = time.monotonic()
        self._done = 0.0
        self._open = False

    def __call__(self, text: str, done: float, total: float) -> None:
        now = time.monotonic()
        if done < self._done:
            self._began = now
        self._done = done
        line = text + self._left(now - self._began, done, total)
        if self.terminal:
            self._open = done < total
            end = "" if self._open else "\n"
            print(f"\r{line[:100]}\033[K", end=end, file=self.stream, flush=True)
        elif now - self._written >= QUIET_SECONDS and done < total:
            self._written = now
            print(line, file=self.stream, flush=True)

    def _left(self, elapsed: float, done: float, total: float) -> str:
        if done <= 0 or elapsed < 1 or done >= total:
            return ""
        return f", about {time_text(elapsed * (total - done) / done)} left"

    def close(self) -> None:
        """End a line that is still open, before something else is written."""
        if self._open:
            self._open = False
            print(file=self.stream, flush=True)


def time_text(seconds: float) -> str:
    """``3 s``, ``2 min``, ``1.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
