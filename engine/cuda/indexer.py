"""The `sm90` implementations of the indexer: scores and top-k.

Contracts are those of the references in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.attention import processors
from dsv4_bench.engine.cuda.library import (
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
from dsv4_bench.engine.cuda.rows import rope
from dsv4_bench.engine.step import Step

INDEXER = Library(
    "indexer",
    {
        "index_score": (P, P, I, P, I, P, P, N, N, N, N, N, N, F, N, N, P),
        "rope_index_score": (P, P, N, P, P, P, I, P, N, N, N, N, F, N, P),
    },
)
TOPK = Library("topk", {"index_topk": (P, P, N, N, N, N, P)})
_ENTRIES = 256  # that a block of index_score takes
_HEADS, _DIM = 64, 128  # of queries whose rope the scoring kernel can do


@sm90("index_score", INDEXER)
def index_score(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    op = "index_score"
    (q, kind), (weights, weights_kind) = activation(op, q), activation(op, weights)
    n, heads, dim = q.shape
    total = step.entries(ratio)
    if keys.dim() != 3 or keys.shape[0] != len(step.lengths) or keys.shape[2] != dim:
        wrong(op, f"q {list(q.shape)}, keys {list(keys.shape)}, {len(step.lengths)} sequences")
    if weights.shape != (n, heads) or n != sum(step.lengths) or total > keys.shape[1]:
        wrong(op, f"q {list(q.shape)}, weights {list(weights.shape)}, {total} entries")
    if keys.dtype != q.dtype and (keys.dtype, q.dtype) != (torch.bfloat16, torch.float32):
        wrong(op, f"keys are {keys.dtype}, queries {q.dtype}")
    keys = typed(op, keys, q.dtype)
    score = q.new_empty((n, total), dtype=torch.float32)
    available = processors(q.device)
    INDEXER.call(
        op,
        q,
        q.data_ptr(),
        keys.data_ptr(),
        kind,
        weights.data_ptr(),
        weights_kind,
        None if step.is_decode else step.sequence.data_ptr(),
        step.positions.data_ptr(),
        ratio,
        n,
        heads,
        dim,
        keys.shape[1],
        total,
        scale,
        _tokens_per_block(step, total, available),
        available,
        score.data_ptr(),
    )
    return score


def joins_rope_score(q: Tensor, keys: Tensor, weights: Tensor, step: Step, freqs: Tensor) -> bool:
    """Whether rope_index_score is one launch: bfloat16, 64 heads of 128, one token a sequence."""
    n = len(q)
    return (
        step.is_decode
        and q.shape == (n, _HEADS, _DIM)
        and keys.dim() == 3
        and (keys.shape[0], keys.shape[2]) == (n, _DIM)
        and weights.shape == (n, _HEADS)
        and q.dtype == keys.dtype == torch.bfloat16
        and all(x.is_cuda and x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (q, keys))
        and freqs.numel() % 4 == 0
        and 0 < 2 * freqs.numel() <= _DIM
    )


def rope_index_score(
    q: Tensor,
    keys: Tensor,
    weights: Tensor,
    step: Step,
    *,
    freqs: Tensor,
    scale: float,
    ratio: int,
    turned: Tensor | None = None,
) -> Tensor:
    """index_score(rope(q, step.positions), ...), with the same bits; score [n, T] float32.

    q [n, 64, 128] before its rope, freqs [rd/2]. `turned`, like q, receives it after its rope. One launch
    where `joins_rope_score`; elsewhere the ops one by one.
    """
    op = "rope_index_score"
    total, capacity = step.entries(ratio), keys.shape[1]
    if total == 0 or total > capacity or not joins_rope_score(q, keys, weights, step, freqs):
        after = rope(q, step.positions, freqs=freqs, inverse=False)
        if turned is not None:
            turned.copy_(after)
        return index_score(after, keys, weights, step, scale=scale, ratio=ratio)
    n, freqs, (weights, weights_kind) = len(q), floats(op, freqs), activation(op, weights)
    if turned is not None and (turned.shape != q.shape or not turned.is_contiguous()):
        wrong(op, f"q {list(q.shape)}, room for it after its rope {list(turned.shape)}")
    score = q.new_empty((n, total), dtype=torch.float32)
    INDEXER.call(
        op,
        q,
        q.data_ptr(),
        freqs.data_ptr(),
        freqs.numel(),
        None if turned is None else turned.data_ptr(),
        keys.data_ptr(),
        weights.data_ptr(),
        weights_kind,
        step.positions.data_ptr(),
        ratio,
        n,
        capacity,
        total,
        scale,
        processors(q.device),
        score.data_ptr(),
    )
    return score


def _tokens_per_block(step: Step, total: int, available: int) -> int:
    """As many tokens one after another, up to 64, as leave four blocks for every processor."""
    if step.is_decode:
        return 1
    blocks = -(-total // _ENTRIES) * sum(step.lengths)
    return max(1, min(64, blocks // (4 * available)))


@sm90("index_topk", TOPK)
def index_topk(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    op = "index_topk"
    score, visible = floats(op, score), typed(op, visible, torch.int64)
    if score.dim() != 2 or visible.shape != score.shape[:1]:
        wrong(op, f"score {list(score.shape)}, visible {list(visible.shape)}")
    n, total = score.shape
    k = min(k, total)
    index = score.new_empty((n, k), dtype=torch.int32)
    sizes = (n, total, k, processors(score.device))
    TOPK.call(op, score, score.data_ptr(), visible.data_ptr(), *sizes, index.data_ptr())
    return index
