"""Sites of a decode step that follow one another in one launch: pooling, norm, rope and cache insert.

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

from dsv4_bench.engine.cuda.compressor import compressed_entry, entry_fits
from dsv4_bench.engine.cuda.library import DTYPES, F, I, Library, N, P, floats
from dsv4_bench.engine.registry import Site

NORM_ROPE = Library("norm_rope", {"norm_rope": (P, N, N, N, P, I, F, P, P, N, P, N, P, N)})
_WIDEST = 512
# By the last parts of a site's path, those that follow it.
CHAINS = {
    "q_head_norm": ("q_rope",),
    "kv_norm": ("kv_rope", "window_write"),
    "compressor/pool": ("norm", "rope", "write"),
    "compressor/norm": ("rope", "write"),
}


@dataclass
class Call:
    """What to do for a site: `run` it, with launches that read `args` and write `writes` beside what the
    site itself does; or nothing now, `result` is known."""

    args: tuple[Any, ...]
    run: Callable[[], Any] | None
    result: Any = None
    writes: tuple[Any, ...] = ()


@dataclass
class _Chain:
    """Sites put off so far with their arguments, and those to come."""

    sites: list[Site]
    args: list[tuple[Any, ...]]
    left: list[Site]


class Fusions:
    """Which of `sites`, of a model whose activations are `dtype`, become one launch; with `wanted` False
    none do."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        wanted: bool = True,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._sites, self._wanted, self._dtype = sites, wanted, dtype
        self._waiting: dict[int, _Chain] = {}  # by the address of the tensor that nobody fills

    def take(self, site: Site, args: tuple[Any, ...]) -> Call:
        """How to run `site`. Raises RuntimeError for one that reads what only a chain may read."""
        chain = self._waiting.pop(_address(args[0]), None)
        if chain is not None and chain.left[0] is site:
            chain.left.pop(0)
        elif chain is not None or any(_address(value) in self._waiting for value in args):
            raise RuntimeError(f"{site.path} reads what a later launch computes")
        else:
            following = self._following(site, args) if self._wanted else []
            if not following:
                return Call(args, lambda: site.run(args))
            chain = _Chain([], [], following)
        chain.sites.append(site)
        chain.args.append(args)
        if not chain.left:
            first, spec = chain.args[0], chain.sites[0].spec
            read = (*first, *(a for later in chain.args[1:] for a in later[1:]))
            written = spec.bind(first, {})
            writes = tuple(written[name] for name in spec.mutates)
            return Call(read, lambda: _launch(chain), writes=writes)
        later = self._pooled(site, args) if site.op == "compressor" else torch.empty_like(args[0])
        self._waiting[_address(later)] = chain
        return Call(args, None, later)

    def _pooled(self, site: Site, args: tuple[Any, ...]) -> Tensor:
        """What a pool of a padded step returns, in the dtype that it is rounded to before its norm."""
        ratio, width = site.params["ape"].shape
        overlap = args[2].shape[1] == 2 * ratio
        shape = len(args[4].lengths), width // 2 if overlap else width
        return torch.empty(shape, dtype=self._dtype, device=args[0].device)

    def _following(self, site: Site, args: tuple[Any, ...]) -> list[Site]:
        """The rest of the chain that `site` begins, if all of it runs on these kernels."""
        if site.op == "compressor" and not (args[4].padded and args[4].is_decode):
            return []  # not a row for every sequence
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
    if chain.sites[0].op == "compressor":
        return _launch_entry(chain)
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


def _launch_entry(chain: _Chain) -> None:
    """Pool, norm, rope and write of a compressor."""
    pool, norm, rope, _ = chain.sites
    first, (later,), (_, positions), (_, slots, entries) = chain.args
    weight, ape = norm.params["weight"], pool.params["ape"]
    if not (entry_fits(*first, ape=ape) and _fits(later, entries, weight)):
        pooled = pool.run(first).to(later.dtype)
        _one_by_one(_Chain(chain.sites[1:], [(pooled,), *chain.args[2:]], []))
        return
    compressed_entry(
        *first,
        ape=ape,
        weight=weight,
        eps=norm.params["eps"],
        positions=positions,
        freqs=floats("rope", rope.params["freqs"]),
        slots=slots,
        entries=entries,
    )


def _fits(x: Tensor, cache: Tensor | None, weight: Tensor | None) -> bool:
    """Whether the kernels take these: bfloat16 in rows of whole vectors, cached as they are."""
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
