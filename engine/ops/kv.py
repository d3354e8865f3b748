"""Moving KV rows: into the caches, and together for one attention call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.kv_entry import pack
from dsv4_bench.engine.registry import nbytes, op


def _write_traffic(a: dict[str, Any]) -> int:
    """Rows read and written; the rest of the cache is not touched."""
    written = int((a["slots"] >= 0).sum())
    row = sum(a[name].shape[1] * a[name].element_size() for name in ("rows", "cache"))
    return nbytes(a["slots"]) + written * row


def _as_stored(rows: Tensor, pool: Tensor) -> Tensor:
    """`rows` as `pool` holds them: packed entries where it is uint8, else its dtype."""
    return pack(rows, pool.shape[1]) if pool.dtype == torch.uint8 else rows.to(pool.dtype)


@op("cache_write", outputs=(), mutates=("cache",), traffic=_write_traffic)
def cache_write(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """cache[slots[i]] = rows[i], in place: rows [m, d], slots [m] int64 in [0, r), cache [r, d].

    A slot of -1 is skipped (a prefill longer than the window writes only its last rows). A cache
    that is uint8 [r, bytes] gets packed entries, see kv_entry.py: bit for bit, whatever packs them.
    """
    if bool((slots < 0).any()):
        keep = slots >= 0
        rows, slots = rows[keep], slots[keep]
    cache[slots] = _as_stored(rows, cache)


@op("gather_swa", outputs=("window",))
def gather_swa(ring: Tensor, kv: Tensor) -> Tensor:
    """The rows a chunk's sliding windows can reach: ring [r, hd] and kv [n, hd] -> [r + n, hd].

    Row i < r is ring slot i (tokens before this chunk), row r + i is the chunk's token i;
    `Step.window_rows` indexes it. A ring of packed entries, uint8 [r, bytes], is followed by the
    chunk's tokens packed alike: what is attended to does not depend on how a text is cut.
    """
    return torch.cat((ring, _as_stored(kv, ring)))
