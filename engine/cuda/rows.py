"""The `sm90` implementations of the row-wise ops: norms, rope, and moving rows.

Contracts are those of the references in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import (
    DTYPES,
    F,
    I,
    Library,
    N,
    P,
    activation,
    dense,
    floats,
    sm90,
    typed,
    wrong,
)
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.kv_entry import plain_of

NORM = Library(
    "norm",
    {
        "rms_norm": (P, I, N, N, P, I, F, P),
        "rope": (P, I, P, N, N, N, P, N, I, P),
    },
)
ROWS = Library(
    "rows",
    {
        "embed": (P, N, P, I, N, N, N, P, I),
        "cache_write": (P, I, P, N, P, I, N, N, N),
        "gather_swa": (P, I, N, P, I, N, N, P),
        "cache_write_packed": (P, I, P, N, P, N, N, N, N),
        "gather_swa_packed": (P, N, P, I, N, N, N, P),
        "moe_sum": (P, P, N, P, I),
    },
)
_EMBED_DTYPES = {**DTYPES, torch.float16: 2}


@sm90("rms_norm", NORM)
def rms_norm(x: Tensor, *, weight: Tensor | None, eps: float) -> Tensor:
    op = "rms_norm"
    x, kind = activation(op, x)
    d = x.shape[-1]
    address, weight_kind = None, 0
    if weight is not None:
        weight, weight_kind = activation(op, weight)
        address = weight.data_ptr()
        if weight.shape != (d,):
            wrong(op, f"x {list(x.shape)}, weight {list(weight.shape)}")
    y = torch.empty_like(x)
    rows = x.numel() // d if d else 0
    NORM.call(op, x, x.data_ptr(), kind, rows, d, address, weight_kind, eps, y.data_ptr())
    return y


@sm90("rope", NORM)
def rope(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    op = "rope"
    x, kind = activation(op, x)
    n, d, half = x.shape[0], x.shape[-1], freqs.numel()
    if x.dim() not in (2, 3) or positions.shape != (n,) or not 0 < 2 * half <= d:
        wrong(op, f"x {list(x.shape)}, positions {list(positions.shape)}, {half} frequencies")
    positions, freqs = typed(op, positions, torch.int64), floats(op, freqs)
    heads = x.shape[1] if x.dim() == 3 else 1
    y = torch.empty_like(x)
    where = positions.data_ptr()
    turns = freqs.data_ptr()
    NORM.call(op, x, x.data_ptr(), kind, where, n, heads, d, turns, half, inverse, y.data_ptr())
    return y


@sm90("embed", ROWS)
def embed(tokens: Tensor, *, weight: Weight, hc: int, dtype: torch.dtype) -> Tensor:
    op = "embed"
    kind = _EMBED_DTYPES.get(weight.data.dtype)
    if kind is None or dtype not in DTYPES or tokens.dim() != 1 or not weight.data.is_cuda:
        wrong(op, f"table {weight.data.dtype}, tokens {list(tokens.shape)}, result {dtype}")
    tokens, table = typed(op, tokens, torch.int64), dense(weight.data)
    (n,), (v, d) = tokens.shape, table.shape
    x = torch.empty(n, hc, d, dtype=dtype, device=tokens.device)
    out_kind = DTYPES[dtype]
    ROWS.call(
        op,
        tokens,
        tokens.data_ptr(),
        n,
        table.data_ptr(),
        kind,
        v,
        d,
        hc,
        x.data_ptr(),
        out_kind,
    )
    return x


@sm90("cache_write", ROWS)
def cache_write(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    op = "cache_write"
    rows, kind = activation(op, rows)
    if rows.dim() != 2 or cache.dim() != 2 or slots.shape != rows.shape[:1]:
        wrong(op, f"rows {list(rows.shape)}, slots {list(slots.shape)}, cache {list(cache.shape)}")
    slots = typed(op, slots, torch.int64)
    if cache.dtype == torch.uint8:
        _write_packed(rows, kind, slots, cache)
        return
    m, d = rows.shape
    if cache.shape[1] != d or cache.dtype not in DTYPES or not cache.is_cuda:
        wrong(op, f"rows {list(rows.shape)}, cache {list(cache.shape)} {cache.dtype}")
    target = cache if d <= 1 or cache.stride(1) == 1 else cache.contiguous()
    ROWS.call(
        op,
        rows,
        rows.data_ptr(),
        kind,
        slots.data_ptr(),
        m,
        target.data_ptr(),
        DTYPES[cache.dtype],
        len(cache),
        d,
        target.stride(0),
    )
    if target is not cache:
        cache.copy_(target)


def _write_packed(rows: Tensor, kind: int, slots: Tensor, cache: Tensor) -> None:
    """`cache_write` into packed entries, at any multiple of 8 bytes."""
    op = "cache_write_packed"
    (m, d), plain = rows.shape, plain_of(rows.shape[1], cache.shape[1])
    whole = cache.stride(1) == 1 and cache.stride(0) % 8 == 0 and cache.data_ptr() % 8 == 0
    target = cache if whole else cache.clone(memory_format=torch.contiguous_format)
    where, there = slots.data_ptr(), target.data_ptr()
    stride = target.stride(0)
    ROWS.call(op, rows, rows.data_ptr(), kind, where, m, there, len(cache), d, plain, stride)
    if target is not cache:
        cache.copy_(target)


@sm90("gather_swa", ROWS)
def gather_swa(ring: Tensor, kv: Tensor) -> Tensor:
    op = "gather_swa"
    kv, kv_kind = activation(op, kv)
    if ring.dtype == torch.uint8 and ring.dim() == kv.dim() == 2:
        return _gather_packed(typed(op, ring, torch.uint8), kv, kv_kind)
    ring, ring_kind = activation(op, ring)
    if ring.dim() != 2 or kv.dim() != 2 or kv.shape[1] != ring.shape[1]:
        wrong(op, f"ring {list(ring.shape)}, kv {list(kv.shape)}")
    (r, d), n = ring.shape, len(kv)
    window = ring.new_empty(r + n, d)
    there = window.data_ptr()
    ROWS.call(op, ring, ring.data_ptr(), ring_kind, r, kv.data_ptr(), kv_kind, n, d, there)
    return window


def _gather_packed(ring: Tensor, kv: Tensor, kv_kind: int) -> Tensor:
    """`gather_swa` of packed entries."""
    (r, packed), (n, d) = ring.shape, kv.shape
    plain = plain_of(d, packed)
    window = ring.new_empty(r + n, packed)
    args = (ring.data_ptr(), r, kv.data_ptr(), kv_kind, n, d, plain, window.data_ptr())
    ROWS.call("gather_swa_packed", ring, *args)
    return window


@sm90("moe_sum", ROWS)
def moe_sum(routed: Tensor, shared: Tensor, *, dtype: torch.dtype) -> Tensor:
    op = "moe_sum"
    if routed.shape != shared.shape or dtype not in DTYPES:
        wrong(op, f"routed {list(routed.shape)}, shared {list(shared.shape)}, result {dtype}")
    a, b = floats(op, routed), floats(op, shared)
    out = torch.empty(a.shape, dtype=dtype, device=a.device)
    ROWS.call(op, a, a.data_ptr(), b.data_ptr(), a.numel(), out.data_ptr(), DTYPES[dtype])
    return out
