"""Sparse attention with a sink over window rows and compressed entries.

Source: the release, sparse_attn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.kv_entry import unpack
from dsv4_bench.engine.numerics import acc, acc_dtype
from dsv4_bench.engine.registry import nbytes, op

_GATHER_BLOCK = 1 << 20  # elements of gathered keys kept at once: small enough to stay in cache


def gather_rows(pool: Tensor, index: Tensor, width: int | None = None) -> Tensor:
    """pool [r, hd], index [n, k] -> [n, k, hd] float32; index -1 gives zeros and reads nothing.

    The pool may hold packed entries, uint8 [r, bytes], of vectors `width` wide.
    """
    if not pool.shape[0]:
        return torch.zeros(*index.shape, width or 1, dtype=acc_dtype(), device=pool.device)
    rows = pool[index.clamp(min=0)]
    if pool.dtype == torch.uint8:
        assert width is not None
        rows = unpack(rows, width)
    return torch.where((index >= 0)[..., None], acc(rows), 0.0)  # no product: there may be NaN


def _flops(a: dict[str, Any]) -> int:
    n, heads, dim = a["q"].shape
    index = a.get("entry_index")
    keys = a["window_index"].shape[1] + (index.shape[1] if index is not None else 0)
    return 4 * n * heads * dim * keys


def _traffic(a: dict[str, Any]) -> int:
    """Of the pools, each row that some query attends to, once."""
    total = sum(
        nbytes(a[name]) for name in ("q", "window_index", "entry_index", "sink", "o", "lse")
    )
    for pool, index in (("window", "window_index"), ("entries", "entry_index")):
        if a[pool] is not None and a[index] is not None:
            rows = a[index][a[index] >= 0].unique().numel()
            total += rows * a[pool].shape[1] * a[pool].element_size()
    return total


@op("attention", outputs=("o", "lse"), flops=_flops, traffic=_traffic)
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
    """o = softmax(scale q.k, sink) k with K = V: one 512-wide vector a key, shared by all heads.

    q [n, h, hd]; window [r, hd] and entries [e, hd] are pools of keys, window_index [n, w] and
    entry_index [n, k] int32 rows in them, -1 for none. sink [h] float32, already in the scaled
    domain: it adds exp(sink) to the denominator and has no value. Returns o [n, h, hd] in q's
    dtype and lse [n, h] float32 = log(sum exp(logits) + exp(sink)).

    Pools may be packed, uint8 [rows, bytes] (kv_entry.py; both of them): their values are exact in
    float32 and bfloat16, so the result is that on the unpacked pools, within the same limits.
    """
    outs = [q.new_empty(0, *q.shape[1:])]  # so that no tokens give empty outputs
    lses = [q.new_empty(0, q.shape[1], dtype=acc_dtype())]
    width = window_index.shape[1] + (entry_index.shape[1] if entry_index is not None else 0)
    block = max(1, _GATHER_BLOCK // (max(width, 1) * q.shape[2]))
    for first in range(0, q.shape[0], block):
        part = slice(first, first + block)
        keys = gather_rows(window, window_index[part], q.shape[2])
        valid = window_index[part] >= 0
        if entries is not None and entry_index is not None and entry_index.shape[1]:
            keys = torch.cat((keys, gather_rows(entries, entry_index[part], q.shape[2])), dim=1)
            valid = torch.cat((valid, entry_index[part] >= 0), dim=1)
        logits = (acc(q[part]) @ keys.transpose(1, 2)) * scale  # [s, h, w + k]
        logits = logits.masked_fill(~valid[:, None], -torch.inf)
        extended = torch.cat((logits, acc(sink).expand(len(logits), -1)[..., None]), dim=-1)
        lse = torch.logsumexp(extended, dim=-1)  # [s, h]
        p = acc(torch.exp(logits - lse[..., None]).to(q.dtype))
        outs.append((p @ keys).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
