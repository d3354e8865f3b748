"""Which sites of a decode step share a launch while it is captured; fused.py has the launches.

A capture asks before it runs a site. The first sites of a chain are put off: they return tensors that are
not filled yet, which only the chain's own sites may be given, and its last site launches for all. Linears
of one input all run at the first of them; the others' results are known when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.fused import (
    JOINS,
    KERNELS,
    KINDS,
    NEXT,
    Chain,
    Kind,
    joined,
    may_begin,
    put_off,
    together,
)
from dsv4_bench.engine.cuda.hyper import Behind
from dsv4_bench.engine.graph_order import GROUPS
from dsv4_bench.engine.registry import Site


@dataclass
class Call:
    """What to do for a site: `run` it, with launches that read `args` and write `writes`
    and, once they are made, `made` beside what the site itself does; or nothing now, `result` is known,
    and will be `filled` later. `earlier`: sites with arguments and results which the launch fills then;
    `behind`: launches that go behind this one, once it is made."""

    args: tuple[Any, ...]
    run: Callable[[], Any] | None
    result: Any = None
    writes: tuple[Any, ...] = ()
    made: list[Any] = field(default_factory=list)
    filled: bool = True
    earlier: list[tuple[Site, tuple[Any, ...], Any]] = field(default_factory=list)
    behind: list[Behind] = field(default_factory=list)


class Fusions:
    """Which of `sites`, of a model whose activations are `dtype`, become one launch; with `wanted` False
    none do. `layers` are those that will be captured; None for all. `observed`: somebody looks at what
    every site returns, so that launches fill it all."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        wanted: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        layers: range | None = None,
        observed: bool = False,
    ) -> None:
        self._sites, self._dtype, self._layers = sites, dtype, layers
        self._observed = observed
        self._kinds = {kind.first: kind for kind in KINDS} if wanted else {}
        self._joins = {join.first: join for join in JOINS} if wanted else {}
        self._groups = {name: group for group in GROUPS for name in group} if wanted else {}
        self._known: dict[str, tuple[Tensor, Any]] = {}  # by path: input and result of a linear
        self._expected: dict[str, Chain] = {}  # by the path of the chain's next site
        self._unfilled: dict[int, Chain] = {}  # by address

    def group_of(self, site: Site, args: tuple[Any, ...]) -> list[tuple[Site, tuple[Any, ...]]]:
        """`site` and those of graph_order.GROUPS, with their arguments, in order of capture."""
        group = self._groups.get(site.path.partition("/")[2], ())
        found = [self._sites.get(f"L{site.layer}/{name}") for name in group]
        sites = [other for other in found if other is not None]
        if not sites or any(other.stamp.implementation not in KERNELS for other in sites):
            sites = [site]
        return [(other, args if other is site else args[:1]) for other in sites]

    def take(self, site: Site, args: tuple[Any, ...]) -> Call:
        """How to run `site`. Raises RuntimeError for one that reads what only a chain may read."""
        chain = self._expected.pop(site.path, None)
        if any(self._unfilled.get(address, chain) is not chain for address in _addresses(args)):
            raise RuntimeError(f"{site.path} reads what a later launch computes")
        if chain is None:
            chain = self._begin(site, args)
            if chain is None:
                return self._alone(site, args)
        elif not _follows(chain, args):
            raise RuntimeError(f"{site.path} does not read what {chain.sites[-1].path} returns")
        chain.sites.append(site)
        chain.args.append(args)
        if chain.left:
            self._expected[chain.left.pop(0).path] = chain
            later = put_off(site, args, self._dtype)
            chain.results.append(later)
            self._unfilled |= dict.fromkeys(_addresses(later), chain)
            return Call(args, None, later, filled=False)
        return self._launched(chain)

    def _alone(self, site: Site, args: tuple[Any, ...]) -> Call:
        """A site of no chain, with the others of its join."""
        x, result = self._known.pop(site.path, (None, None))
        if x is not None and x is args[0]:
            return Call(args, None, result)
        sites = self._joined(site, args)
        if not sites:
            return Call(args, lambda: site.run(args))

        def run() -> Tensor:
            first, *others = joined(sites, args[0])
            self._known |= {s.path: (args[0], y) for s, y in zip(sites[1:], others, strict=True)}
            call.made += others
            return first

        call = Call(args, run)
        return call

    def _joined(self, site: Site, args: tuple[Any, ...]) -> list[Site]:
        """`site` and the others that run with it; none if it runs alone."""
        join = self._joins.get(site.path.partition("/")[2])
        if join is None or site.layer is None:
            return []
        others = (self._sites.get(f"L{site.layer}/{name}") for name in join.others)
        sites = [site, *(other for other in others if other is not None)]
        kernels = all(s.stamp.implementation in KERNELS for s in sites)
        return sites if kernels and len(sites) > 1 and together(sites, args[0]) else []

    def _launched(self, chain: Chain) -> Call:
        """The launch that runs all of `chain`."""
        inside = _addresses(chain.results)
        for address in inside:
            del self._unfilled[address]
        reads = [a for args in chain.args for a in args if not _addresses(a) & inside]
        writes = list(chain.results)  # those that others may read after the launch
        for site, args in zip(chain.sites, chain.args, strict=True):
            bound = site.spec.bind(args, {})
            writes += [bound[name] for name in site.spec.mutates]

        def run() -> Any:
            result = chain.kind.launch(chain)
            call.behind += chain.behind
            if self._observed:
                call.made += _tensors(chain.results)
                inner = zip(chain.sites[:-1], chain.args[:-1], chain.results, strict=True)
                call.earlier = list(inner)
            return result

        call = Call(tuple(reads), run, writes=tuple(_tensors(writes)))
        return call

    def _begin(self, site: Site, args: tuple[Any, ...]) -> Chain | None:
        """The chain that `site` begins, if all of it runs on these kernels."""
        kind = self._kinds.get(site.path.partition("/")[2])
        following = self._following(kind, site.layer) if kind and site.layer is not None else []
        if kind is None or not following:
            return None
        kernels = all(s.stamp.implementation in KERNELS for s in (site, *following))
        fits = kernels and may_begin(site, args, following)
        return Chain(kind, following, observed=self._observed) if fits else None

    def _following(self, kind: Kind, layer: int) -> list[Site]:
        found = []
        for name in kind.then:
            number = layer + name.startswith(NEXT)
            site = self._sites.get(f"L{number}/{name.removeprefix(NEXT)}")
            if site is None or (self._layers is not None and number not in self._layers):
                return []
            found.append(site)
        return found


def _follows(chain: Chain, args: tuple[Any, ...]) -> bool:
    """Whether a chain's site reads what the one before returned."""
    return bool(_addresses(args) & _addresses(chain.results[-1]))


def _tensors(value: Any) -> list[Tensor]:
    """Those in nested tuples and lists."""
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _addresses(value: Any) -> set[int]:
    """Of the memory behind tensors."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(value)} - {0}
