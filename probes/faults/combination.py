"""Faults of two kernels together: each is right with any other partner, wrong with this one

Every part obeys its op's contract when it runs alone; what breaks is something that the contract
does not say: strides, memory behind a tensor, a workspace or a table that both use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert, ExpertBank
from dsv4_bench.probes.faults.base import STATE, fault, remembered, right

hc_pre = right("hc_pre")
hc_post = right("hc_post")
linear = right("linear")
rms_norm = right("rms_norm")
rope = right("rope")
attention = right("attention")
gather_swa = right("gather_swa")
cache_write = right("cache_write")

# ------------------------------------------------------------------------------ strides


@fault(
    op="hc_pre",
    name="comb_strides_ignored",
    sites="L2/attn/hc_pre",
    kinds="transposed",
    source="flashinfer issue 3856, vllm issue 47783: a kernel that ignores strides",
    combination=True,
)
def comb_as_strided_view(x: Tensor, **params: Any) -> tuple[Tensor, Tensor, Tensor]:
    """hc_pre returns comb as a strided view, hc_post reads its memory as if it were contiguous."""
    u, post, comb = hc_pre(x, **params)
    return u, post, comb.transpose(1, 2).contiguous().transpose(1, 2)


@fault(op="hc_post", name="comb_strides_ignored", sites="L2/attn/hc_post", kinds="transposed")
def comb_read_as_contiguous(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The partner of comb_as_strided_view."""
    flat = comb.as_strided(comb.shape, torch.empty(comb.shape).stride())
    return hc_post(y, x, post, flat)


# ------------------------------------------------------------------------------ a shared workspace


def _workspace(key: str, like: Tensor) -> Tensor:
    """A buffer of at least `like`'s size that every call gets again, as [n, ...] like it."""
    size = like.numel()
    buffer = STATE.get(key)
    if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
        buffer = STATE[key] = like.new_zeros(size)
    return buffer[:size].view(like.shape)


@fault(
    op="rms_norm",
    name="workspace_shared_by_norm_and_kv",
    sites="L2/attn/q_norm",
    kinds="stale unexplained",
    why="an output that is overwritten before its last reader: no kind says just that",
    source="two kernels sized the same scratch buffer",
    combination=True,
)
def normed_in_workspace(x: Tensor, *, weight: Tensor | None, eps: float) -> Tensor:
    """q_norm's output lies in a workspace that wkv's kernel uses too, before the indexer reads it."""
    y = rms_norm(x, weight=weight, eps=eps)
    out = _workspace("scratch", y)
    out.copy_(y)
    return out


@fault(
    op="linear",
    name="workspace_shared_by_norm_and_kv",
    sites="L2/attn/wkv",
    kinds="stale unexplained",
)
def kv_through_workspace(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """The partner of normed_in_workspace: partial sums go through the workspace."""
    y = linear(x, weight=weight, out_dtype=out_dtype)
    scratch = _workspace("scratch", y)
    scratch.copy_(y)
    return scratch.clone()


@fault(
    op="experts",
    name="experts_share_output_buffer",
    sites="L3/ffn/experts",
    kinds="stale unexplained",
    why="an output that is overwritten before it is read: no kind says just that",
    source="both expert kernels return the same buffer",
    combination=True,
)
def routed_in_buffer(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """Routed and shared experts return the same buffer, so the shared result is added twice."""
    y = right("experts")(x, routing, experts, bank=bank, limit=limit)
    out = _workspace("expert output", y)
    out.copy_(y)
    return out


@fault(
    op="shared_expert",
    name="experts_share_output_buffer",
    sites="L3/ffn/shared",
    kinds="stale unexplained",
)
def shared_in_buffer(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """The partner of routed_in_buffer."""
    y = right("shared_expert")(x, expert=expert, limit=limit)
    out = _workspace("expert output", y)
    out.copy_(y)
    return out


# ------------------------------------------------------------------------------ memory behind a tensor


@fault(
    op="gather_swa",
    name="padding_read_behind_window",
    sites="L4/attn/gather_swa",
    kinds="nan padding",
    why="NaN that comes from padding",
    source="vllm issue 41249, pytorch issue 193633: 0 x NaN from the rows behind the last",
    combination=True,
)
def gathered_with_padding(ring: Tensor, kv: Tensor) -> Tensor:
    """The gathered window has uninitialised rows behind it, which attention multiplies by zero."""
    rows = gather_swa(ring, kv)
    padded = rows.new_full((len(rows) + 64, rows.shape[1]), torch.nan)
    padded[: len(rows)] = rows
    return padded[: len(rows)]


@fault(
    op="attention",
    name="padding_read_behind_window",
    sites="L4/attn/core",
    kinds="nan padding",
)
def tiles_of_64_rows(q: Tensor, window: Tensor, *rest: Any, **params: Any) -> tuple[Tensor, Tensor]:
    """The partner of gathered_with_padding: the last tile of window rows is read whole."""
    o, lse = attention(q, window, *rest, **params)
    first = window.storage_offset() + window.numel()
    behind = window.untyped_storage().nbytes() // window.element_size() - first
    count = min(-len(window) % 64 * window.shape[1], max(behind, 0))
    if count == 0:
        return o, lse
    tail = window.as_strided((count,), (1,), first)
    return o + (0 * tail.sum()).to(o.dtype), lse


# ------------------------------------------------------------------------------ a shared table


@fault(
    op="rope",
    name="angle_table_shared",
    sites="L4/attn/q_rope L4/attn/o_rope",
    kinds="positions columns",
    why="as an inverse rotation that is not applied: roped columns, not position 0",
    source="cos and sin cached by shape, without the direction",
    combination=True,
)
def angles_cached_by_length(
    x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool
) -> Tensor:
    """cos and sin are kept for the next rope of these positions, which may turn the other way."""
    span = (len(positions), int(positions[0]), int(positions[-1]))
    direction = remembered(("direction", span), lambda: inverse)
    return rope(x, positions, freqs=freqs, inverse=direction)


# ------------------------------------------------------------------------------ a mirrored write


@fault(
    op="gather_swa",
    name="ring_aliases_gathered_window",
    sites="L3/attn/gather_swa",
    kinds="stale unexplained rows",
    why="rows gathered for attention are overwritten before it reads them",
    source="gather and write in one shared library, one module-level buffer",
    combination=True,
)
def gathered_in_module_buffer(ring: Tensor, kv: Tensor) -> Tensor:
    """The gathered window lies in the buffer that the ring's writer mirrors its rows into."""
    rows = gather_swa(ring, kv)
    out = _workspace("module buffer", rows)
    out.copy_(rows)
    return out


@fault(
    op="cache_write",
    name="ring_aliases_gathered_window",
    sites="L3/attn/window_write",
    kinds="stale unexplained rows",
)
def written_and_mirrored(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """The partner of gathered_in_module_buffer."""
    cache_write(rows, slots, cache)
    buffer = STATE.get("module buffer")
    if buffer is not None and buffer.numel() >= cache.numel() and buffer.dtype == cache.dtype:
        buffer[: cache.numel()].view(cache.shape).copy_(cache)
