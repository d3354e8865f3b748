"""Weights into the L2 cache before the site that reads them: what is fetched beside which sites of a layer.

Weights are known long before their inputs, and the memory idles while sites that wait for latency run
(norms, hyper-connections, top-k, attention). So in a CUDA graph a launch beside such a site asks for the
weights of later ones. Nothing is written: no result depends on it, and nobody has to wait for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.fused import KERNELS
from dsv4_bench.engine.cuda.library import Library, N, P
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import Site

PREFETCH = Library("prefetch", {"prefetch": (P, P, N, N)})
_GRAIN = 16  # bytes: addresses and sizes are multiples
_MOST_RANGES = 24
BLOCKS = 64


@dataclass(frozen=True)
class Fetch:
    """When the site `beside` may begin, ask for the weights of the sites `of`, `later` layers on."""

    beside: str
    of: tuple[str, ...]
    later: int = 0


PLAN = (
    Fetch("attn/wq_a", ("attn/index/wq_b", "attn/wq_b")),
    Fetch("attn/q_rope", ("attn/wo_a",)),
    Fetch("attn/wo_a", ("attn/wo_b",)),
    Fetch("attn/wo_b", ("ffn/hc_pre", "ffn/gate", "ffn/shared")),
    Fetch(
        "ffn/hc_post",
        (
            "attn/hc_pre",
            "attn/wq_a",
            "attn/wkv",
            "attn/compressor/wkv",
            "attn/compressor/wgate",
            "attn/index/compressor/wkv",
            "attn/index/compressor/wgate",
            "attn/index/weights_proj",
        ),
        later=1,
    ),
)


class Prefetches:
    """What to ask for beside which site, for those of `sites` whose kernels read the weights themselves.

    A launch asks for at most half of the L2 cache: what else is in use has to stay, and weights that
    come too early leave again before they are read.
    """

    def __init__(self, sites: Mapping[str, Site], wanted: bool = True) -> None:
        self._sites = sites
        self._plan = {fetch.beside: fetch for fetch in PLAN} if wanted else {}

    def beside(self, site: Site) -> list[Tensor]:
        """The tensors to ask for when `site` may begin; most often none."""
        layer, _, name = site.path.partition("/")
        fetch = self._plan.get(name)
        if fetch is None or site.layer is None:
            return []
        found: list[Tensor] = []
        for other in fetch.of:
            target = self._sites.get(f"L{site.layer + fetch.later}/{other}")
            if target is not None and target.stamp.implementation in KERNELS:
                found += weights_of(target)
        return found


def weights_of(site: Site) -> list[Tensor]:
    """The tensors that a kernel of `site` reads whole, whatever its inputs."""
    found: list[Tensor] = []
    for name in ("weight", "fn", "expert"):
        value = site.params.get(name)
        for part in value if isinstance(value, tuple) else (value,):
            stored = (part.data, part.scale) if isinstance(part, Weight) else (part,)
            found += [t for t in stored if isinstance(t, Tensor) and t.is_contiguous()]
    return found


def prefetch(tensors: Iterable[Tensor], blocks: int = BLOCKS) -> None:
    """Ask for the memory of contiguous CUDA `tensors`, from front to back, at most half of the L2 cache."""
    fit = [t for t in tensors if t.is_cuda and t.data_ptr() % _GRAIN == 0][:_MOST_RANGES]
    if not fit:
        return
    room = torch.cuda.get_device_properties(fit[0].device).L2_cache_size // 2
    sizes = []
    for tensor in fit:
        sizes.append(min(tensor.nbytes, room) // _GRAIN * _GRAIN)
        room -= sizes[-1]
    count = len(fit)
    where = (ctypes.c_void_p * count)(*(t.data_ptr() for t in fit))
    PREFETCH.call("prefetch", fit[0], where, (ctypes.c_int64 * count)(*sizes), count, blocks)
