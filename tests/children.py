"""Processes with a time limit that leave nothing behind: each ends with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

_running: set[int] = set()
_lock = threading.Lock()


def ended(command: list[str], log: Path, seconds: float, cwd: Path | None = None) -> int | None:
    """Exit status of `command`, whose output goes to `log`; None if it was stopped after `seconds`.

    A process group of its own: what a tool has launched would go on, and hold the GPU, without it.
    """
    with log.open("w") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True
        )
        with _lock:
            _running.add(child.pid)
        try:
            return child.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with _lock:
                _running.discard(child.pid)
            _kill(child.pid)
            child.wait()


def end_with_this_process() -> None:
    """From now on SIGINT and SIGTERM end all children first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for group in list(_running):
        _kill(group)
    sys.stdout.flush()
    os._exit(128 + number)


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
