"""Watch mode: what to send to the session while the source of one op is being edited. No Textual, no clock.

The session stands at the op. `tick` is asked a few times a second; it answers with lines to send, of
which `reload` costs next to nothing while no file has changed. A kernel that kills the worker is an
attempt like any other: after the next save the worker is started again and led back to the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_bench.workbench.saving import fingerprint
from dsv4_bench.workbench.tui.records import Event

Fingerprint = Callable[[Sequence[Path]], str]


@dataclass
class Watching:
    """One op under watch. `phase`: asking (for its files), watching, dead, restarting, returning or
    stopped; `problem` says why it stopped."""

    site: str
    of: Fingerprint = fingerprint
    phase: str = "asking"
    implementation: str = ""
    files: list[Path] = field(default_factory=list)
    attempts: list[Event] = field(default_factory=list)
    problem: str = ""
    waiting: bool = False  # for the reply to the line sent last
    _seen: str = ""

    def tick(self, state: str, standing: str | None) -> list[str]:
        """The lines to send now, the session being in `state` and standing at a site."""
        if self.phase == "dead":
            found = self.of(self.files)
            if found == self._seen:
                return []
            self.phase, self._seen = "restarting", found
            return ["restart"]
        if state not in ("ready", "stopped", "finished") or self.waiting or self.phase == "stopped":
            return []
        if self.phase == "asking":
            self.waiting = True
            return [f"sources {self.site}"]
        if self.phase == "restarting":  # the restart has put the op on the reference
            self.phase = "returning"
            return [f"route {self.site}={self.implementation}", f"until {self.site}"]
        if standing != self.site:
            return self._stop(f"the session stands at {standing or 'no op'}, not at {self.site}")
        self.phase, self.waiting = "watching", True
        self._seen = self.of(self.files)
        return ["reload"]

    def replied(self, reply: Event) -> None:
        """Take the result of `sources` or `reload`, or the error of either."""
        self.waiting = False
        if "error" in reply:
            self._stop(reply["error"])
        elif "reloaded" in reply:
            if reply["reloaded"]:
                self.attempts.append(reply["history"][-1])
        else:
            self.implementation = reply["implementation"]
            self.files = [Path(name) for name in reply["files"]]
            self.phase = "watching"
            if not self.files:
                self._stop(f"the route is {self.implementation}, which no file of yours makes")

    def died(self, message: str) -> None:
        """The worker is gone, through the code as it is now."""
        self.waiting = False
        self.attempts.append(
            {"site": self.site, "implementation": self.implementation, "error": message}
        )
        self._seen = self._seen or self.of(self.files)
        self.phase = "dead" if self.files else "stopped"

    def _stop(self, problem: str) -> list[str]:
        self.phase, self.problem = "stopped", problem
        return []
