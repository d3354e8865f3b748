"""Events from the session's reader thread, handed to the UI in batches.

A reply or a change of state is delivered at once; the thousands of events of a running forward
pass wait for the next tenth of a second.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from dsv4_bench.workbench.tui.records import Event

URGENT = frozenset({"hello", "state", "reply", "died"})
FLOOD_INTERVAL = 0.1
URGENT_INTERVAL = 0.02


class Inbox:
    def __init__(
        self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[Event]], None]
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._events: deque[Event] = deque()
        self._woken = False
        self._woken_urgently = False
        self._timer: asyncio.TimerHandle | None = None
        self._delivered_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether events wait to be delivered."""
        return bool(self._events)

    def put(self, event: Event) -> None:
        """From any thread; never blocks."""
        self._events.append(event)
        urgent = event.get("event") in URGENT
        if self._woken_urgently or (self._woken and not urgent):
            return
        self._woken = True
        self._woken_urgently = urgent
        try:
            self._loop.call_soon_threadsafe(self._schedule, urgent)
        except RuntimeError:
            pass  # the UI is gone

    def _schedule(self, urgent: bool) -> None:
        interval = URGENT_INTERVAL if urgent else FLOOD_INTERVAL
        when = max(self._loop.time(), self._delivered_at + interval)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._woken = self._woken_urgently = False
        self._delivered_at = self._loop.time()
        batch = [self._events.popleft() for _ in range(len(self._events))]
        if batch:
            self._deliver(batch)
