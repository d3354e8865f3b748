"""Which sites of a decode step share a launch while it is captured; fused.py has the launches.

A capture asks before it runs a site. The first sites of a chain are put off: they return tensors that are
not filled yet, which only the chain's own sites may be given, and its last site launches for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.fused import KINDS, Chain, Kind, may_begin, put_off
from dsv4_bench.engine.registry import Site


@dataclass
class Call:
    """What to do for a site: `run` it, with launches that read `args` and write `writes` beside what the
    site itself does; or nothing now, `result` is known."""

    args: tuple[Any, ...]
    run: Callable[[], Any] | None
    result: Any = None
    writes: tuple[Any, ...] = ()


class Fusions:
    """Which of `sites`, of a model whose activations are `dtype`, become one launch; with `wanted` False
    none do. `layers` are those that will be captured; None for all."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        wanted: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        layers: range | None = None,
    ) -> None:
        self._sites, self._dtype, self._layers = sites, dtype, layers
        self._kinds = {kind.first: kind for kind in KINDS} if wanted else {}
        self._expected: dict[str, Chain] = {}  # by the path of the chain's next site
        self._unfilled: dict[int, Chain] = {}  # by address

    def take(self, site: Site, args: tuple[Any, ...]) -> Call:
        """How to run `site`. Raises RuntimeError for one that reads what only a chain may read."""
        chain = self._expected.pop(site.path, None)
        if any(self._unfilled.get(address, chain) is not chain for address in _addresses(args)):
            raise RuntimeError(f"{site.path} reads what a later launch computes")
        if chain is None:
            chain = self._begin(site, args)
            if chain is None:
                return Call(args, lambda: site.run(args))
        elif not _follows(chain, args):
            raise RuntimeError(f"{site.path} does not read what {chain.sites[-1].path} returns")
        chain.sites.append(site)
        chain.args.append(args)
        if chain.left:
            self._expected[chain.left.pop(0).path] = chain
            later = put_off(site, args, self._dtype)
            chain.results.append(later)
            self._unfilled |= dict.fromkeys(_addresses(later), chain)
            return Call(args, None, later)
        return self._launched(chain)

    def _launched(self, chain: Chain) -> Call:
        """The launch that runs all of `chain`."""
        inside = _addresses(chain.results)
        for address in inside:
            del self._unfilled[address]
        reads = [a for args in chain.args for a in args if not _addresses(a) & inside]
        writes = []
        for site, args in zip(chain.sites, chain.args, strict=True):
            bound = site.spec.bind(args, {})
            writes += [bound[name] for name in site.spec.mutates]
        return Call(tuple(reads), lambda: chain.kind.launch(chain), writes=tuple(writes))

    def _begin(self, site: Site, args: tuple[Any, ...]) -> Chain | None:
        """The chain that `site` begins, if all of it runs on these kernels."""
        kind = self._kinds.get(site.path.partition("/")[2])
        if kind is None or site.layer is None or not may_begin(site, args):
            return None
        following = self._following(kind, site.layer)
        kernels = all(s.stamp.implementation == "sm90" for s in (site, *following))
        return Chain(kind, following) if following and kernels else None

    def _following(self, kind: Kind, layer: int) -> list[Site]:
        layer += kind.later
        if self._layers is not None and layer not in self._layers:
            return []
        found = [self._sites.get(f"L{layer}/{name}") for name in kind.then]
        return [] if None in found else [site for site in found if site is not None]


def _follows(chain: Chain, args: tuple[Any, ...]) -> bool:
    """Whether a chain's site reads what the one before returned."""
    return bool(_addresses(args) & _addresses(chain.results[-1]))


def _addresses(value: Any) -> set[int]:
    """Of the memory behind tensors."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr()} - {0}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return set().union(*(_addresses(part) for part in value))
    return set()
