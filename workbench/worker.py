"""The worker process: owns the engine, speaks the protocol, survives nothing by design.

The main thread is the engine's. A reader thread takes commands from stdin; `pause` acts at once,
everything else waits for the engine's next stop. File descriptors 1 and 2 go to a file in the
session's folder, so that compilers and kernels cannot garble the protocol, and their last words
are still there when the process is not; a third thread turns them into log events.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.protocol import MAX_LINE, SCHEMA_VERSION, decode, encode

_LOG_INTERVAL = 0.05  # seconds between looks at the log file


class Channel:
    """Writes protocol lines; safe from several threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        data = encode(message)
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]


def main() -> int:
    """Run the worker on stdin and stdout until its client goes away or says quit."""
    source = os.fdopen(os.dup(0), "rb", buffering=0)
    channel = Channel(os.dup(1))
    folder: Path | None = None
    keep = False
    try:
        options = _read_open(source)
        resume = options.get("resume")
        folder = Path(resume) if resume else Path(tempfile.mkdtemp(prefix="dsv4-session-"))
        _redirect_output(folder, channel)
        _serve(options, folder, source, channel)
        return ExitCode.OK
    except (BrokenPipeError, EOFError):
        return ExitCode.OK
    except DSV4Error as error:
        channel.send({"event": "fatal", "error": error.to_dict()})
        return error.exit_code
    except BaseException as error:
        keep = True
        faulthandler.dump_traceback()
        internal = DSV4Error(f"{type(error).__name__}: {error}", "", ExitCode.CRASHED)
        channel.send({"event": "fatal", "error": internal.to_dict()})
        raise
    finally:
        if folder is not None and not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _read_open(source: BinaryIO) -> dict[str, Any]:
    line = _read_line(source)
    if not line:
        raise EOFError
    try:
        message = decode(line)
        options = message["open"]
        if not isinstance(options, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise DSV4Error(
            f'the first line must be {{"open": {{...}}}}, found {line[:80]!r}',
            "this is a protocol for programs; `dsv4-bench tui` is for people",
        ) from None
    return options


def _read_line(source: BinaryIO) -> bytes:
    parts, size = [], 0
    while True:
        byte = source.readline(65536)
        parts.append(byte)
        size += len(byte)
        if not byte or byte.endswith(b"\n") or size > MAX_LINE:
            return b"".join(parts)


# ------------------------------------------------------------------------------ output capture


def _redirect_output(folder: Path, channel: Channel) -> None:
    """Send fds 1 and 2 to folder/worker.log, and what arrives there to the client."""
    path = folder / "worker.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    start = os.fstat(log).st_size
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=log)  # keeps its own reference: writes even from a signal handler
    threading.Thread(target=_follow, args=(path, start, channel), daemon=True).start()


def _follow(path: Path, start: int, channel: Channel) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while True:
            text = file.read(65536)
            if text:
                _try_send(
                    channel,
                    {"event": "log", "stream": "worker", "text": text.decode(errors="replace")},
                )
            else:
                time.sleep(_LOG_INTERVAL)


def _try_send(channel: Channel, message: dict[str, Any]) -> None:
    try:
        channel.send(message)
    except OSError:
        os._exit(ExitCode.OK)  # nobody listens any more


# ------------------------------------------------------------------------------ the session


def _serve(options: dict[str, Any], folder: Path, source: BinaryIO, channel: Channel) -> None:
    from dsv4_bench.workbench.serving import SessionServer  # torch comes in here

    server = SessionServer(options, folder, channel.send)
    channel.send(server.hello(SCHEMA_VERSION))
    reader = threading.Thread(target=_read_commands, args=(source, server, folder), daemon=True)
    reader.start()
    server.run()


def _read_commands(source: BinaryIO, server: Any, folder: Path) -> None:
    """Take commands until the client closes the pipe; then the worker has nobody to work for."""
    while True:
        line = _read_line(source)
        if not line:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(ExitCode.OK)  # the engine may be busy for minutes: do not wait for it
        number = -1
        try:
            message = decode(line)
            number = int(message.get("id", -1))
            server.submit(number, parse(str(message.get("line", ""))))
        except DSV4Error as error:
            server.reply_error(number, error)
        except (ValueError, TypeError) as error:
            server.reply_error(number, DSV4Error(f"bad request: {error}", str(line[:80])))


if __name__ == "__main__":
    sys.exit(main())
