"""The session, seen from outside: starts a worker, sends it commands, outlives it.

    from dsv4_bench.workbench import Session

    with Session("ckpt/", prompt="The capital of France is") as session:
        session.command("break */core own_error > limit")
        state = session.command("continue")
        print(state["site"], state["why"])

Nothing here imports torch. When the worker dies (a segfault, an abort, a kill), the session says at
which site, and `restart` starts a new one at the last layer snapshot, with the culprit's route set
to the reference.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.commands import Parsed, parse
from dsv4_bench.workbench.protocol import decode, encode

Event = dict[str, Any]
_CLOSE_SECONDS = 0.7  # how long a worker may take to end by itself


@dataclass
class SessionOptions:
    """What to open and how; None leaves the choice to the worker (demo checkpoint, best device)."""

    checkpoint: str | None = None
    prompt: str | None = None
    tokens: list[int] | None = None
    chunks: tuple[int, ...] = ()
    max_new_tokens: int = 8
    route: tuple[str, ...] = ("kernel",)
    dtype: str | None = None
    device: str | None = None
    plugins: tuple[str, ...] = ()
    probes: tuple[str, ...] = ("stats", "residual", "softmax", "hyper", "load", "nonfinite")
    shadow: str = ""
    connect: str | None = None  # a shell command that starts a worker elsewhere, e.g. over ssh


class WorkerDied(DSV4Error):
    """The worker ended in the middle of a command; `event` is the `died` event."""

    def __init__(self, event: Event) -> None:
        super().__init__(event["message"], event["hint"], ExitCode.CRASHED)
        self.event = event


class Session:
    """One session. Keyword arguments are the fields of SessionOptions.

    `command(line)` runs a command and returns its result; `send(line)` returns at once and the reply
    comes as an event. `on_event` is called from the reader thread.
    """

    def __init__(
        self,
        options: SessionOptions | str | Path | None = None,
        on_event: Callable[[Event], None] | None = None,
        **fields: Any,
    ) -> None:
        if not isinstance(options, SessionOptions):
            checkpoint = None if options is None else str(options)
            options = SessionOptions(**{"checkpoint": checkpoint, **fields})
        self.options = options
        self.on_event = on_event or (lambda event: None)
        self.commands: list[str] = []  # what was done, as script lines
        self.hello: Event | None = None
        self.state: Event = {"state": "opening", "site": None}
        self._next_id = 0
        self._changed = threading.Condition()
        self._replies: dict[int, Event] = {}
        self._sent: dict[int, Parsed] = {}
        self._entered: str | None = None
        self._failure: DSV4Error | None = None
        self._closing = False
        self._culprits: list[str] = []
        self._start(resume=None)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- commands

    def command(self, line: str) -> Event:
        """Run one command and wait for its result.

        Raises DSV4Error with the worker's message, or WorkerDied.
        """
        number = self.send(line)
        with self._changed:
            self._changed.wait_for(lambda: number in self._replies or self._failure is not None)
            reply = self._replies.pop(number, None)
            failure = self._failure
        if reply is None:
            assert failure is not None
            raise failure
        if not reply["ok"]:
            error = reply["error"]
            raise DSV4Error(error["message"], error["hint"], error["exit_code"])
        return reply["result"]

    def send(self, line: str) -> int:
        """Send one command; its reply arrives as an event with the returned id.

        Raises DSV4Error at once for a line that cannot be parsed.
        """
        parsed = parse(line)
        with self._changed:
            self._next_id += 1
            number = self._next_id
            self._sent[number] = parsed
        if parsed.command.where == "client":
            threading.Thread(target=self._run_here, args=(number, parsed), daemon=True).start()
        elif self._failure is not None:
            hint = "`restart` starts a new worker" if isinstance(self._failure, WorkerDied) else ""
            self._answer(number, error=DSV4Error(str(self._failure), hint, ExitCode.CRASHED))
        else:
            self._write({"id": number, "line": line})
        return number

    def wait_open(self) -> Event:
        """Wait until the checkpoint is open; the hello event. Raises what went wrong."""
        with self._changed:
            self._changed.wait_for(lambda: self.hello is not None or self._failure is not None)
            if self.hello is None:
                assert self._failure is not None
                raise self._failure
            return self.hello

    def _run_here(self, number: int, parsed: Parsed) -> None:
        try:
            result = getattr(self, f"do_{parsed.command.name}")(**parsed.arguments)
            self._answer(number, result=result)
        except DSV4Error as error:
            self._answer(number, error=error)

    def do_restart(self) -> Event:
        """A new worker, at the layer the last one had started; the culprit runs the reference."""
        self._stop_worker()
        folder = (self.hello or {}).get("folder")
        self._start(resume=folder)
        self.wait_open()
        return {"state": self.state, "route": list(self._route())}

    def do_save(self, file: str) -> Event:
        """Write the commands so far as a script. Raises DSV4Error if it cannot be written."""
        header = ["# dsv4-bench session script; run it with `dsv4-bench script FILE [CKPT]`"]
        try:
            Path(file).write_text("\n".join([*header, *self.commands]) + "\n")
        except OSError as error:
            raise DSV4Error(f"cannot write {file}: {error.strerror}") from None
        return {"file": file, "commands": len(self.commands)}

    def do_quit(self) -> Event:
        self.close()
        return {}

    # -- the worker

    def _start(self, resume: str | None) -> None:
        self._failure, self.hello, self._entered = None, None, None
        self.state = {"state": "opening", "site": None}
        command = [sys.executable, "-m", "dsv4_bench.workbench", "worker"]
        if self.options.connect:
            command = shlex.split(self.options.connect)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
            )
        except OSError as error:
            raise DSV4Error(f"cannot start {command[0]}: {error.strerror}") from None
        self._stderr: list[str] = []
        self._write({"open": self._open_message(resume)})
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        threading.Thread(target=self._read_stderr, args=(self._process,), daemon=True).start()

    def _open_message(self, resume: str | None) -> Event:
        fields = asdict(self.options)
        fields.pop("connect")
        if resume:
            state = self._last_state
            fields.update(
                resume=resume,
                route=list(self._route()),
                probes=state.get("probes", fields["probes"]),
                shadow="" if state.get("shadow") == "off" else state.get("shadow", ""),
                breaks=[point["text"] for point in state.get("breaks", [])],
                watches=[watch["expression"] for watch in state.get("watches", [])],
            )
        return fields

    def _route(self) -> list[str]:
        route = list(self._last_state.get("route") or self.options.route)
        return route + [f"{site}=reference" for site in self._culprits]

    @property
    def _last_state(self) -> Event:
        return getattr(self, "_known_state", {})

    def _write(self, message: Event) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(message))
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # the reader notices the death and tells why

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message = decode(line)
            except ValueError:
                self.on_event(
                    {"event": "log", "stream": "worker", "text": line.decode(errors="replace")}
                )
                continue
            self._take(message)
        process.wait()
        if not self._closing and process is self._process and self._failure is None:
            self._report_death(process)

    def _read_stderr(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.decode(errors="replace")
            self._stderr = [*self._stderr[-50:], text.rstrip("\n")]
            self.on_event({"event": "log", "stream": "stderr", "text": text})

    def _take(self, message: Event) -> None:
        kind = message.get("event")
        if kind == "enter":
            self._entered = message["site"]
        elif kind == "reply":
            self._take_reply(message)
            return
        with self._changed:
            if kind == "hello":
                self.hello = message
            elif kind == "state":
                self.state = self._known_state = message
            elif kind == "fatal":
                error = message["error"]
                self._failure = DSV4Error(error["message"], error["hint"], error["exit_code"])
            self._changed.notify_all()
        self.on_event(message)

    def _take_reply(self, message: Event) -> None:
        parsed = self._sent.pop(message["id"], None)
        if parsed is not None:
            message["line"] = parsed.line
            if message["ok"] and parsed.command.logged:
                self.commands.append(parsed.line)
        with self._changed:
            self._replies[message["id"]] = message
            while len(self._replies) > 1000:  # replies to `send` that nobody waits for
                self._replies.pop(next(iter(self._replies)))
            self._changed.notify_all()
        self.on_event(message)

    def _answer(
        self, number: int, result: Event | None = None, error: DSV4Error | None = None
    ) -> None:
        reply: Event = {"event": "reply", "id": number, "ok": error is None}
        if error is None:
            reply["result"] = result
        else:
            reply["error"] = error.to_dict()
        self._take_reply(reply)

    # -- death

    def _report_death(self, process: subprocess.Popen[bytes]) -> None:
        code = process.returncode
        name = signal.Signals(-code).name if code < 0 else None
        running = self.state.get("state") in ("running", "opening")
        site = self._entered if running else self.state.get("site")
        how = f"was killed by {name}" if name else f"ended with exit code {code}"
        where = f" at {site}" if site else (" while opening" if not self.hello else "")
        event: Event = {
            "event": "died",
            "site": site,
            "signal": name,
            "returncode": code,
            "stderr": self._last_words(),
            "message": f"the worker {how}{where}",
            "hint": "`restart` (R) goes on at the last layer snapshot",
        }
        # Only an op that was running is suspected; a worker killed while it waited has no culprit.
        if running and site and site not in self._culprits:
            self._culprits.append(site)
        with self._changed:
            self.state = {**self.state, "state": "dead", "site": site}
            self._failure = WorkerDied(event)
            waiting = list(self._sent)
            self._changed.notify_all()
        self.on_event(event)
        self.on_event({**self.state, "event": "state"})
        for number in waiting:
            self._answer(number, error=self._failure)

    def _last_words(self) -> list[str]:
        """The end of the worker's captured output; a fault handler's traceback, if it had one."""
        lines = list(self._stderr)
        folder = (self.hello or {}).get("folder")
        if folder and not self.options.connect:
            try:
                lines += (Path(folder) / "worker.log").read_text(errors="replace").splitlines()
            except OSError:
                pass
        return lines[-20:]

    # -- the end

    def close(self) -> None:
        """End the worker, within a second, whatever it is doing."""
        self._closing = True
        self._stop_worker()
        folder = (self.hello or {}).get("folder")
        if folder and not self.options.connect:
            shutil.rmtree(folder, ignore_errors=True)

    def _stop_worker(self) -> None:
        process = self._process
        if process.stdin is not None:
            try:
                process.stdin.close()  # the worker's reader thread ends the process
            except OSError:
                pass
        try:
            process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill(process)
            process.wait()

    @staticmethod
    def _kill(process: subprocess.Popen[bytes]) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its compilers too
        except (ProcessLookupError, PermissionError):
            process.kill()
