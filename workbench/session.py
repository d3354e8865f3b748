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

import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.commands import Parsed, parse
from dsv4_bench.workbench.process import WorkerProcess

Event = dict[str, Any]
_HUNG_SECONDS = 1.0  # an op that takes longer is named when a pause or a restart waits for it

# All but those that compute again what an op computes, or read weights.
DEFAULT_PROBES = (
    "stats", "residual", "softmax", "hyper", "load", "nonfinite", "index", "cache",
)  # fmt: skip


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
    probes: tuple[str, ...] = DEFAULT_PROBES
    shadow: str = ""
    carried: bool = False
    connect: str | None = None  # a shell command that starts a worker elsewhere, e.g. over ssh


class WorkerDied(DSV4Error):
    """The worker ended in the middle of a command; `event` is the `died` event."""

    def __init__(self, event: Event) -> None:
        super().__init__(event["message"], event["hint"], ExitCode.CRASHED)
        self.event = event


class Running(NamedTuple):
    """What the worker said it runs: an op on its route, or the other route in its shadow."""

    site: str
    implementation: str
    shadow: bool
    since: float

    def __str__(self) -> str:
        return f"{self.site} ({'shadow ' if self.shadow else ''}{self.implementation})"


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
        self._known_state: Event = {}  # the last one that a worker sent
        self._next_id = 0
        self._changed = threading.Condition()
        self._sent: dict[int, Parsed] = {}  # not answered yet
        self._awaited: set[int] = set()  # ids that `command` waits for
        self._unlogged: set[int] = set()  # ids that leave no line in `commands`
        self._replies: dict[int, Event] = {}
        self._running: Running | None = None
        self._culprit: Running | None = None
        self._failure: DSV4Error | None = None
        self._closed = False
        self._folder: str | None = None
        self._start()

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
        parsed = parse(line)
        number = self._number(parsed, awaited=True)
        try:
            if parsed.command.where == "client":
                self._run_here(number, parsed)
            else:
                self._transmit(number, parsed)
            with self._changed:
                self._changed.wait_for(lambda: number in self._replies)
                reply = self._replies[number]
                failure = self._failure
        finally:
            with self._changed:
                self._awaited.discard(number)
                self._replies.pop(number, None)
        if reply["ok"]:
            return reply["result"]
        if isinstance(failure, WorkerDied) and parsed.command.where == "worker":
            raise failure
        error = reply["error"]
        raise DSV4Error(error["message"], error["hint"], error["exit_code"])

    def send(self, line: str, log: bool = True) -> int:
        """Send one command; its reply arrives as an event with the returned id.

        With `log` false it leaves no line in `commands`: a program asked, not its user. Raises
        DSV4Error at once for a line that cannot be parsed.
        """
        parsed = parse(line)
        number = self._number(parsed)
        if not log:
            self._unlogged.add(number)
        if parsed.command.where == "client":
            threading.Thread(target=self._run_here, args=(number, parsed), daemon=True).start()
        else:
            self._transmit(number, parsed)
        return number

    def wait_open(self) -> Event:
        """Wait until the checkpoint is open; the hello event. Raises what went wrong."""
        with self._changed:
            self._changed.wait_for(self._is_open_or_failed)
            if self._failure is not None:
                raise self._failure
            assert self.hello is not None
            return self.hello

    def _is_open_or_failed(self) -> bool:
        opened = self.hello is not None and self.state["state"] != "opening"
        return opened or self._failure is not None

    def _number(self, parsed: Parsed, awaited: bool = False) -> int:
        with self._changed:
            self._next_id += 1
            self._sent[self._next_id] = parsed
            if awaited:
                self._awaited.add(self._next_id)
            return self._next_id

    def _transmit(self, number: int, parsed: Parsed) -> None:
        with self._changed:
            failure = self._failure
        if failure is not None:
            hint = "" if self._closed else "`restart` starts a new worker"
            self._answer(number, error=DSV4Error(failure.message, hint, failure.exit_code))
            return
        self._worker.write({"id": number, "line": parsed.line})
        if parsed.command.name == "pause":
            timer = threading.Timer(_HUNG_SECONDS, self._say_who_is_late, (number,))
            timer.daemon = True
            timer.start()

    def _say_who_is_late(self, number: int) -> None:
        """A pause takes effect between two ops: name the one it waits for."""
        running = self._running
        if number in self._sent and running is not None:
            seconds = time.monotonic() - running.since
            self._note(f"{running} has been running for {seconds:.0f} s; `restart` would end it")

    def _run_here(self, number: int, parsed: Parsed) -> None:
        try:
            result = getattr(self, f"do_{parsed.command.name}")(**parsed.arguments)
            self._answer(number, result=result)
        except DSV4Error as error:
            self._answer(number, error=error)

    def do_restart(self) -> Event:
        """A new worker, at the layer the last one had started; a culprit is taken off its route.

        An op that has been running for over a second counts as hung, and so as a culprit.
        """
        if self._closed:
            raise DSV4Error("the session is closed")
        running = self._running
        alive = self._failure is None
        if alive and running and time.monotonic() - running.since > _HUNG_SECONDS:
            self._culprit = running
        ended = DSV4Error("the worker was ended by `restart`", "", ExitCode.CRASHED)
        with self._changed:
            self._failure = ended  # for commands that come before there is a new one
        self._worker.stop(keep_folder=True)
        self._answer_all([n for n, p in self._sent.items() if p.command.where == "worker"], ended)
        culprit = self._culprit
        self._start(self._resume_fields())
        self.wait_open()
        self._culprit = None
        if culprit is not None:
            what = "shadow is off" if culprit.shadow else f"{culprit.site} runs the reference"
            self._note(f"{culprit} is suspected: {what} now")
        return {"state": self.state, "route": self.state.get("route", [])}

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

    def _start(self, resume: Event | None = None) -> None:
        """Start a worker. Raises DSV4Error if that is not possible."""
        with self._changed:
            self._failure, self.hello, self._running = None, None, None
            self.state = {"state": "opening", "site": None}
        connect = self.options.connect
        try:
            self._worker = WorkerProcess(connect, self._take, self._noise, self._ended)
        except OSError as error:
            text = f"cannot start {connect or 'a worker'}: {error.strerror}"
            self._failure = DSV4Error(text, "", ExitCode.CANNOT)
            raise self._failure from None
        options = asdict(self.options)
        options.pop("connect")
        self._worker.write({"open": {**options, **(resume or {})}})
        self._worker.start_reading()

    def _resume_fields(self) -> Event:
        """What a new worker must be told to stand where the last one stood."""
        fields: Event = {"resume": self._folder}
        state, culprit = self._known_state, self._culprit
        if state:
            fields |= {
                "route": state["route"],
                "probes": state["probes"],
                "shadow": "" if state["shadow"] == "off" else state["shadow"],
                "carried": state["carried"],
                "breaks": state["breaks"],
                "watches": [watch["expression"] for watch in state["watches"]],
            }
        if culprit is not None and culprit.shadow:
            fields |= {"shadow": "", "carried": False}
        elif culprit is not None:
            entry = f"{culprit.site}=reference"
            route = fields.get("route", self.options.route)
            fields["route"] = [*(e for e in route if e != entry), entry]
        return fields

    def _take(self, message: Event) -> None:
        """One message of the worker; from its reader thread."""
        try:
            self._understand(message)
        except (KeyError, TypeError, AttributeError) as error:
            self._note(f"message not understood: {error!r} in {str(message)[:200]}")

    def _understand(self, message: Event) -> None:
        kind = message.get("event")
        if kind == "reply":
            self._take_reply(message)
            return
        if kind in ("enter", "running"):
            now, shadow = time.monotonic(), message.get("shadow", False)
            self._running = Running(message["site"], message.get("route", "?"), shadow, now)
        elif kind == "site":
            self._running = None
        with self._changed:
            if kind == "started":
                self._folder = message["folder"]
            elif kind == "hello":
                self.hello = message
            elif kind == "state":
                self.state = self._known_state = message
            elif kind == "fatal":
                error = message["error"]
                self._failure = DSV4Error(error["message"], error["hint"], error["exit_code"])
            self._changed.notify_all()
        if kind not in ("started", "running"):
            self._tell(message)

    def _tell(self, event: Event) -> None:
        try:
            self.on_event(event)
        except Exception:  # the listener's fault must not stop the session
            traceback.print_exc()

    def _noise(self, stream: str, text: str) -> None:
        self._tell({"event": "log", "stream": stream, "text": text})

    def _note(self, text: str) -> None:
        self._noise("worker", text + "\n")

    def _take_reply(self, message: Event) -> None:
        number = message["id"]
        parsed = self._sent.pop(number, None)
        if parsed is not None:
            message["line"] = parsed.line
            if message["ok"] and parsed.command.logged and number not in self._unlogged:
                self.commands.append(_as_done(parsed, message["result"]))
            self._unlogged.discard(number)
        with self._changed:
            if number in self._awaited:
                self._replies[number] = message
            self._changed.notify_all()
        self._tell(message)

    def _answer(
        self, number: int, result: Event | None = None, error: DSV4Error | None = None
    ) -> None:
        reply: Event = {"event": "reply", "id": number, "ok": error is None}
        if error is None:
            reply["result"] = result
        else:
            reply["error"] = error.to_dict()
        self._take_reply(reply)

    def _answer_all(self, numbers: Iterable[int], error: DSV4Error) -> None:
        for number in list(numbers):
            self._answer(number, error=error)

    # -- death

    def _ended(self, worker: WorkerProcess, code: int) -> None:
        """The worker is gone, and nobody had asked for it."""
        if worker is not self._worker or self._closed:
            return
        with self._changed:
            failure = self._failure
        event = None
        if failure is None:
            event = self._death(worker, code)
            failure = WorkerDied(event)
            if self._running is not None:
                self._culprit = self._running
            if self._sent:  # a script that repeats the session repeats the death too
                self.commands.append(self._sent[min(self._sent)].line)
        site = event["site"] if event else self.state.get("site")
        with self._changed:
            self._failure = failure
            self.state = {**self.state, "state": "dead", "site": site}
            self._changed.notify_all()
        if event is not None:
            self._tell(event)
        self._tell({**self.state, "event": "state"})
        self._answer_all(self._sent, failure)

    def _death(self, worker: WorkerProcess, code: int) -> Event:
        """The `died` event: what ended the worker, and at which site."""
        words = self._last_words(worker)
        name = _signal_name(-code) if code < 0 else None
        running = self._running
        site = running.site if running else self.state.get("site")
        how = f"was killed by {name}" if name else f"ended with exit code {code}"
        where = f" at {running or site}" if site else ""
        if self.hello is None:
            where = " while opening" + (f": {words[-1]}" if words and not name else "")
        return {
            "event": "died",
            "site": site,
            "signal": name,
            "returncode": code,
            "stderr": words,
            "message": f"the worker {how}{where}",
            "hint": "`restart` (R) goes on at the last layer snapshot",
        }

    def _last_words(self, worker: WorkerProcess) -> list[str]:
        """The end of the worker's captured output; a fault handler's traceback, if it had one."""
        lines = list(worker.stderr)
        if self._folder and not self.options.connect:
            try:
                lines += (Path(self._folder) / "worker.log").read_text(errors="replace").split("\n")
            except OSError:
                pass
        return _without_internals([line for line in lines if line.strip()])[-20:]

    # -- the end

    def close(self) -> None:
        """End the worker, within a second, whatever it is doing."""
        self._closed = True
        self._worker.stop()
        with self._changed:
            self._failure = DSV4Error("the session is closed")
        self._answer_all(self._sent, self._failure)
        if self._folder and not self.options.connect:
            shutil.rmtree(self._folder, ignore_errors=True)


def _without_internals(lines: list[str]) -> list[str]:
    """Of a fault handler's report at the end keep what it was, and the innermost two frames."""
    starts = [i for i, line in enumerate(lines) if line.startswith("Fatal Python error")]
    if not starts:
        return lines
    before, report = lines[: starts[-1]], lines[starts[-1] :]
    current = next((i for i, line in enumerate(report) if line.startswith("Current thread")), 0)
    frames = [line for line in report[current + 1 : current + 3] if line.startswith("  File")]
    return [*before, report[0], *frames]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_FORWARD = ("step", "next", "finish", "layer", "continue", "until", "anomaly")


def _as_done(parsed: Parsed, result: Event) -> str:
    """The script line that does again what was done: a run that was paused is so many steps."""
    if parsed.command.name in _FORWARD and result.get("why") == "pause":
        return f"step {result['ran']}"
    return parsed.line
