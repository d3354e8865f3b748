"""A debugger session inside the test process, without a worker: fast, and open to inspection."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv4_bench.engine import registry
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import reference
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.serving import SessionServer

_SECONDS = 60


class Driver:
    """`command(line)` as in Session; `events` holds everything the server has sent."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self._replies: queue.Queue[dict[str, Any]] = queue.Queue()
        self._next = 0
        self.server = SessionServer(folder, self._send)
        self.server.open({"route": ["reference"], **options})
        self.debugger = self.server.debugger
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()

    def _send(self, message: dict[str, Any]) -> None:
        self.events.append(message)
        if message["event"] == "reply":
            self._replies.put(message)

    def submit(self, line: str) -> int:
        self._next += 1
        self.server.submit(self._next, parse(line))
        return self._next

    def reply(self) -> dict[str, Any]:
        """The next reply, in the order in which commands are answered."""
        return self._replies.get(timeout=_SECONDS)

    def command(self, line: str) -> dict[str, Any]:
        self.submit(line)
        reply = self.reply()
        if not reply["ok"]:
            error = reply["error"]
            raise DSV4Error(error["message"], error["hint"], error["exit_code"])
        return reply["result"]

    def logits(self) -> Any:
        return self.debugger.logits

    def kinds(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    def close(self) -> None:
        self.server.requests.put(None)
        self._thread.join(_SECONDS)
        assert not self._thread.is_alive()


@contextmanager
def implementations(**functions: Any):
    """Register `op__name=function` for a while: ``implementations(hc_post__mine=f)``."""
    replaced = []
    for key, function in functions.items():
        op, _, name = key.partition("__")
        replaced.append((op, name, registry.IMPLEMENTATIONS.get(op, {}).get(name)))
        registry.implementation(op=op, name=name)(function)
    try:
        yield
    finally:
        for op, name, before in replaced:
            if before is None:
                del registry.IMPLEMENTATIONS[op][name]
            else:
                registry.IMPLEMENTATIONS[op][name] = before


def finish(driver: Driver) -> tuple[Any, list[int]]:
    """Run to the end; the last logits and the generated tokens."""
    state = driver.command("continue")
    while state["state"] != "finished":
        assert state["state"] == "stopped", state["why"]
        state = driver.command("continue")
    return driver.logits(), state["generated"]


def scaled(op: str, factor: float) -> Any:
    """An implementation with a constant factor on the first output."""

    def run(*args, **params):
        result = reference(op)(*args, **params)
        if isinstance(result, tuple):
            return (result[0] * factor, *result[1:])
        return result * factor

    return run
