"""The `sm90` implementation of op gate: the router's scores and choice of experts.

Contract is that of the reference in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import F, I, Library, N, P, floats, sm90, typed, wrong
from dsv4_bench.engine.cuda.linear import matmul
from dsv4_bench.engine.formats import Weight

GATE = Library("gate", {"gate": (P, N, N, P, P, I, N, P, N, F, P, P)})


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
    """`linear` for the scores, then a kernel that chooses."""
    op = "gate"
    (n, _), count = x.shape, weight.shape[0]
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
    scores = matmul(op, x, weight, 1, torch.float32)
    routing = scores.new_empty(n, k)
    chosen = torch.empty(n, k, dtype=torch.int32, device=x.device)
    choice = (
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
    GATE.call(op, x, scores.data_ptr(), n, count, *choice)
    return routing, chosen, scores
