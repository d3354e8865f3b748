"""A Session whose events can be waited for, and plugins that make its worker die."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_bench.workbench.session import Session

Event = dict[str, Any]
_SECONDS = 90

_PLUGIN = """
import ctypes, os, signal, sys, time
from dsv4_bench.engine.registry import implementation, reference

def do(op, name):
    def register(act):
        @implementation(op=op, name=name)
        def run(*args, **kwargs):
            act()
            return reference(op)(*args, **kwargs)
    return register

for op in ("attention", "hc_post", "cache_write", "linear", "compressor"):
    do(op, "segfault")(lambda: ctypes.string_at(0))
    do(op, "abort")(os.abort)
    do(op, "exit")(lambda: os._exit(3))
    do(op, "hang")(lambda: time.sleep(10_000))
    do(op, "hang_in_c")(lambda: ctypes.PyDLL(None).sleep(10_000))  # holds the GIL
    do(op, "same")(lambda: None)
    do(op, "noise")(lambda: (os.write(1, b"from C\\n"), os.write(2, b"x" * 1_000_000 + b"\\n"),
                             print("caf\\u00e9")))
"""


def write_plugin(folder: Path, text: str = _PLUGIN) -> str:
    path = folder / "plugin.py"
    path.write_text(text)
    return str(path)


class Client(Session):
    """A Session that keeps its events."""

    def __init__(self, **options: Any) -> None:
        self.events: list[Event] = []
        self._arrived = threading.Condition()
        super().__init__(**{"route": ("reference",), **options}, on_event=self._keep)

    def _keep(self, event: Event) -> None:
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    def wait_for(self, wanted: Callable[[Event], bool], after: int = 0) -> Event:
        """The first event from number `after` on that is wanted."""
        with self._arrived:
            found = self._arrived.wait_for(
                lambda: next((e for e in self.events[after:] if wanted(e)), None), _SECONDS
            )
        assert found is not None, [e for e in self.events if e["event"] not in ("enter", "site")]
        return found

    def kinds(self, kind: str) -> list[Event]:
        return [e for e in self.events if e["event"] == kind]

    def log(self) -> str:
        return "".join(e["text"] for e in self.kinds("log"))


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie counts, as somebody has forgotten it."""
    return Path(f"/proc/{pid}").exists()
