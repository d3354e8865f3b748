"""Faults of the compressor and the indexer: windows, state, overlap, scores, the selection"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.step import Step
from dsv4_bench.probes.faults.base import fault, right, rounded

compressor = right("compressor")
index_score = right("index_score")
index_topk = right("index_topk")
_STATE_WHY = "the first tokens of a later chunk go without what came before: state not carried on"

# ------------------------------------------------------------------------------ compressor


@fault(
    op="compressor",
    sites="L2/attn/compressor/pool",
    kinds="shifted",
    source="the release: the ape row is the token's own position mod 4",
)
def ape_off_by_one(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """Each token gets the position bias of the token before it."""
    return compressor(kv, score, kv_state, score_state, step, ape=ape.roll(1, 0))


@fault(
    op="compressor",
    sites="L3/attn/compressor/pool",
    kinds="unexplained constant_factor",
    why="an additive bias is left out",
    source="mlx-lm PR 1189: position_bias not loaded",
)
def ape_missing(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """The position bias is left out."""
    return compressor(kv, score, kv_state, score_state, step, ape=torch.zeros_like(ape))


@fault(
    op="compressor",
    sites="L4/attn/compressor/pool",
    kinds="halves_swapped",
    source="the release: first half from the previous window, second half from the current one",
)
def overlap_halves_exchanged(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """The current window uses the first half of the channels, the previous one the second."""
    half = kv.shape[1] // 2
    return compressor(
        kv.roll(half, 1),
        score.roll(half, 1),
        kv_state,
        score_state,
        step,
        ape=ape.roll(half, 1),
    )


@fault(
    op="compressor",
    sites="L2/attn/index/compressor/pool",
    kinds="stale unexplained",
    why="the previous window is never in the state: not carried on",
    source="the release: CSA pools 8 slots",
)
def no_overlap(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """An entry pools its own 4 tokens only."""
    half = kv.shape[1] // 2
    apart = score.clone()
    apart[:, :half] = -torch.inf
    return compressor(kv, apart, kv_state, score_state, step, ape=ape)


@fault(
    op="compressor",
    sites="L4/attn/compressor/pool",
    kinds="stale rows positions",
    why=_STATE_WHY,
    source="vllm-ascend-deepseekv4 issue 131: overlap state of the first block not saved",
)
def state_not_carried_on(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """The state is emptied before every chunk."""
    kv_state.zero_()
    score_state.fill_(-torch.inf)
    return compressor(kv, score, kv_state, score_state, step, ape=ape)


@fault(
    op="compressor",
    sites="L3/attn/compressor/pool",
    kinds="stale",
    source="ROCm/ATOM issue 1417: entries restored, compressor state not",
)
def state_not_written_in_decode(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """With one token the state keeps its old contents."""
    if len(kv) > 1:
        return compressor(kv, score, kv_state, score_state, step, ape=ape)
    return compressor(kv, score, kv_state.clone(), score_state.clone(), step, ape=ape)


@fault(
    op="compressor",
    sites="L2/attn/compressor/pool",
    kinds="rows shifted",
    why="one row too few comes out",
    source="GDzhu01/vllm-ascend-deepseekv4 issue 76: seqused=None; flush at the boundary",
)
def last_window_not_flushed(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """A window that closes with the last token of a prefill is not emitted: zeros stand there."""
    pooled = compressor(kv, score, kv_state, score_state, step, ape=ape)
    if len(kv) > 1 and len(pooled) and int(step.positions[-1] + 1) % len(ape) == 0:
        pooled[-1] = 0
    return pooled


@fault(
    op="compressor",
    sites="L4/attn/index/compressor/pool",
    kinds="unexplained",
    source="the release: the compressor runs in float32",
)
def pooled_in_bfloat16(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """Keys and scores are rounded to bfloat16 before they are pooled."""
    return compressor(rounded(kv), rounded(score), kv_state, score_state, step, ape=ape)


@fault(
    op="compressor",
    sites="L2/attn/compressor/pool",
    kinds="unexplained",
    source="the release: softmax per channel",
)
def one_weight_for_all_channels(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Step, *, ape: Tensor
) -> Tensor:
    """Tokens are weighted by the mean score of their channels."""
    half = score.shape[1] // (2 if kv_state.shape[1] == 2 * len(ape) else 1)
    total = score + ape[step.positions % len(ape)]
    mean = total.unflatten(1, (-1, half)).mean(-1, keepdim=True).expand(-1, -1, half).flatten(1)
    return compressor(kv, mean, kv_state, score_state, step, ape=torch.zeros_like(ape))


# ------------------------------------------------------------------------------ scores


@fault(
    op="index_score",
    sites="L2/attn/index/score",
    kinds="flushed",
    source="the release: relu of every head's product",
)
def relu_missing(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    """Negative products of a head count."""
    with_minus = torch.cat((q, -q), 1), torch.cat((weights, -weights), 1)
    return index_score(with_minus[0], keys, with_minus[1], step, scale=scale, ratio=ratio)


@fault(
    op="index_score",
    sites="L4/attn/index/score",
    kinds="constant_factor",
    source="the release: 128^-0.5 and 64^-0.5",
)
def head_scale_missing(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    """The factor for the number of heads is left out; the order of the scores is right."""
    return index_score(q, keys, weights, step, scale=scale * q.shape[1] ** 0.5, ratio=ratio)


@fault(
    op="index_score",
    sites="L2/attn/index/score",
    kinds="nan padding",
    why="0 where -inf is expected: hidden entries are counted",
    source="the release: weights may be negative, so never use 0 for masked entries",
)
def hidden_entries_score_0(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    """Entries that are not visible yet score 0 instead of -inf."""
    score = index_score(q, keys, weights, step, scale=scale, ratio=ratio)
    return torch.where(torch.isinf(score), 0.0, score)


@fault(
    op="index_score",
    sites="L4/attn/index/score",
    kinds="shifted nan",
    why="visibility is off by one; that shows as a finite score where -inf is expected",
    source="the release: entry j is visible iff j < (t + 1) // ratio",
)
def entry_visible_too_early(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    """Of the entries the next one, still open, is visible already."""
    later = Step(step.tokens, tuple(s + ratio for s in step.starts), step.lengths, step.window)
    total = step.entries(ratio)
    wide = torch.cat((keys, keys.new_zeros(len(keys), 1, keys.shape[2])), 1)
    return index_score(q, wide, weights, later, scale=scale, ratio=ratio)[:, :total]


@fault(
    op="index_score",
    sites="L2/attn/index/score",
    kinds="columns stale",
    why="the columns of entries from earlier chunks; what was there is not carried on",
    source="mlx-lm PR 1189: indexer pool not kept across chunks",
)
def entries_of_earlier_chunks_lost(
    q: Tensor, keys: Tensor, weights: Tensor, step: Step, *, scale: float, ratio: int
) -> Tensor:
    """Entries written by earlier chunks are read as zeros."""
    fresh = keys.clone()
    for b, start in enumerate(step.starts):
        fresh[b, : start // ratio] = 0
    return index_score(q, fresh, weights, step, scale=scale, ratio=ratio)


# ------------------------------------------------------------------------------ selection


@fault(
    op="index_topk",
    sites="L2/attn/index/topk",
    kinds="decision_flip",
    source="sort order",
)
def worst_entries_kept(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """The entries with the lowest scores are kept."""
    hidden = torch.isinf(score)
    return index_topk(torch.where(hidden, score, -score), visible, k=k)


@fault(
    op="index_topk",
    sites="L4/attn/index/topk",
    kinds="decision_flip padding",
    why="the last slot holds an entry twice, a set is one entry short",
    source="vllm issue 49896: histogram top-k writes what it finds",
)
def first_entry_twice(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """The last slot repeats the first."""
    index = index_topk(score, visible, k=k).clone()
    full = index[:, -1] >= 0
    index[full, -1] = index[full, 0]
    return index


@fault(
    op="index_topk",
    sites="L2/attn/index/topk",
    kinds="decision_flip",
    source="two-level selection: the best of each block of 8 first",
)
def at_most_4_of_a_block(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """Of 8 neighbouring entries at most the best 4 are considered."""
    padded = torch.nn.functional.pad(score, (0, -score.shape[1] % 8), value=-torch.inf)
    blocks = padded.unflatten(1, (-1, 8))
    cut = blocks.sort(-1, descending=True).values[..., 3:4]
    kept = torch.where(blocks >= cut, blocks, -torch.inf).flatten(1)[:, : score.shape[1]]
    fewer = torch.isfinite(kept).sum(1)
    index = index_topk(kept, visible, k=k)
    columns = torch.arange(index.shape[1], device=index.device)
    return torch.where(columns < fewer[:, None], index, -1).int()


@fault(
    op="index_topk",
    sites="L4/attn/index/topk",
    kinds="decision_flip shifted",
    why="the newest entry is never considered: a bound off by one",
    source="the release",
)
def newest_entry_never_chosen(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """The newest visible entry is not considered."""
    columns = torch.arange(score.shape[1], device=score.device)
    hidden = columns >= (visible - 1)[:, None]
    return index_topk(score.masked_fill(hidden, -torch.inf), visible - 1, k=k)


@fault(
    op="index_topk",
    sites="L2/attn/index/topk",
    kinds="padding decision_flip",
    why="indices of entries that are not there",
    source="vllm issue 49896: uninitialised slots; only idx >= 0 is checked",
)
def unused_slots_not_cleared(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """Slots beyond the visible entries hold indices of hidden ones instead of -1."""
    everything = torch.full_like(visible, score.shape[1])
    return index_topk(score, everything, k=k)


@fault(
    op="index_topk",
    sites="L4/attn/index/topk",
    kinds="decision_flip",
    source="the release: a threshold search with few steps",
)
def threshold_too_coarse(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """Scores are compared in bfloat16, so near ties fall either way."""
    return index_topk(rounded(score), visible, k=k)
