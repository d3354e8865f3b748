"""A worker process as its client has it: started, written to, read from, ended."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.protocol import decode, encode

_CLOSE_SECONDS = 0.7  # how long a worker may take to end by itself
_LAST_LINES = 50


class WorkerProcess:
    """One worker, here or behind `connect`, a shell command such as ``ssh box dsv4-bench worker``.

    `on_message` gets the protocol's messages and `on_noise` any other output, `on_end` is called once
    with the exit code (negative: the signal) if the worker ends without `stop`; all of them from
    threads of this object. Raises DSV4Error if nothing can be started.
    """

    def __init__(
        self,
        connect: str | None,
        on_message: Callable[[dict[str, Any]], None],
        on_noise: Callable[[str, str], None],
        on_end: Callable[[WorkerProcess, int], None],
    ) -> None:
        self._on_message, self._on_noise, self._on_end = on_message, on_noise, on_end
        self._stopping = False
        self._write_lock = threading.Lock()
        self.stderr: deque[str] = deque(maxlen=_LAST_LINES)
        self._process = subprocess.Popen(
            self._command(connect),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
        )
        self._errors = threading.Thread(target=self._read_stderr, daemon=True)
        self._errors.start()
        self._reader = threading.Thread(target=self._read, daemon=True)

    @staticmethod
    def _command(connect: str | None) -> list[str]:
        if connect is None:
            return [sys.executable, "-m", "dsv4_bench.workbench", "worker"]
        try:
            command = shlex.split(connect)
        except ValueError as error:
            raise DSV4Error(f"--connect {connect!r}: {error}") from None
        if not command:
            raise DSV4Error("--connect: the command is empty", 'e.g. "ssh box dsv4-bench worker"')
        return command

    @property
    def pid(self) -> int:
        return self._process.pid

    def start_reading(self) -> None:
        self._reader.start()

    def write(self, message: dict[str, Any]) -> None:
        """Send one message; if the worker is gone, `on_end` is what says so."""
        assert self._process.stdin is not None
        try:
            with self._write_lock:
                self._process.stdin.write(encode(message))
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass

    def stop(self, keep_folder: bool = False) -> None:
        """End the worker within a second, whatever it is doing; it removes its folder if it can."""
        self._stopping = True
        if keep_folder:
            self.write({"end": "keep"})
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()  # its reader thread ends it, even while an op hangs
        except OSError:
            pass
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        self._kill_group()
        self._process.wait()
        for thread in (self._reader, self._errors):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(_CLOSE_SECONDS)

    def _kill_group(self) -> None:
        """The worker, if it still runs, and the compilers it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()

    # -- threads

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                try:
                    message = decode(line)
                except ValueError:
                    self._on_noise("worker", line.decode(errors="replace"))
                else:
                    self._on_message(message)
        code = self._process.wait()
        self._errors.join(_CLOSE_SECONDS)  # its last words
        if not self._stopping:
            self._on_end(self, code)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                text = line.decode(errors="replace")
                self.stderr.append(text.rstrip("\n"))
                self._on_noise("stderr", text)
