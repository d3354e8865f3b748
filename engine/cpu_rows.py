"""The `cpu` implementations of the row-wise ops: residual streams, norms, rope, and moving rows.

The same rules as in `cpu.py`, which imports this.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cpu_library import (
    DTYPES,
    EMBED_DTYPES,
    activation,
    cpu,
    floats,
    plain_kv,
    run,
    typed,
    wrong,
)
from dsv4_bench.engine.formats import Weight

# ------------------------------------------------------------------------------ streams, norms, rope


@cpu("hc_pre")
def hc_pre(
    x: Tensor,
    *,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iters: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "hc_pre"
    x, kind = activation(op, x)
    n, hc, d = x.shape
    fn, scale, base = _mapping(op, (2 + hc) * hc, hc * d, 3, fn, scale, base)
    u = x.new_empty(n, d)
    post = torch.empty(n, hc)
    comb = torch.empty(n, hc, hc)
    run(
        op,
        x.data_ptr(),
        kind,
        n,
        hc,
        d,
        fn.data_ptr(),
        scale.data_ptr(),
        base.data_ptr(),
        iters,
        eps,
        norm_eps,
        u.data_ptr(),
        post.data_ptr(),
        comb.data_ptr(),
        torch.get_num_threads(),
    )
    return u, post, comb


@cpu("hc_head")
def hc_head(
    x: Tensor, *, fn: Tensor, scale: Tensor, base: Tensor, eps: float, norm_eps: float
) -> Tensor:
    op = "hc_head"
    x, kind = activation(op, x)
    n, hc, d = x.shape
    fn, scale, base = _mapping(op, hc, hc * d, 1, fn, scale, base)
    h = x.new_empty(n, d)
    run(
        op,
        x.data_ptr(),
        kind,
        n,
        hc,
        d,
        fn.data_ptr(),
        scale.data_ptr(),
        base.data_ptr(),
        eps,
        norm_eps,
        h.data_ptr(),
        torch.get_num_threads(),
    )
    return h


def _mapping(
    op: str, rows: int, width: int, scales: int, fn: Tensor, scale: Tensor, base: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """fn [rows, width], scale [scales] and base [rows] as float32, or DSV4Error."""
    if fn.shape != (rows, width) or scale.numel() != scales or base.numel() != rows:
        wrong(op, f"fn {list(fn.shape)}, scale {list(scale.shape)}, base {list(base.shape)}")
    return floats(op, fn), floats(op, scale), floats(op, base)


@cpu("hc_post")
def hc_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    op = "hc_post"
    (y, y_kind), (x, x_kind) = activation(op, y), activation(op, x)
    n, hc, d = x.shape
    if y.shape != (n, d) or post.shape != (n, hc) or comb.shape != (n, hc, hc):
        wrong(op, f"y {list(y.shape)}, x {list(x.shape)}, comb {list(comb.shape)}")
    post, comb = floats(op, post), floats(op, comb)
    out = torch.empty_like(x)
    run(
        op,
        y.data_ptr(),
        y_kind,
        x.data_ptr(),
        x_kind,
        post.data_ptr(),
        comb.data_ptr(),
        n,
        hc,
        d,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@cpu("rms_norm")
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
    threads = torch.get_num_threads()
    run(op, x.data_ptr(), kind, rows, d, address, weight_kind, eps, y.data_ptr(), threads)
    return y


@cpu("rope")
def rope(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    op = "rope"
    x, kind = activation(op, x)
    n, d, half = x.shape[0], x.shape[-1], freqs.numel()
    if x.dim() not in (2, 3) or positions.shape != (n,) or not 0 < 2 * half <= d:
        wrong(op, f"x {list(x.shape)}, positions {list(positions.shape)}, {half} frequencies")
    positions, freqs = typed(op, positions, torch.int64), floats(op, freqs)
    y = torch.empty_like(x)
    run(
        op,
        x.data_ptr(),
        kind,
        positions.data_ptr(),
        n,
        x.shape[1] if x.dim() == 3 else 1,
        d,
        freqs.data_ptr(),
        half,
        inverse,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


# ------------------------------------------------------------------------------ moving rows


@cpu("embed")
def embed(tokens: Tensor, *, weight: Weight, hc: int, dtype: torch.dtype) -> Tensor:
    op = "embed"
    table = weight.data
    kind = EMBED_DTYPES.get(table.dtype)
    if kind is None or dtype not in DTYPES or not table.is_contiguous() or tokens.dim() != 1:
        wrong(op, f"table {table.dtype}, tokens {list(tokens.shape)}, result {dtype}")
    tokens = typed(op, tokens, torch.int64)
    (n,), (v, d) = tokens.shape, table.shape
    out = torch.empty(n, hc, d, dtype=dtype)
    run(
        op,
        tokens.data_ptr(),
        n,
        table.data_ptr(),
        kind,
        v,
        d,
        hc,
        out.data_ptr(),
        DTYPES[dtype],
        bad_index=f"a token id is not in [0, {v})",
    )
    return out


@cpu("cache_write", requires=plain_kv)
def cache_write(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    op = "cache_write"
    rows, kind = activation(op, rows)
    m, d = rows.shape
    if slots.shape != (m,) or cache.dim() != 2 or cache.shape[1] != d:
        wrong(op, f"rows {list(rows.shape)}, slots {list(slots.shape)}, cache {list(cache.shape)}")
    if cache.dtype not in DTYPES or not cache.is_cpu:
        wrong(op, f"the cache is float32 or bfloat16 in CPU memory, not {cache.dtype}")
    slots = typed(op, slots, torch.int64)
    target = cache if d <= 1 or cache.stride(1) == 1 else cache.contiguous()
    run(
        op,
        rows.data_ptr(),
        kind,
        slots.data_ptr(),
        m,
        target.data_ptr(),
        DTYPES[cache.dtype],
        len(cache),
        d,
        target.stride(0),
        bad_index=f"a slot is past the end of the cache's {len(cache)} rows",
    )
    if target is not cache:
        cache.copy_(target)


@cpu("gather_swa", requires=plain_kv)
def gather_swa(ring: Tensor, kv: Tensor) -> Tensor:
    op = "gather_swa"
    (ring, ring_kind), (kv, kv_kind) = activation(op, ring), activation(op, kv)
    (r, d), n = ring.shape, len(kv)
    if kv.shape != (n, d):
        wrong(op, f"ring {list(ring.shape)}, kv {list(kv.shape)}")
    window = ring.new_empty(r + n, d)
    run(op, ring.data_ptr(), r, kv.data_ptr(), n, d, ring_kind, kv_kind, window.data_ptr())
    return window
