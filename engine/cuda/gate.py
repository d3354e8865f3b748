"""The `sm90` implementation of op gate: the router's scores and choice of experts.

Contract is that of the reference in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import (
    F,
    I,
    Library,
    N,
    P,
    dense,
    floats,
    sm90,
    typed,
    wrong,
)
from dsv4_bench.engine.cuda.linear import LINEAR, matmul
from dsv4_bench.engine.cuda.skinny import SKINNY
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.formats import Weight

GATE = Library(
    "gate",
    {
        "gate_sums": (P, N, N, P, N, P),
        "gate": (P, N, P, N, N, P, P, I, N, P, N, F, P, P),
    },
)
_COLUMNS, _MOST_EXPERTS = 128, 1024  # that a block of gate_sums adds up; that it takes
_MOST_TOKENS = 256  # 10 us where op linear takes 40; with more, partial sums are the larger traffic


@sm90("gate", GATE, also=(LINEAR, SKINNY))
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
    """A product in many partial sums (of many tokens: op linear), then a kernel that adds up and chooses."""
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
    if _in_partial_sums(x, weight):
        scores = x.new_empty((n, count), dtype=torch.float32)
        sums = _partial_sums(x, weight)
    else:
        scores = matmul(op, x, weight, 1, torch.float32)
        sums = scores[None]
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
    GATE.call(op, x, sums.data_ptr(), len(sums), scores.data_ptr(), n, count, *choice)
    return routing, chosen, scores


def _in_partial_sums(x: Tensor, weight: Weight) -> bool:
    """Whether the kernel made for few tokens takes these: bfloat16 in whole vectors."""
    n, d = x.shape
    return (
        0 < n <= _MOST_TOKENS
        and d == weight.shape[1]
        and d % 8 == 0
        and weight.shape[0] <= _MOST_EXPERTS
        and weight.format == "dense"
        and x.dtype == weight.data.dtype == torch.bfloat16
        and x.is_cuda
        and x.device == weight.data.device
    )


def _partial_sums(x: Tensor, weight: Weight) -> Tensor:
    """[ceil(d / 128), n, experts] float32 that add up to x W^T."""
    x, (data, _) = dense(x), pack(weight).keep
    (n, d), count = x.shape, weight.shape[0]
    sums = x.new_empty((-(-d // _COLUMNS), n, count), dtype=torch.float32)
    GATE.call("gate_sums", x, x.data_ptr(), n, d, data.data_ptr(), count, sums.data_ptr())
    return sums
