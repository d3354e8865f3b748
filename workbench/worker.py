"""The worker process: owns the engine, speaks the protocol, survives nothing by design.

The main thread is the engine's. A reader thread takes commands from stdin; `pause` acts at once,
everything else waits for the engine's next stop. File descriptors 1 and 2 go to a file in the
session's folder, so that compilers and kernels cannot garble the protocol, and their last words
are still there when the process is not; a third thread turns them into log events.
"""

from __future__ import annotations

import codecs
import ctypes
import faulthandler
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, ExitCode
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.protocol import MAX_LINE, check_open, decode, encode

if TYPE_CHECKING:
    from dsv4_bench.workbench.serving import SessionServer

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


def main(plugins: Sequence[str] = ()) -> int:
    """Run the worker on stdin and stdout until its client goes away or says quit.

    `plugins` are files on this machine, loaded before those that the client names.
    """
    source = os.fdopen(os.dup(0), "rb")
    channel = Channel(os.dup(1))
    folder: Path | None = None
    keep = True
    try:
        options = _read_open(source)
        options["plugins"] = [*plugins, *options.get("plugins", [])]
        folder = _session_folder(options.get("resume"))
        channel.send({"event": "started", "pid": os.getpid(), "folder": str(folder)})
        _redirect(folder, channel)
        _serve(options, folder, source, channel)
        keep = False
        return ExitCode.OK
    except (BrokenPipeError, EOFError):
        keep = False
        return ExitCode.OK
    except DSV4Error as error:
        keep = bool(folder and (folder / "position.safetensors").exists())
        channel.send({"event": "fatal", "error": error.to_dict()})
        return error.exit_code
    except KeyboardInterrupt:
        keep = False
        raise
    except BaseException as error:
        internal = DSV4Error(f"{type(error).__name__}: {error}", "", ExitCode.CRASHED)
        channel.send({"event": "fatal", "error": internal.to_dict()})
        raise
    finally:
        if folder is not None and not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _session_folder(resume: str | None) -> Path:
    """A new folder for snapshots and captured output, or the one a worker before this one left."""
    try:
        if resume is None:
            return Path(tempfile.mkdtemp(prefix="dsv4-session-"))
        folder = Path(resume)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise CannotAnswer(
            f"no folder for the session: {error}", "set TMPDIR to a folder that can be written"
        ) from None


def _read_open(source: BinaryIO) -> dict[str, Any]:
    line = _read_line(source)
    if not line:
        raise EOFError
    try:
        options = decode(line)["open"]
    except (ValueError, KeyError):
        raise DSV4Error(
            f'the first line must be {{"open": {{...}}}}, found {line[:80]!r}',
            "this is a protocol for programs; `dsv4-bench tui` is for people",
        ) from None
    return check_open(options)


def _read_line(source: BinaryIO) -> bytes:
    """One line, or as much of it as a message may hold; empty at the end."""
    line = source.readline(MAX_LINE)
    if len(line) == MAX_LINE and not line.endswith(b"\n"):
        while not source.readline(MAX_LINE).endswith(b"\n"):  # it is refused: skip the rest
            if not source.peek(1):  # type: ignore[attr-defined]
                break
    return line


# ------------------------------------------------------------------------------ output capture


def _redirect(folder: Path, channel: Channel) -> None:
    """Send fds 1 and 2 to folder/worker.log, and what arrives there to the client; close fd 0."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    path = folder / "worker.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    start = os.fstat(log).st_size
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=log)  # keeps its own reference: writes even from a signal handler
    threading.Thread(target=_follow, args=(path, start, channel), daemon=True).start()


def _follow(path: Path, start: int, channel: Channel) -> None:
    """Send what is appended to the log file, for as long as the worker lives."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with path.open("rb") as file:
        file.seek(start)
        while True:
            data = file.read(65536)
            if not data:
                time.sleep(_LOG_INTERVAL)
                continue
            text = decoder.decode(data)
            if text:
                _try_send(channel, {"event": "log", "stream": "worker", "text": text})


def _try_send(channel: Channel, message: dict[str, Any]) -> None:
    try:
        channel.send(message)
    except OSError:
        os._exit(ExitCode.OK)  # nobody listens any more


# ------------------------------------------------------------------------------ the session


def _serve(options: dict[str, Any], folder: Path, source: BinaryIO, channel: Channel) -> None:
    from dsv4_bench.workbench.serving import SessionServer  # torch comes in here

    server = SessionServer(folder, channel.send)
    # Reads from the start: a client may go away, or type ahead, while the checkpoint is opened.
    threading.Thread(target=_read_commands, args=(source, server, folder), daemon=True).start()
    server.open(options)
    channel.send(server.hello())
    server.run()


def _read_commands(source: BinaryIO, server: SessionServer, folder: Path) -> None:
    """Take commands until the client ends the session or closes the pipe.

    Then the process ends from here: the engine may be busy for minutes, and nobody would see it.
    """
    while True:
        line = _read_line(source)
        number = -1
        try:
            if not line:
                _end(folder)
            message = decode(line)
            number = int(message.get("id", -1))
            if message.get("end") == "keep":
                _leave()
            parsed = parse(str(message.get("line", "")))
            if parsed.command.name == "quit":
                server.reply(number, {})
                _end(folder)
            server.submit(number, parsed)
        except DSV4Error as error:
            server.reply_error(number, error)
        except BrokenPipeError:
            _end(folder)
        except Exception as error:  # whatever a line holds, the next one may be good
            server.reply_error(number, DSV4Error(f"bad request: {error}", str(line[:80])))


def _end(folder: Path) -> NoReturn:
    shutil.rmtree(folder, ignore_errors=True)
    _leave()


def _leave() -> NoReturn:
    """End the process from any thread, whatever the engine does."""
    if os.environ.get("NVTX_INJECTION64_PATH"):  # a profiler writes what it holds when C code exits
        ctypes.CDLL(None).exit(int(ExitCode.OK))
    os._exit(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
