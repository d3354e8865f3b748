"""The `sm90` implementation of the sparse attention core.

Contract: that of the reference in `ops`. Nothing here synchronises with the GPU. An index past the
end of its pool stops the kernel, as it does in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
    {"attention": (P, P, N, P, N, P, N, P, N, P, F, N, N, N, N, N, N, P, P, P, P, P, P, I)},
)
_KEYS, _HEADS, _MOST_SHARES = 64, 64, 64  # of a block; as in attention_sm90.cu
_DIM, _ROPE = 512, 64  # of what the tensor-core kernels take; rotated by `attention_rope`
# Heads and blocks of keys of a CTA that shares its token with a cluster, the preferred ones first; how
# many such CTAs a processor has room for; the largest cluster.
_FEW = ((16, 1, 2), (32, 2, 1))
_MOST_RANKS = 16


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Plan:
    """How many heads a CTA takes, and how many CTAs share the keys of one token.

    Each share gets the same number of blocks of 64 keys, the last one perhaps fewer, none nothing.
    With 16 or 32 heads the shares are a cluster, which adds them up; with 64 a second kernel does.
    """

    heads: int
    shares: int
    combined: bool = False  # by a second kernel


def plan(n: int, heads: int, widths: tuple[int, int], available: int, few: bool = True) -> Plan:
    """For n tokens on `available` processors; `few`: whether their keys are ones that clusters take."""
    blocks = sum(-(-width // _KEYS) for width in widths)
    for columns, most, resident in _FEW if few else ():
        shares = -(-blocks // most)
        tiles = n * -(-heads // columns)
        if 0 < shares <= _MOST_RANKS and tiles * shares <= resident * available:
            return Plan(columns, shares)
    tiles = n * -(-heads // _HEADS)
    most = min(available // max(tiles, 1), _MOST_SHARES)
    if most < 2 or blocks < 2:
        return Plan(_HEADS, 1)
    if most < 8 and blocks <= 32:
        return Plan(_HEADS, 4 if most >= 4 and 3 * -(-blocks // 4) < blocks else 2)
    return Plan(_HEADS, -(-blocks // -(-blocks // most)), combined=True)


def _plan(q: Tensor, window: Tensor, widths: tuple[int, int]) -> Plan:
    n, heads, dim = q.shape
    few = dim == _DIM and q.dtype == torch.bfloat16
    if window.dtype == torch.uint8:
        few = few and plain_of(dim, window.shape[1]) == _DIM - _ROPE
    return plan(n, heads, widths, processors(q.device), few)


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
    return _launch(q, window, window_index, entries, entry_index, sink, scale, None, None)


def joins_rope(
    q: Tensor, window: Tensor, window_index: Tensor, entry_index: Tensor | None, freqs: Tensor
) -> bool:
    """Whether `attention_rope` takes such arguments: decode of few tokens."""
    width = 0 if entry_index is None else entry_index.shape[1]
    if q.dim() != 3 or 2 * freqs.numel() != _ROPE or not q.numel():
        return False
    return _plan(q, window, (window_index.shape[1], width)).heads < _HEADS


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
) -> Tensor:
    """o of `attention`, then the inverse `rope` by `positions` [n] and `freqs` [32], in one launch.

    To the last bit what the two give one after the other. Takes what `joins_rope` says.
    """
    positions, freqs = typed("rope", positions, torch.int64), floats("rope", freqs)
    if positions.shape != (q.shape[0],) or not joins_rope(
        q, window, window_index, entry_index, freqs
    ):
        wrong("attention_rope", f"positions {list(positions.shape)}, q {list(q.shape)}")
    where, turns = positions.data_ptr(), freqs.data_ptr()
    return _launch(q, window, window_index, entries, entry_index, sink, scale, where, turns)[0]


def _launch(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Tensor | None,
    entry_index: Tensor | None,
    sink: Tensor,
    scale: float,
    positions: int | None,
    freqs: int | None,
) -> tuple[Tensor, Tensor]:
    """o and lse; o turned back where the addresses of positions and freqs are given."""
    op = "attention"
    q, kind = activation(op, q)
    n, heads, dim = q.shape
    window, window_index = _pool(op, window, q), _index(op, window_index, n)
    entry_rows = entry_width = 0
    entry_address = entry_index_address = None
    if entries is not None and entry_index is not None:
        entries, entry_index = _pool(op, entries, q), _index(op, entry_index, n)
        if entries.dtype != window.dtype:
            wrong(op, f"one pool is {window.dtype}, the other {entries.dtype}")
        entry_rows, entry_width = entries.shape[0], entry_index.shape[1]
        entry_address, entry_index_address = entries.data_ptr(), entry_index.data_ptr()
    sink = floats(op, sink)
    if sink.shape != (heads,):
        wrong(op, f"sink is {list(sink.shape)}, q has {heads} heads")
    o = torch.empty_like(q)
    lse = q.new_empty((n, heads), dtype=torch.float32)
    how = _plan(q, window, (window_index.shape[1], entry_width))
    part = part_sums = None
    if how.heads == _HEADS and how.combined:
        part = lse.new_empty((n, heads, how.shares, dim))
        part_sums = lse.new_empty((n, heads, how.shares, 2))
    ATTENTION.call(
        op,
        q,
        q.data_ptr(),
        window.data_ptr(),
        window.shape[0],
        window_index.data_ptr(),
        window_index.shape[1],
        entry_address,
        entry_rows,
        entry_index_address,
        entry_width,
        sink.data_ptr(),
        scale,
        n,
        heads,
        dim,
        plain_of(dim, window.shape[1]) if window.dtype == torch.uint8 else 0,
        how.heads,
        how.shares,
        None if part is None else part.data_ptr(),
        None if part_sums is None else part_sums.data_ptr(),
        positions,
        freqs,
        o.data_ptr(),
        lse.data_ptr(),
        kind,
    )
    return o, lse


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
