"""The `sm90` implementation of the sparse attention core.

Contract: that of the reference in `ops`. Nothing here synchronises with the GPU. An index past the
end of its pool stops the kernel, as it does in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import (
    F,
    I,
    Library,
    N,
    P,
    activation,
    floats,
    sm90,
    typed,
    wrong,
)
from dsv4_bench.engine.kv_entry import plain_of

ATTENTION = Library(
    "attention",
    {
        "attention": (P, P, N, P, N, P, N, P, N, P, F, N, N, N, N, N, N, N, P, P, P, P, P, P, P, I),
        "attention_clusters": (N, P),
    },
)
_KEYS, _HEADS, _MOST_SHARES = 64, 64, 64  # of a block; as in attention_sm90.cu
_DIM, _ROPE = 512, 64  # of what the tensor-core kernels take; rotated by `attention_rope`
# Heads and blocks of keys of a CTA that shares its token with a cluster, the preferred ones first.
_FEW = ((16, 1), (16, 2), (32, 2))
_MOST_RANKS = 16
# Measured, us (docs/cuda_attention.md): a CTA of 64 heads, for each block of keys; a second CTA that
# joins; a second kernel, and what it has to read: for the square of the number of shares.
_ALONE, _BLOCK, _JOINED, _COMBINED, _SHARES = 6.0, 1.67, 2.8, 4.6, 0.0006


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def clusters(device: torch.device, ranks: int) -> int:
    """How many clusters of `ranks` CTAs `device` runs at once, each CTA alone on its processor."""
    count = ctypes.c_int()
    on = torch.empty(0, device=device)
    ATTENTION.call("attention_clusters", on, ranks, ctypes.addressof(count))
    return count.value


@dataclass(frozen=True)
class Plan:
    """How many heads a CTA takes, and how many CTAs share the keys of one token.

    Each share gets the same number of blocks of 64 keys, the last one perhaps fewer, none nothing.
    With 16 or 32 heads, or two shares of 64, the shares are a cluster, which adds them up.
    """

    heads: int
    shares: int
    combined: bool = False  # by a second kernel


def plan(
    n: int,
    heads: int,
    widths: tuple[int, int],
    available: int,
    at_once: Callable[[int], int] | None = None,
) -> Plan:
    """For n tokens on `available` processors.

    `at_once`: how many clusters of so many CTAs run at once, None for keys that clusters do not take.
    """
    blocks = sum(-(-width // _KEYS) for width in widths)
    for columns, each in _FEW:
        ranks, tiles = -(-blocks // each), n * -(-heads // columns)
        if at_once is None or not 0 < ranks <= _MOST_RANKS or (columns == 32 and blocks <= 3):
            continue
        if tiles <= at_once(ranks):
            return Plan(columns, ranks)
    found = _plans_of_tiles(n * -(-heads // _HEADS), blocks, available)
    return min(found, key=lambda pair: pair[0])[1]


def _plans_of_tiles(tiles: int, blocks: int, available: int) -> list[tuple[float, Plan]]:
    """Each with its time."""
    found = [(_ALONE + _BLOCK * blocks, Plan(_HEADS, 1))]
    if blocks > 1 and 2 * tiles <= available:
        found.append((_ALONE + _JOINED + _BLOCK * -(-blocks // 2), Plan(_HEADS, 2)))
    # With every processor taken the second kernel starts late.
    for shares in range(2, min(_MOST_SHARES, 9 * available // (10 * max(tiles, 1))) + 1):
        each = -(-blocks // shares)
        if (shares - 1) * each < blocks:
            time = _ALONE + _BLOCK * each + _COMBINED + _SHARES * (tiles * shares) ** 2
            found.append((time, Plan(_HEADS, shares, combined=True)))
    return found


@lru_cache
def _plan_on(device: torch.device, n: int, heads: int, widths: tuple[int, int], few: bool) -> Plan:
    at_once = partial(clusters, device) if few else None
    return plan(n, heads, widths, processors(device), at_once)


def _plan(q: Tensor, window: Tensor, widths: tuple[int, int], n: int) -> Plan:
    """For n tokens like those of q."""
    heads, dim = q.shape[1:]
    few = dim == _DIM and q.dtype == torch.bfloat16
    if window.dtype == torch.uint8:
        few = few and plain_of(dim, window.shape[1]) == _DIM - _ROPE
    return _plan_on(q.device, n, heads, widths, few)


def last_tokens(n: int, heads: int, available: int, plan_of: Callable[[int], Plan]) -> int:
    """How many of n tokens are better launched by themselves, in clusters.

    A CTA of 64 heads takes one token after another. What remains when all processors have had the same
    number would keep a few of them for as long as a whole round.
    """
    groups = -(-heads // _HEADS)
    if n * groups <= available:
        return 0
    rest = -(-(n * groups % available) // groups)
    return rest if rest and plan_of(rest).heads < _HEADS else 0


def _last_tokens(q: Tensor, window: Tensor, widths: tuple[int, int]) -> int:
    plan_of = partial(_plan, q, window, widths)
    return last_tokens(q.shape[0], q.shape[1], processors(q.device), plan_of)


@sm90("attention", ATTENTION)
def attention(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Tensor | None,
    entry_index: Tensor | None,
    *,
    sink: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _launch(q, window, window_index, entries, entry_index, sink, scale)


def joins_rope(
    q: Tensor, window: Tensor, window_index: Tensor, entry_index: Tensor | None, freqs: Tensor
) -> bool:
    """Whether `attention_rope` takes such arguments: decode of few tokens."""
    width = 0 if entry_index is None else entry_index.shape[1]
    if q.dim() != 3 or 2 * freqs.numel() != _ROPE or not q.numel():
        return False
    return _plan(q, window, (window_index.shape[1], width), q.shape[0]).heads < _HEADS


def attention_rope(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Tensor | None,
    entry_index: Tensor | None,
    positions: Tensor,
    *,
    sink: Tensor,
    scale: float,
    freqs: Tensor,
    outs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """o of `attention`, then the inverse `rope` by `positions` [n] and `freqs` [32], in one launch.

    To the last bit what the two give one after the other; what the first returns, o like q and lse [n, h]
    float32, goes to `outs`. Takes what `joins_rope` says.
    """
    positions, freqs = typed("rope", positions, torch.int64), floats("rope", freqs)
    if positions.shape != (q.shape[0],) or not joins_rope(
        q, window, window_index, entry_index, freqs
    ):
        wrong("attention_rope", f"positions {list(positions.shape)}, q {list(q.shape)}")
    turned = _Turned(positions, freqs, *(outs or (None, None)))
    return _launch(q, window, window_index, entries, entry_index, sink, scale, turned)[0]


class _Turned(NamedTuple):
    """What o is turned back by; and where it goes unturned, and lse, if somebody wants them."""

    positions: Tensor
    freqs: Tensor
    o: Tensor | None
    lse: Tensor | None


def _launch(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Tensor | None,
    entry_index: Tensor | None,
    sink: Tensor,
    scale: float,
    turned: _Turned | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse; o turned back by `turned`."""
    op = "attention"
    q, kind = activation(op, q)
    n, heads, dim = q.shape
    window, window_index = _pool(op, window, q), _index(op, window_index, n)
    entry_rows = entry_width = 0
    entry_address = None
    if entries is None or entry_index is None:
        entry_index = None
    else:
        entries, entry_index = _pool(op, entries, q), _index(op, entry_index, n)
        if entries.dtype != window.dtype:
            wrong(op, f"one pool is {window.dtype}, the other {entries.dtype}")
        entry_rows, entry_width = entries.shape[0], entry_index.shape[1]
        entry_address = entries.data_ptr()
    sink = floats(op, sink)
    if sink.shape != (heads,):
        wrong(op, f"sink is {list(sink.shape)}, q has {heads} heads")
    o = torch.empty_like(q)
    lse = turned.lse if turned else None
    if lse is None:
        lse = q.new_empty((n, heads), dtype=torch.float32)
    widths = window_index.shape[1], entry_width
    turns = turned[:3] if turned else (None, None, None)
    cut = n - _last_tokens(q, window, widths)  # n with `turned`: joins_rope takes few
    for first, tokens in ((0, cut), (cut, n - cut)) if cut < n else ((0, n),):
        how = _plan(q, window, widths, tokens)
        sums = softmax = None
        if how.combined:
            sums = lse.new_empty((tokens, heads, how.shares, dim))
            softmax = lse.new_empty((tokens, heads, how.shares, 2))
        ATTENTION.call(
            op,
            q,
            _address(q, first),
            window.data_ptr(),
            window.shape[0],
            _address(window_index, first),
            window_index.shape[1],
            entry_address,
            entry_rows,
            None if entry_index is None else _address(entry_index, first),
            entry_width,
            sink.data_ptr(),
            scale,
            tokens,
            heads,
            dim,
            plain_of(dim, window.shape[1]) if window.dtype == torch.uint8 else 0,
            how.heads,
            how.shares,
            first > 0,  # beside the others, which read the same inputs
            None if sums is None else sums.data_ptr(),
            None if softmax is None else softmax.data_ptr(),
            *(None if tensor is None else tensor.data_ptr() for tensor in turns),
            _address(o, first),
            _address(lse, first),
            kind,
        )
    return o, lse


def _address(rows: Tensor, first: int) -> int:
    """Of row `first` of a contiguous tensor."""
    return rows.data_ptr() + first * rows.stride(0) * rows.element_size()


def _pool(op: str, pool: Tensor, q: Tensor) -> Tensor:
    """A pool of keys [rows, head width] in q's dtype, or of packed entries [rows, bytes]."""
    if pool.dim() == 2 and pool.dtype == torch.uint8:
        plain_of(q.shape[2], pool.shape[1])
        return typed(op, pool, torch.uint8)
    if pool.dim() != 2 or pool.shape[1] != q.shape[2]:
        wrong(op, f"a pool is {list(pool.shape)}, q {list(q.shape)}")
    if pool.dtype != q.dtype and (pool.dtype, q.dtype) != (torch.bfloat16, torch.float32):
        wrong(op, f"a pool is {pool.dtype}, q {q.dtype}")
    return typed(op, pool, q.dtype)


def _index(op: str, index: Tensor, n: int) -> Tensor:
    if index.dim() != 2 or index.shape[0] != n:
        wrong(op, f"an index is {list(index.shape)}, q has {n} tokens")
    return typed(op, index, torch.int32)
