"""The lightning indexer of CSA layers: score every visible entry, keep the best.

Source: the release, Indexer, without the Hadamard rotation (orthogonal on both sides) and FP4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.numerics import acc, acc_dtype
from dsv4_bench.engine.registry import nbytes, op
from dsv4_bench.engine.step import Step

_SCORE_BLOCK = 1 << 26  # float32 elements of the [queries, ih, T] intermediate kept at once


def _score_flops(a: dict[str, Any]) -> int:
    n, heads, dim = a["q"].shape
    return 2 * n * heads * (dim + 1) * a["step"].entries(a["ratio"])


def _score_traffic(a: dict[str, Any]) -> int:
    """Of the pool, the entries that exist."""
    keys, step = a["keys"], a["step"]
    count = sum(step.entries_of(b, a["ratio"]) for b in range(len(step.starts)))
    read = count * keys.shape[2] * keys.element_size()
    return read + sum(nbytes(a[name]) for name in ("q", "weights", "score"))


@op(
    "index_score",
    outputs=("score",),
    nonfinite=("score",),
    flops=_score_flops,
    traffic=_score_traffic,
)
def index_score(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    """score[t, j] = scale * sum_h weights[t, h] * relu(q[t, h] . keys[j]), -inf where j is not visible.

    q [n, ih, id], keys [b, capacity, id] (each sequence its own), weights [n, ih] -> [n, T]
    float32, T = the most entries any sequence has after this step. Entry j is visible to position
    p iff j < (p + 1) // ratio. Weights may be negative, so hidden entries are -inf, never 0.
    """
    total = step.entries(ratio)
    score = q.new_full((q.shape[0], total), -torch.inf, dtype=acc_dtype())
    head_weights = acc(weights) * scale  # [n, ih]
    for b, rows in enumerate(step.rows()):
        count = step.entries_of(b, ratio)
        if count == 0:
            continue
        k = acc(keys[b, :count])  # [count, id]
        block = max(1, _SCORE_BLOCK // (q.shape[1] * count))
        for first in range(rows.start, rows.stop, block):
            part = slice(first, min(first + block, rows.stop))
            dots = torch.relu(acc(q[part]) @ k.T)  # [s, ih, count]
            score[part, :count] = torch.einsum("sh,sht->st", head_weights[part], dots)
    visible = step.visible(ratio)  # [n]
    columns = torch.arange(total, device=q.device)
    return score.masked_fill(columns >= visible[:, None], -torch.inf)


@op("index_topk", outputs=("index",), discrete=("index",), nonfinite=("score",))
def index_topk(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """The k best entries of each query: score [n, T], visible [n] -> index [n, min(k, T)] int32.

    Best first; equal scores go to the lower index; -1 where fewer than k entries are visible.
    """
    k = min(k, score.shape[1])
    index = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.where(index < visible[:, None], index, -1).int()
