"""Faults of moving rows: the window ring, the entries, gathering, the embedding"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.probes.faults.base import fault, remembered, right

cache_write = right("cache_write")
gather_swa = right("gather_swa")
embed = right("embed")


@fault(
    op="cache_write",
    sites="L2/attn/window_write",
    kinds="shifted",
    source="slot of position p is p mod 128",
)
def ring_off_by_one(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Every row goes into the slot after its own."""
    cache_write(rows, torch.where(slots >= 0, (slots + 1) % len(cache), slots), cache)


@fault(
    op="cache_write",
    sites="L1/attn/window_write",
    kinds="stale",
    source="slot = min(p, 127): written until the window is full, then no more",
)
def full_ring_not_overwritten(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """A slot that holds a row already keeps it."""
    used = cache[slots.clamp(min=0)].abs().amax(1) > 0
    cache_write(rows, torch.where(used, -1, slots), cache)


@fault(
    op="cache_write",
    sites="L0/attn/window_write",
    kinds="rows stale",
    why="some rows of the ring keep their old contents",
    source="a copy in vectors of 8 rows",
)
def last_rows_not_written(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Rows beyond the last full group of 8 are not written, unless there are fewer than 8."""
    count = len(rows) // 8 * 8 or len(rows)
    cache_write(rows[:count], slots[:count], cache)


@fault(
    op="cache_write",
    sites="L2/attn/compressor/write",
    kinds="shifted",
    source="entry j in row j, counted from 1",
)
def entries_one_row_late(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Entry j is written to row j + 1."""
    cache_write(rows, (slots + 1).clamp(max=len(cache) - 1), cache)


@fault(
    op="cache_write",
    sites="L4/attn/window_write",
    kinds="columns halves_swapped permuted",
    why="the roped columns of a row are stored in front of the others",
    source="byte layouts of KV rows differ: roped part first or last",
)
def roped_part_stored_first(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """A row is stored with its last eighth, the roped dims, in front."""
    cache_write(rows.roll(rows.shape[1] // 8, 1), slots, cache)


@fault(
    op="cache_write",
    sites="L3/attn/window_write",
    kinds="columns unexplained",
    why="all columns but the roped ones are rounded",
    source="an FP8 cache of KV rows where none was asked for",
)
def rows_stored_in_fp8(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """All but the roped dims are rounded to e4m3."""
    nope = rows.shape[1] * 7 // 8
    kept = rows.clone()
    kept[:, :nope] = rows[:, :nope].to(torch.float8_e4m3fn).to(rows.dtype)
    cache_write(kept, slots, cache)


@fault(
    op="gather_swa",
    sites="L3/attn/gather_swa",
    kinds="permuted shifted",
    why="two parts in the other order: rows moved along by the length of one",
    source="ring and chunk concatenated the other way",
)
def chunk_before_ring(ring: Tensor, kv: Tensor) -> Tensor:
    """The chunk's rows come first, the ring's after them."""
    return torch.cat((kv.to(ring.dtype), ring))


@fault(
    op="gather_swa",
    sites="L4/attn/gather_swa",
    kinds="stale",
    source="ring copied once, when the workspace is made",
)
def ring_of_the_first_chunk(ring: Tensor, kv: Tensor) -> Tensor:
    """The ring's rows are those of the first call."""
    # Keyed by the buffer, which a sequence keeps: that is what makes it stale.
    first = remembered(("first ring", ring.shape, id(ring_of_the_first_chunk)), ring.clone)
    return gather_swa(first.to(ring.dtype), kv)


@fault(
    op="gather_swa",
    sites="L2/attn/gather_swa",
    kinds="rows stale shifted",
    why="rows of the ring that this chunk replaces are read after they were overwritten",
    source="the ring written before the chunk's windows are gathered",
)
def overwritten_rows_gathered(ring: Tensor, kv: Tensor) -> Tensor:
    """The ring is read after the chunk's last rows were written into it."""
    late = ring.clone()
    count = min(len(kv), len(ring))
    late[:count] = kv[-count:]
    return gather_swa(late, kv)


@fault(
    op="embed",
    sites="embed",
    kinds="columns flushed",
    why="three of four streams are zero",
    source="NVIDIA-NeMo/Automodel issue 2039: streams start as copies",
)
def first_stream_only(tokens: Tensor, *, weight: Weight, hc: int, dtype: torch.dtype) -> Tensor:
    """The embedding is put into stream 0 and the others start at zero."""
    x = embed(tokens, weight=weight, hc=hc, dtype=dtype)
    x[:, 1:] = 0
    return x


@fault(
    op="embed",
    sites="embed",
    kinds="shifted",
    source="an id offset of 1",
)
def next_tokens_embedding(tokens: Tensor, *, weight: Weight, hc: int, dtype: torch.dtype) -> Tensor:
    """Token ids are looked up one too high."""
    return embed((tokens + 1) % weight.shape[0], weight=weight, hc=hc, dtype=dtype)
