"""Sites of a layer side by side in a CUDA graph: each waits only for those that made what it reads.

A tap's observer for the time of a capture. Which site needs which is read off the tensors: a site
comes after those that wrote storages it reads or writes, and after those that read what it writes.
Torch operations between two sites are captured behind the first of them, and what they make counts
as that site's.

Branches compete for processors: graph_order.py says which sites are captured before they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4_bench.engine.cuda.fusion import Fusions
from dsv4_bench.engine.cuda.hyper import Behind
from dsv4_bench.engine.graph_nodes import CapturedNodes
from dsv4_bench.engine.registry import Site


class Observer(Protocol):
    """Launches of its own beside the sites, on a branch that is joined at the end of the graph.

    All but `due` are called while capturing, with that branch as the current stream, behind all sites
    so far: where a site is `due`, and at the end of the step. Nothing may synchronise.
    """

    def step_begins(self) -> None:
        """Nothing has run; what is told from now on is of a new capture."""

    def due(self, site: Site) -> bool:
        """Whether to be told now of this site and all before it."""

    def after(self, site: Site, args: tuple[Any, ...], result: Any) -> None:
        """The site has run; its tensors stay valid for the life of the graph."""

    def look(self) -> None:
        """No more sites for now."""

    def step_done(self) -> None:
        """All sites have run."""


class Clock(Protocol):
    """Launches of its own right before and after a site, in the site's chain: device time stamps."""

    def start(self, site: Site) -> None: ...
    def stop(self, site: Site) -> None: ...


@dataclass
class _Work:
    """What a stream holds up to one site. `covers` has a bit for it and for all it comes after."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event
    number: int
    covers: int


@dataclass
class _Captured:
    """A site that has been captured, with its nodes; the observer is told of `seen` when it is called."""

    args: tuple[Any, ...]
    result: Any
    nodes: tuple[int, int]  # the first, and how many
    work: _Work | None = None  # None if a later site's launch does its work
    seen: list[tuple[Site, tuple[Any, ...], Any]] = field(default_factory=list)


def _mark(stream: torch.cuda.Stream, number: int, before: Iterable[_Work]) -> _Work:
    covers = 1 << number
    for work in before:
        covers |= work.covers
    event = torch.cuda.Event()
    event.record(stream)
    return _Work(stream, event, number, covers)


def storages(tensors: Iterable[Any]) -> set[int]:
    """The addresses of the memory behind `tensors`; what is no tensor, or empty, is left out."""
    found = {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}
    return found - {0}


class Branches:
    """Runs the sites of a capture that began on the current stream; `sites` lists path, first node, nodes.

    `side_by_side` False keeps them in one chain. `fusions` may put a site off: its nodes are then those
    of a later one. `failed` is the site that raised, if one did.
    """

    def __init__(
        self,
        observer: Observer | None,
        clock: Clock | None,
        side_by_side: bool = True,
        fusions: Fusions | None = None,
    ) -> None:
        self.observer, self.clock, self.side_by_side = observer, clock, side_by_side
        self.fusions = fusions or Fusions({}, False)
        self.origin = torch.cuda.current_stream()
        self.nodes = CapturedNodes(self.origin.cuda_stream)
        self.sites: list[tuple[str, int, int]] = []
        self.failed: Site | None = None
        self._in_site = False
        self._streams = [self.origin]
        self._beside = torch.cuda.Stream() if observer else None
        self._untold: list[
            tuple[Site, tuple[Any, ...], Any]
        ] = []  # what the observer is to be told
        self._kept: list[Any] = []  # so that no memory is used twice between two joins
        self._begin(self.origin, set())
        if self.observer is not None and self._beside is not None:
            self._beside.wait_stream(self.origin)
            with torch.cuda.stream(self._beside):
                self.observer.step_begins()
            self._count = self.nodes.count()

    def _begin(self, stream: torch.cuda.Stream, given: set[int]) -> None:
        """Only `stream` holds work, and the memory at the addresses `given` is ready."""
        self._first = self._last = _mark(stream, 0, ())
        self._works = 1
        self._tails = {stream: self._last}
        self._writers = dict.fromkeys(given, self._last)
        self._readers: dict[int, list[_Work]] = {}
        self._early: dict[str, _Captured] = {}  # by path: sites that have not been called yet
        self._count = self.nodes.count()

    @contextmanager
    def part(self, given: Iterable[Any]) -> Iterator[None]:
        """A layer, or what else shall be joined at its end; `given` are the tensors it starts from."""
        self._begin(self._last.stream, storages(given))
        with _Between(self):
            yield
        self._join()

    def _join(self) -> None:
        """Everything comes together on the stream of the last site, which is the current one."""
        self._look_behind()
        last = self._last
        for tail in self._tails.values():
            if not last.covers >> tail.number & 1:
                last.stream.wait_event(tail.event)
        if self.observer is None:
            self._kept.clear()
        self._begin(last.stream, set())

    def finish(self) -> None:
        """All branches come together where the capture began."""
        self._tell()
        if self.observer is not None:
            with torch.cuda.stream(self._beside):
                self.observer.step_done()
        torch.cuda.set_stream(self.origin)
        self.origin.wait_stream(self._last.stream)
        if self._beside is not None:
            self.origin.wait_stream(self._beside)

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        """Run the op on a stream of its own or on that of the site it waits for."""
        self._in_site, self._site = True, site
        try:
            return self._run(site, args)
        except Exception:
            self.failed = self.failed or self._site
            raise
        finally:
            self._in_site = False

    def _run(self, site: Site, args: tuple[Any, ...]) -> Any:
        self._look_behind()
        done = self._early.pop(site.path, None)
        if done is None or done.args[0] is not args[0]:
            for one, given in self.fusions.group_of(site, args):
                self._early[one.path] = self._capture(one, given)
            done = self._early.pop(site.path)
        if done.work is not None:  # what torch launches next comes behind this site
            self._last = self._tails[done.work.stream]
            torch.cuda.set_stream(done.work.stream)
        self.sites.append((site.path, *done.nodes))
        for seen in done.seen:
            self._saw(*seen)
        return done.result

    def _capture(self, site: Site, args: tuple[Any, ...]) -> _Captured:
        self._site = site
        call = self.fusions.take(site, args)
        if call.run is None:
            self._kept.append((args, call.result))
            done = _Captured(args, call.result, (self.nodes.count(), 0))
            if call.filled:
                (address,) = _made(call.result)
                done.work, done.seen = self._writers[address], [(site, args, call.result)]
            return done
        bound = site.spec.bind(args, {})
        reads = storages(call.args)
        writes = storages((*call.writes, *(bound[name] for name in site.spec.mutates)))
        needs = self._needs(reads, writes)
        stream = self._stream(needs)
        torch.cuda.set_stream(stream)
        if self.clock is not None:
            self.clock.start(site)
        first = self.nodes.count()
        result = call.run()
        nodes = first, self.nodes.count() - first
        if self.clock is not None:
            self.clock.stop(site)
        work = _mark(stream, self._works, needs)
        self._ran(work, reads, writes | _made(result) | storages(call.made))
        self._kept.append((call.args, call.made, call.behind, result))
        for launch in call.behind:
            self._behind(work, launch)
        return _Captured(args, result, nodes, work, [*call.earlier, (site, args, result)])

    def _behind(self, work: _Work, launch: Behind) -> None:
        """A launch after `work`, on a stream of its own: what comes next does not wait for it."""
        stream, last = work.stream, self._last
        if self.side_by_side:
            stream = self._unused()
            self.nodes.forget(stream.cuda_stream)
            stream.wait_event(work.event)
        with torch.cuda.stream(stream):
            launch.run()
        self._ran(
            _mark(stream, self._works, [work]), storages(launch.reads), storages(launch.writes)
        )
        if self.side_by_side:
            self._last = last

    def _look_behind(self) -> None:
        """Whether torch launched something behind the last site."""
        if self.nodes.count() > self._count:
            self._last.event.record(self._last.stream)

    def made_between(self, addresses: set[int]) -> None:
        """Torch has made tensors at new `addresses`: behind the last site, unless inside of one."""
        if not self._in_site:
            for address in addresses:
                self._writers[address], self._readers[address] = self._last, []

    def _ran(self, work: _Work, reads: set[int], writes: set[int]) -> None:
        self._works += 1
        self._last = self._tails[work.stream] = work
        for address in reads:
            self._readers.setdefault(address, []).append(work)
        for address in writes:
            self._writers[address], self._readers[address] = work, []
        self._count = self.nodes.count()

    def _needs(self, reads: set[int], writes: set[int]) -> list[_Work]:
        """The works that a site with these storages comes after, without those that others cover."""
        if not self.side_by_side:
            return [self._last]
        found = [self._first]
        for address in reads:
            if address in self._writers:
                found.append(self._writers[address])
        for address in writes:
            found += self._readers.get(address, [])
        return _last_ones(found)

    def _stream(self, needs: list[_Work]) -> torch.cuda.Stream:
        """A stream that holds nothing but what `needs` cover, made to wait for all of them."""
        covered = 0
        for work in needs:
            covered |= work.covers
        fit = [tail for tail in self._tails.values() if covered >> tail.number & 1]
        stream = max(fit, key=lambda tail: tail.number).stream if fit else self._unused()
        if all(work.stream is not stream for work in needs):
            self.nodes.forget(stream.cuda_stream)
        for work in needs:
            if work.stream is not stream:
                stream.wait_event(work.event)
        return stream

    def _unused(self) -> torch.cuda.Stream:
        for stream in self._streams:
            if stream not in self._tails:
                return stream
        self._streams.append(torch.cuda.Stream())
        return self._streams[-1]

    def _saw(self, site: Site, args: tuple[Any, ...], result: Any) -> None:
        """A site has its result, which the observer is to be told of."""
        if self.observer is not None:
            self._untold.append((site, args, result))
            if self.observer.due(site):
                self._tell()

    def _tell(self) -> None:
        """Tell the observer of the sites since the last time, on its branch, which waits for them."""
        if self.observer is None or self._beside is None:
            return
        for work in _last_ones(self._tails.values()):
            self._beside.wait_event(work.event)
        with torch.cuda.stream(self._beside):
            order = {path: number for number, (path, _, _) in enumerate(self.sites)}
            for site, args, result in sorted(self._untold, key=lambda seen: order[seen[0].path]):
                self.observer.after(site, args, result)
            if self._untold:
                self.observer.look()
        self._untold.clear()
        self._count = self.nodes.count()


def _last_ones(works: Iterable[_Work]) -> list[_Work]:
    """Those that no other one of `works` covers."""
    found = list({work.number: work for work in works}.values())
    return [
        work
        for work in found
        if not any(o is not work and o.covers >> work.number & 1 for o in found)
    ]


def _made(result: Any) -> set[int]:
    return storages(result if isinstance(result, tuple) else (result,))


class _Between(TorchDispatchMode):
    """Tells of the tensors that torch makes, so that those made outside of sites are known."""

    def __init__(self, branches: Branches) -> None:
        super().__init__()
        self.branches = branches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = storages(tree_leaves((args, kwargs)))
        self.branches.made_between(storages(tree_leaves(result)) - old)
        return result
