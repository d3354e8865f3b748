"""The site tree as a flat list of visible rows. Pure; about 2,400 sites cost a few milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsv4_bench.workbench.tui.format import ANOMALY_MARKS, DONE, PENDING, SKIPPED
from dsv4_bench.workbench.tui.records import SiteInfo


@dataclass(frozen=True)
class Node:
    """A site, or a group of sites: `L3`, `L3/attn`, `L3/attn/index`. Its key is its path."""

    key: str
    label: str
    depth: int
    parent: str | None
    is_site: bool


@dataclass(frozen=True)
class Summary:
    """What a row shows: of one site, or of a group taken together, the worst of it.

    `mark`: done, pending, or skipped, when a later site of the same pass has run. `anomaly` is a key
    of ANOMALY_MARKS, or empty. Errors are those of this pass.
    """

    mark: str = PENDING
    current: bool = False
    stops: bool = False
    anomaly: str = ""
    seconds: float | None = None
    times: float | None = None
    carried_error: float | None = None
    route: str = ""


@dataclass
class SiteModel:
    """Nodes in forward order, and which of them are open."""

    nodes: dict[str, Node] = field(default_factory=dict)
    children: dict[str, list[str]] = field(default_factory=dict)
    sites_below: dict[str, list[str]] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    auto_open: str | None = None
    rows: list[Node] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    row_of: dict[str, int] = field(default_factory=dict)

    @classmethod
    def build(cls, paths: Iterable[str]) -> SiteModel:
        model = cls()
        for index, path in enumerate(paths):
            model.order[path] = index
            model._add(path)
        groups = (key for key, node in model.nodes.items() if not node.is_site and node.depth)
        model.open.update(groups)  # opening a layer shows all of its ops
        model.refresh()
        return model

    def _add(self, path: str) -> None:
        parts = path.split("/")
        parent: str | None = None
        for depth, label in enumerate(parts):
            key = "/".join(parts[: depth + 1])
            if key not in self.nodes:
                self.nodes[key] = Node(key, label, depth, parent, key == path)
                self.children.setdefault(parent or "", []).append(key)
            if key != path:
                self.sites_below.setdefault(key, []).append(path)
            parent = key

    def _mark(self, site: SiteInfo, position: int) -> str:
        if site.done:
            return DONE
        return SKIPPED if self.order[site.path] < position else PENDING

    def refresh(self) -> None:
        """Recompute the visible rows."""
        self.rows = []
        self._walk("")
        self.row_of = {node.key: index for index, node in enumerate(self.rows)}

    def _walk(self, parent: str) -> None:
        for key in self.children.get(parent, ()):
            self.rows.append(self.nodes[key])
            if key in self.open:
                self._walk(key)

    def set_open(self, key: str, is_open: bool) -> None:
        if key not in self.children or is_open == (key in self.open):
            return
        if is_open:
            self.open.add(key)
        else:
            self.open.discard(key)
        self.auto_open = None if key == self.auto_open else self.auto_open
        self.refresh()

    def reveal(self, path: str, following: bool = False) -> int:
        """Open what hides `path` and return its row; when following, close what was opened so."""
        top = path.split("/")[0]
        if following and top != self.auto_open:
            if self.auto_open is not None:
                self.open.discard(self.auto_open)
            self.auto_open = None if top in self.open else top
        key: str | None = path
        while key is not None and key in self.nodes:
            key = self.nodes[key].parent
            if key is not None:
                self.open.add(key)
        self.refresh()
        return self.row_of.get(path, 0)

    def summary(self, key: str, sites: dict[str, SiteInfo], current: str | None) -> Summary:
        below = self.sites_below.get(key)
        position = self.order.get(current or "", -1)
        if below is None:
            site = sites[key]
            return Summary(
                self._mark(site, position), key == current, site.stops, site.anomaly,
                site.seconds, site.times if site.done else None,
                site.carried_error if site.done else None, site.route,
            )  # fmt: skip
        infos = [sites[path] for path in below]
        times = [site.seconds for site in infos if site.seconds is not None]
        ran = [site for site in infos if site.done]
        worst = [site.times for site in ran if site.times is not None]
        carried = [site.carried_error for site in ran if site.carried_error is not None]
        anomalies = {site.anomaly for site in infos}
        marks = {self._mark(site, position) for site in infos}
        return Summary(
            next(mark for mark in (PENDING, DONE, SKIPPED) if mark in marks),
            current is not None and current.startswith(key + "/"),
            any(site.stops for site in infos),
            next((kind for kind in ANOMALY_MARKS if kind in anomalies), ""),
            sum(times) if times else None,
            max(worst, default=None),
            max(carried, default=None),
        )


def search(paths: list[str], text: str, after: str | None = None, step: int = 1) -> str | None:
    """The next path from `after` on, wrapping, that holds every word of `text`."""
    words = text.lower().split()
    if not words or not paths:
        return None
    start = paths.index(after) if after in paths else 0 if step > 0 else -1
    for offset in range(len(paths)):
        path = paths[(start + step * offset) % len(paths)]
        if holds(path.lower(), words):
            return path
    return None


def holds(path: str, words: list[str]) -> bool:
    return all(word in path for word in words)


def neighbour(paths: list[str], order: dict[str, int], at: str | None, step: int) -> str | None:
    """Of `paths` (in forward order), the next one after or before `at`, wrapping around."""
    if not paths:
        return None
    here = order.get(at or "", -1 if step > 0 else len(order))
    ahead = [path for path in paths if (order[path] - here) * step > 0]
    chosen = ahead or paths
    return chosen[0] if step > 0 else chosen[-1]
