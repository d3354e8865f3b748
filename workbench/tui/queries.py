"""The lines the UI sends by itself, so that what is on the screen stays up to date.

At most one of each kind is under way; none is sent while the engine runs or for hidden panes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from dsv4_bench.workbench.tui.records import Event
from dsv4_bench.workbench.tui.store import Change, Store

PANE_OF = {"op": "op", "layer": "readings", "residual": "readings"}
RESHAPES = (
    "toggle", "route", "shadow", "carried", "probes", "back", "rerun", "goto", "reset", "restart"
)  # fmt: skip


@dataclass
class Queries:
    stale: set[str] = field(default_factory=set)
    waiting: dict[int, str] = field(default_factory=dict)
    asked_site: str | None = None
    asked_residual: tuple[object, ...] = ()

    def changed(self, change: Change, store: Store) -> None:
        if Change.HELLO in change or Change.DEATH in change:
            self.waiting.clear()
        if Change.HELLO in change:
            self.stale.add("sites")
        if Change.STOPPED in change:
            self.stale |= {"op", "layer"}
            position = (store.state.get("forward"), store.state.get("layer"))
            at_residual = str(store.state.get("site")).endswith("hc_post")
            if position != self.asked_residual or at_residual:
                self.asked_residual = position
                self.stale.add("residual")
        if Change.BREAKS in change:
            self.stale.add("sites")
        if Change.RERUN in change:
            self.stale |= {"sites", "op", "layer"}

    def replied(self, event: Event) -> None:
        """A reply came: to one of ours, or to a command that changes what many sites show."""
        ours = self.waiting.pop(event.get("id", -1), None)
        if ours is None and event.get("ok") and event.get("line", "").split(" ")[0] in RESHAPES:
            self.stale |= {"sites", "op", "layer", "residual"}

    def next(
        self, store: Store, cursor: str | None, shown: Collection[str]
    ) -> list[tuple[str, str]]:
        """(kind, line) of what to send now."""
        if not store.idle or not store.hello:
            return []
        if cursor and cursor != self.asked_site:
            self.stale.add("op")
        wanted = []
        for kind in sorted(self.stale - set(self.waiting.values())):
            line = self._line(kind, store, cursor)
            if line and PANE_OF.get(kind, kind) in (*shown, "sites"):
                wanted.append((kind, line))
        return wanted

    def _line(self, kind: str, store: Store, cursor: str | None) -> str | None:
        layer = store.state.get("layer")
        if kind == "op":
            return f"op {cursor}" if cursor else None
        if kind == "layer":
            return f"readings L{layer}/*" if layer is not None else None
        return "sites" if kind == "sites" else "readings */hc_post residual"

    def sent(self, kind: str, number: int, cursor: str | None) -> None:
        self.stale.discard(kind)
        self.waiting[number] = kind
        if kind == "op":
            self.asked_site = cursor
