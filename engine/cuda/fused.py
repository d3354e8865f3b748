"""Launches that do the work of several sites of a decode step, and which sites those are.

The numbers are those of the sites one by one, to the last bit but for linears of one input and for the streams
of up to 8 tokens, which add in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.attention import attention_rope, joins_rope
from dsv4_bench.engine.cuda.compressor import compressed_entry, entry_fits
from dsv4_bench.engine.cuda.hyper import Behind, hc_post_pre_norm, joins_norm, joins_sum
from dsv4_bench.engine.cuda.indexer import rope_index_score
from dsv4_bench.engine.cuda.library import DTYPES, F, I, Library, N, P, floats
from dsv4_bench.engine.cuda.linears import joins_linears, linears
from dsv4_bench.engine.registry import Site

NORM_ROPE = Library("norm_rope", {"norm_rope": (P, N, N, N, P, I, F, P, P, N, P, N, P, N, P, P)})
_WIDEST = 512
NEXT = "next/"  # before the path of a site that is in the layer after
# Implementations that these launches may stand for: the second is the first for few rows.
KERNELS = ("sm90", "sm90+cutedsl")


@dataclass
class Chain:
    """Sites that one launch runs, with their arguments and what they have returned; and those to come."""

    kind: Kind
    left: list[Site]
    sites: list[Site] = field(default_factory=list)
    args: list[tuple[Any, ...]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)  # of all but the last
    observed: bool = False  # whether somebody looks at these
    behind: list[Behind] = field(default_factory=list)  # launches that the one here leaves to do


@dataclass(frozen=True)
class Kind:
    """A site (path below its layer) and those that follow it, after NEXT in the next layer; `launch(chain)`
    runs all and returns the last one's result; where the chain is observed it fills what the others return."""

    first: str
    then: tuple[str, ...]
    launch: Callable[[Chain], Any]


@dataclass(frozen=True)
class Join:
    """A linear, and others of the same layer that are given the same input: all of them run at the first."""

    first: str
    others: tuple[str, ...]


def put_off(site: Site, args: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """What `site`, of a model whose activations are `dtype`, returns when a later launch does its work."""
    if site.op == "compressor":  # already in what it is rounded to before its norm
        ratio, width = site.params["ape"].shape
        overlap = args[2].shape[1] == 2 * ratio
        shape = len(args[4].lengths), width // 2 if overlap else width
        return torch.empty(shape, dtype=dtype, device=args[0].device)
    if site.op == "moe_sum":
        return torch.empty_like(args[0], dtype=dtype)
    if site.op == "hc_post":
        return torch.empty_like(args[1])
    if site.op == "hc_pre":
        n, hc, d = args[0].shape
        gates = ((n, hc), (n, hc, hc))
        post, comb = (torch.empty(s, dtype=torch.float32, device=args[0].device) for s in gates)
        return torch.empty((n, d), dtype=args[0].dtype, device=args[0].device), post, comb
    if site.op == "attention":
        q = args[0]
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        return torch.empty_like(q), lse
    return torch.empty_like(args[0])


def may_begin(site: Site, args: tuple[Any, ...], following: list[Site]) -> bool:
    """Whether a chain that begins with this call is one launch, as far as the call shows it."""
    if site.op == "compressor":  # only where every sequence gets a row
        return bool(args[4].padded and args[4].is_decode)
    if site.op == "hc_post":
        return joins_norm(args[1])
    if site.op == "moe_sum":
        return joins_sum(*args, **site.params)
    if site.op == "attention":
        q, window, window_index, _, entry_index = args
        return joins_rope(q, window, window_index, entry_index, following[0].params["freqs"])
    return True


def together(sites: list[Site], x: Tensor) -> bool:
    """Whether linears of x are one launch."""
    params = [site.params for site in sites]
    return joins_linears(x, [p["weight"] for p in params], [p["out_dtype"] for p in params])


def joined(sites: list[Site], x: Tensor) -> list[Tensor]:
    """The results of linears of x."""
    params = [site.params for site in sites]
    return linears(x, [p["weight"] for p in params], [p["out_dtype"] for p in params])


# ------------------------------------------------------------------------------ norm, rope, write


def norm_rope(chain: Chain) -> Any:
    """rms_norm and rope; and cache_write, which returns nothing, if the chain has it."""
    norm, rope = chain.sites[:2]
    (x,), (_, positions) = chain.args[:2]
    slots = cache = None
    if len(chain.sites) == 3:
        _, slots, cache = chain.args[2]
    weight = norm.params["weight"]
    inner = chain.results if chain.observed else []
    if not _fits(x, cache, weight):
        return _one_by_one(chain.sites, chain.args, inner)
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
        *(None if place >= len(inner) else inner[place].data_ptr() for place in range(2)),
    )
    return y if cache is None else None


def entry(chain: Chain) -> None:
    """Pool, norm, rope and write of a compressor."""
    pool, norm, rope, _ = chain.sites
    first, (later,), (_, positions), (_, slots, entries) = chain.args
    weight, ape = norm.params["weight"], pool.params["ape"]
    inner = chain.results[1:] if chain.observed else []
    if entry_fits(*first, ape=ape) and _fits(later, entries, weight):
        pooled = torch.empty(later.shape, dtype=torch.float32, device=later.device)
        compressed_entry(
            *first,
            ape=ape,
            weight=weight,
            eps=norm.params["eps"],
            positions=positions,
            freqs=floats("rope", rope.params["freqs"]),
            slots=slots,
            entries=entries,
            outs=(pooled, *inner) if chain.observed else None,
        )
    else:
        pooled = pool.run(first)
        _one_by_one(chain.sites[1:], [(pooled.to(later.dtype),), *chain.args[2:]], inner)
    if chain.observed:
        chain.results[0] = pooled  # which `later` is rounded from


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


def _one_by_one(
    sites: list[Site], args: list[tuple[Any, ...]], inner: Sequence[Tensor] = ()
) -> Any:
    """Each on the result of the one before; those of the first also into `inner`."""
    result: Any = args[0][0]
    for number, (site, given) in enumerate(zip(sites, args, strict=True)):
        result = site.run((result, *given[1:]))
        if number < len(inner):
            inner[number].copy_(result)
    return result


# ------------------------------------------------------------------------------ the others


def streams(chain: Chain) -> Tensor:
    """hc_post, the next hc_pre, and the norm of its result; first moe_sum, if the chain has it. hc_pre within
    rounding."""
    *_, pre, norm = chain.sites
    parts = chain.args[0] if chain.sites[0].op == "moe_sum" else None
    y, x, *gates = chain.args[-3]
    new, inner = chain.results[-2:]
    by: dict[str, Any] = {"weight": norm.params["weight"], "weight_eps": norm.params["eps"]}
    by |= {"outs": (new, *inner), "parts": parts, "behind": chain.behind}
    return hc_post_pre_norm(y, x, gates[0], gates[1], **by, **pre.params)[-1]


def core(chain: Chain) -> Tensor:
    """Attention and the inverse rope of its result."""
    attention, rope = (site.params for site in chain.sites)
    args = (*chain.args[0], chain.args[1][1])  # the rope's positions
    outs = chain.results[0] if chain.observed else None
    return attention_rope(*args, **attention, freqs=rope["freqs"], outs=outs)


def scores(chain: Chain) -> Tensor:
    """Rope of the indexer's queries, and their scores."""
    rope, score = (site.params for site in chain.sites)
    args = (chain.args[0][0], *chain.args[1][1:])
    turned = chain.results[0] if chain.observed else None
    return rope_index_score(*args, freqs=rope["freqs"], turned=turned, **score)


# ------------------------------------------------------------------------------ which sites

_NEXT_INPUT = (NEXT + "attn/hc_pre", NEXT + "attn/norm")
_COMPRESSORS = ("attn/compressor", "attn/index/compressor")
KINDS = (
    Kind("attn/q_head_norm", ("attn/q_rope",), norm_rope),
    Kind("attn/kv_norm", ("attn/kv_rope", "attn/window_write"), norm_rope),
    *(Kind(f"{c}/pool", (f"{c}/norm", f"{c}/rope", f"{c}/write"), entry) for c in _COMPRESSORS),
    *(Kind(f"{c}/norm", (f"{c}/rope", f"{c}/write"), norm_rope) for c in _COMPRESSORS),
    Kind("attn/index/rope", ("attn/index/score",), scores),
    Kind("attn/core", ("attn/o_rope",), core),
    Kind("attn/hc_post", ("ffn/hc_pre", "ffn/norm"), streams),
    Kind("ffn/sum", ("ffn/hc_post", *_NEXT_INPUT), streams),
    Kind("ffn/hc_post", _NEXT_INPUT, streams),
)
JOINS = (
    Join(
        "attn/wq_a",
        (
            "attn/wkv",
            *(f"attn/index/compressor/{leaf}" for leaf in ("wkv", "wgate")),
            "attn/index/weights_proj",
        ),
    ),
    Join("attn/compressor/wkv", ("attn/compressor/wgate",)),
)
