"""The `sm90` implementations of the dense ops with weights: linear, grouped_linear, gate.

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
    floats,
    sm90,
    typed,
    wrong,
)
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.formats import Weight

LINEAR = Library("linear", {"linear": (P, I, N, P, N, P, I)})
GATE = Library("gate", {"gate": (P, N, N, P, P, I, N, P, N, F, P, P)})

# ------------------------------------------------------------------------------ linear


@sm90("linear", LINEAR)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    return _matmul("linear", x, weight, 1, out_dtype or x.dtype)


@sm90("grouped_linear", LINEAR)
def grouped_linear(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    if groups < 1 or weight.shape[0] % groups:
        wrong("grouped_linear", f"{groups} groups do not divide {weight.shape[0]} rows")
    return _matmul("grouped_linear", o, weight, groups, o.dtype)


def _matmul(op: str, x: Tensor, weight: Weight, groups: int, out_dtype: torch.dtype) -> Tensor:
    """x [..., groups * k] -> [..., n] in `out_dtype`."""
    x, kind = activation(op, x)
    packed = pack(weight)
    if x.shape[-1] != groups * packed.k or packed.data.device != x.device:
        wrong(op, f"x is {list(x.shape)}, weight {weight.name!r} [{packed.n}, {packed.k}]")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    kept = out_dtype if out_dtype in DTYPES else torch.float32
    y = x.new_empty((*x.shape[:-1], packed.n), dtype=kept)
    there = y.data_ptr()
    LINEAR.call("linear", x, x.data_ptr(), kind, rows, packed.address, groups, there, DTYPES[kept])
    return y if kept is out_dtype else y.to(out_dtype)


# ------------------------------------------------------------------------------ gate


@sm90("gate", GATE)
def gate(
    x: Tensor,
    tokens: Tensor,
    *,
    weight: Weight,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "gate"
    (n, _), count = x.shape, weight.shape[0]
    scores = _matmul(op, x, weight, 1, torch.float32)
    table = rows = where = None
    size = vocabulary = 0
    if tid2eid is not None:
        if tid2eid.dim() != 2 or tid2eid.dtype not in (torch.int32, torch.int64):
            wrong(op, f"tid2eid is {tid2eid.dtype} {list(tid2eid.shape)}")
        table, rows = typed(op, tid2eid, tid2eid.dtype), typed(op, tokens, torch.int64)
        size, (vocabulary, k) = table.itemsize, table.shape
        where = rows.data_ptr()
    bias = None if bias is None else floats(op, bias)
    if (bias is not None and bias.numel() != count) or (rows is not None and rows.shape != (n,)):
        wrong(op, f"x {list(x.shape)}, {count} experts, tokens {list(tokens.shape)}")
    k = k if tid2eid is not None else min(k, count)
    routing = scores.new_empty(n, k)
    chosen = torch.empty(n, k, dtype=torch.int32, device=x.device)
    GATE.call(
        op,
        x,
        scores.data_ptr(),
        n,
        count,
        None if bias is None else bias.data_ptr(),
        None if table is None else table.data_ptr(),
        size,
        vocabulary,
        where,
        k,
        scale,
        routing.data_ptr(),
        chosen.data_ptr(),
    )
    return routing, chosen, scores
