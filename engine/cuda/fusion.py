"""Norm, rope and cache insert of a decode step in one launch, where a graph's sites come one after another.

A capture asks before it runs a site. The first sites of a chain are put off: they return a tensor that
nobody fills, only the chain's last site may be given it, and that one launches for all. The numbers
are those of the sites one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import DTYPES, F, I, Library, N, P, floats
from dsv4_bench.engine.registry import Site

NORM_ROPE = Library("norm_rope", {"norm_rope": (P, N, N, N, P, I, F, P, P, N, P, N, P, N)})
_WIDEST = 512
# By the last parts of a site's path, those that follow it.
CHAINS = {
    "q_head_norm": ("q_rope",),
    "kv_norm": ("kv_rope", "window_write"),
    "compressor/norm": ("rope", "write"),
}


@dataclass
class Call:
    """What to do for a site: `run` it, with launches that read `args`; or nothing now, `result` is known."""

    args: tuple[Any, ...]
    run: Callable[[], Any] | None
    result: Any = None


@dataclass
class _Chain:
    """Sites put off so far with their arguments, and those to come."""

    sites: list[Site]
    args: list[tuple[Any, ...]]
    left: list[Site]


class Fusions:
    """Which of `sites` become one launch; with `wanted` False none do."""

    def __init__(self, sites: Mapping[str, Site], wanted: bool = True) -> None:
        self._sites, self._wanted = sites, wanted
        self._waiting: dict[int, _Chain] = {}  # by the address of the tensor that nobody fills

    def take(self, site: Site, args: tuple[Any, ...]) -> Call:
        """How to run `site`. Raises RuntimeError for one that reads what only a chain may read."""
        chain = self._waiting.pop(_address(args[0]), None)
        if chain is not None and chain.left[0] is site:
            chain.left.pop(0)
        elif chain is not None or any(_address(value) in self._waiting for value in args):
            raise RuntimeError(f"{site.path} reads what a later launch computes")
        else:
            following = self._following(site) if self._wanted else []
            if not following:
                return Call(args, lambda: site.run(args))
            chain = _Chain([], [], following)
        chain.sites.append(site)
        chain.args.append(args)
        if not chain.left:
            read = (chain.args[0][0], *(a for later in chain.args[1:] for a in later[1:]))
            return Call(read, lambda: _launch(chain))
        later = torch.empty_like(args[0])
        self._waiting[_address(later)] = chain
        return Call(args, None, later)

    def _following(self, site: Site) -> list[Site]:
        """The rest of the chain that `site` begins, if all of it runs on these kernels."""
        for name, names in CHAINS.items():
            if site.path.endswith("/" + name):
                parent = site.path.rpartition("/")[0]
                found = [self._sites[f"{parent}/{other}"] for other in names]
                same = all(s.stamp.implementation == "sm90" for s in (site, *found))
                return found if same else []
        return []


def _address(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0


def _launch(chain: _Chain) -> Any:
    norm, rope = chain.sites[:2]
    (x,), (_, positions) = chain.args[:2]
    slots = cache = None
    if len(chain.sites) == 3:
        _, slots, cache = chain.args[2]
    weight = norm.params["weight"]
    if not _fits(x, cache, weight):
        return _one_by_one(chain)
    y = torch.empty_like(x) if cache is None else cache
    freqs = floats("rope", rope.params["freqs"])
    heads = x.shape[1] if x.dim() == 3 else 1
    NORM_ROPE.call(
        "norm_rope",
        x,
        x.data_ptr(),
        x.numel() // x.shape[-1],
        heads,
        x.shape[-1],
        None if weight is None else weight.data_ptr(),
        0 if weight is None else DTYPES[weight.dtype],
        norm.params["eps"],
        positions.data_ptr(),
        freqs.data_ptr(),
        freqs.numel(),
        None if slots is None else slots.data_ptr(),
        y.numel() // y.shape[-1],
        y.data_ptr(),
        x.shape[-1] if cache is None else cache.stride(0),
    )
    return y if cache is None else None


def _fits(x: Tensor, cache: Tensor | None, weight: Tensor | None) -> bool:
    """Whether the kernel takes these: bfloat16 in rows of whole vectors, cached as they are."""
    rows = [x] if cache is None else [x, cache]
    given = rows if weight is None else [*rows, weight]
    return (
        x.shape[-1] <= _WIDEST
        and x.shape[-1] % 8 == 0
        and all(tensor.is_cuda and tensor.is_contiguous() for tensor in given)
        and all(tensor.data_ptr() % 32 == 0 for tensor in given)
        and all(tensor.shape[-1] == x.shape[-1] for tensor in given)
        and all(tensor.dtype == torch.bfloat16 for tensor in rows)
    )


def _one_by_one(chain: _Chain) -> Any:
    result: Any = chain.args[0][0]
    for site, args in zip(chain.sites, chain.args, strict=True):
        result = site.run((result, *args[1:]))
    return result
