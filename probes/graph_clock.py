"""Device time stamps around every site inside a CUDA graph"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_bench.engine import cuda
from dsv4_bench.engine.graph import DecodeGraph
from dsv4_bench.engine.registry import Site


@dataclass(frozen=True)
class SiteTime:
    """Time of one site inside a graph in microseconds: median over replays, quartiles beside it."""

    path: str
    microseconds: float
    low: float
    high: float
    kernels: tuple[str, ...] = ()  # mangled names, as launched


class SiteClock:
    """A decode graph's clock: device time stamps around every site, for `steps` replays.

    A stamp costs a node, keeps kernels around it from overlapping, and takes time itself: `cost`, the
    distance of two stamps with nothing between, is taken off.
    """

    def __init__(self, sites: int, device: torch.device, steps: int = 64) -> None:
        self.stamps = cuda.stats.Stamps(device, 2 * sites, steps)
        self.cost = stamp_cost(device)
        self.paths: list[str] = []

    def start(self, site: Site) -> None:
        if site.path in self.paths:  # captured anew
            self.paths = []
        self.stamps.stamp(2 * len(self.paths), begin=not self.paths)
        self.paths.append(site.path)

    def stop(self, site: Site) -> None:
        self.stamps.stamp(2 * len(self.paths) - 1)

    def times(self, graph: DecodeGraph | None = None) -> list[SiteTime]:
        """Every site of the replays since the last time, in order of capture; waits.

        `graph`: the one it was captured in, for the sites' kernels.
        """
        times = self.stamps.fetch()[:, : 2 * len(self.paths)].double()
        if not len(times):
            return []
        spans = (times[:, 1::2] - times[:, ::2]) / 1000 - self.cost  # [steps, sites]
        levels = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        table = spans.quantile(levels, dim=0).T.tolist()
        kernels = {} if graph is None else kernels_of(graph)
        return [
            SiteTime(path, middle, low, high, kernels.get(path, ()))
            for path, (middle, low, high) in zip(self.paths, table, strict=True)
        ]


def stamp_cost(device: torch.device, count: int = 256) -> float:
    """Microseconds from one time stamp to the next in a graph of nothing else."""
    stamps = cuda.stats.Stamps(device, count, 8)
    graph = torch.cuda.CUDAGraph()
    stamps.stamp(0, begin=True)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for slot in range(count):
            stamps.stamp(slot, begin=slot == 0)
    for _ in range(8):
        graph.replay()
    times = stamps.fetch()[2:].double()
    return float((times[:, -1] - times[:, 0]).median()) / 1000 / (count - 1)


def kernels_of(graph: DecodeGraph) -> dict[str, tuple[str, ...]]:
    """The kernels of every site of a graph, without copies and fills."""
    names = graph.nodes()
    return {
        path: tuple(name for name in names[first : first + count] if name)
        for path, first, count in graph.sites()
    }
