"""A hold-out: faults by someone who had not seen how `check` tells them apart; a plugin like any user's

    dsv4-bench faults unseen_faults --plugin tests/unseen_faults.py

Kinds were decided from what each bug is before it was run for the first time. At first contact all
35 were detected at the right op and layer, and 25 had the right kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert, ExpertBank
from dsv4_bench.engine.registry import reference
from dsv4_bench.probes.faults.base import STATE, altered, fault, rounded, with_parts

# ------------------------------------------------------------------------------ linear


@fault(
    op="linear",
    sites="L1/attn/wo_b",
    kinds="constant_factor columns",
    why="some columns have a factor",
)
def quarter_of_columns_low(x: Tensor, **params: Any) -> Tensor:
    """Columns 32 to 63 are 10 % too small."""
    y = reference("linear")(x, **params).clone()
    y[:, 32:64] *= 0.9
    return y


@fault(op="linear", sites="L2/attn/wq_a", kinds="unexplained")
def inputs_in_tf32(x: Tensor, **params: Any) -> Tensor:
    """Activations lose the low 13 bits of their mantissa, as in TF32."""
    cut = (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return reference("linear")(cut.to(x.dtype), **params)


@fault(op="linear", sites="L4/attn/compressor/wkv", kinds="constant_factor")
def negated(x: Tensor, **params: Any) -> Tensor:
    """The sign is wrong."""
    return -reference("linear")(x, **params)


@fault(op="linear", sites="head/logits", kinds="shifted")
def logits_of_the_third_next_word(x: Tensor, **params: Any) -> Tensor:
    """Logits are three ids too low."""
    return reference("linear")(x, **params).roll(-3, 1)


@fault(op="linear", sites="L3/attn/wkv", kinds="permuted")
def columns_backwards(x: Tensor, **params: Any) -> Tensor:
    """Output columns are stored from the last to the first."""
    return reference("linear")(x, **params).flip(1)


@fault(op="linear", sites="L0/attn/wq_b", kinds="nan")
def lane_without_value(x: Tensor, **params: Any) -> Tensor:
    """Every 16th column is NaN."""
    y = reference("linear")(x, **params).clone()
    y[:, 15::16] = torch.nan
    return y


@fault(
    op="linear",
    sites="L1/attn/wkv",
    kinds="rows positions",
    why="all rows but the first, which is position 0",
)
def first_row_for_all(x: Tensor, **params: Any) -> Tensor:
    """Every row is row 0: the row stride is taken for zero."""
    return reference("linear")(x, **params)[:1].expand(len(x), -1).clone()


# ------------------------------------------------------------------------------ norm and rope


@fault(op="rms_norm", sites="L2/attn/kv_norm", kinds="constant_factor")
def inverse_root_approximate(x: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """The inverse root is a bit trick with one Newton step, up to 0.17 % low."""
    mean = x.float().square().mean(-1, keepdim=True) + eps
    guess = (0x5F3759DF - (mean.view(torch.int32) >> 1)).view(torch.float32)
    guess = guess * (1.5 - 0.5 * mean * guess * guess)
    return (x.float() * guess * weight.float()).to(x.dtype)


@fault(op="rms_norm", sites="L4/attn/norm", kinds="shifted")
def weight_of_next_channel(x: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """Every channel has the weight of the next."""
    return reference("rms_norm")(x, weight=weight.roll(-1), eps=eps)


@fault(op="rms_norm", sites="L3/ffn/norm", kinds="unexplained")
def layer_norm(x: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """The mean is subtracted first."""
    centred = x - x.mean(-1, keepdim=True)
    return reference("rms_norm")(centred, weight=weight, eps=eps)


@fault(
    op="rope",
    sites="L3/attn/kv_rope",
    kinds="positions columns unexplained",
    why="rounding that grows with position, in the roped columns",
)
def angles_in_bfloat16(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """The frequencies are held in bfloat16."""
    return reference("rope")(x, positions, freqs=rounded(freqs), inverse=inverse)


@fault(
    op="rope",
    sites="L2/attn/kv_rope",
    kinds="positions columns",
    why="roped columns, position 0 is right",
)
def keys_rotated_back(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """Keys are rotated the other way round."""
    return reference("rope")(x, -positions, freqs=freqs, inverse=inverse)


@fault(
    op="rope",
    sites="L4/attn/compressor/rope",
    kinds="positions columns rows",
    why="roped columns of all entries but the first",
)
def entries_not_roped(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """Compressed entries are not rotated."""
    return x.clone()


# ------------------------------------------------------------------------------ mHC


@fault(op="hc_pre", sites="L3/attn/hc_pre", kinds="unexplained")
def streams_never_mixed(x: Tensor, **params: Any) -> tuple[Tensor, Tensor, Tensor]:
    """comb is the identity."""
    u, post, comb = reference("hc_pre")(x, **params)
    return u, post, torch.eye(comb.shape[1]).expand_as(comb).clone()


@fault(
    op="hc_post",
    sites="L2/ffn/hc_post",
    kinds="constant_factor unexplained",
    why="a weight taken as 1",
)
def post_taken_as_1(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The sublayer's output enters every stream with weight 1."""
    return reference("hc_post")(y, x, torch.ones_like(post), comb)


@fault(
    op="hc_pre",
    sites="L4/attn/hc_pre",
    kinds="nondeterministic columns nan",
    why="some columns hold what memory held",
)
def tail_of_u_not_written(x: Tensor, **params: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The last 8 columns of u are never written."""
    u, post, comb = reference("hc_pre")(x, **params)
    out = torch.empty_like(u)
    out[:, :-8] = u[:, :-8]
    return out, post, comb


# ------------------------------------------------------------------------------ attention


@fault(
    op="attention",
    sites="L2/attn/core",
    kinds="positions rows",
    why="only from position 64 on does the window hold more",
)
def window_of_64(
    q: Tensor, window: Tensor, window_index: Tensor, *rest: Any, **params: Any
) -> tuple[Tensor, Tensor]:
    """Keys older than 64 tokens are not attended to."""
    near = window_index.clone()
    near[:, : near.shape[1] // 2] = -1
    return reference("attention")(q, window, near, *rest, **params)


@fault(
    op="attention",
    sites="L4/attn/core",
    kinds="columns flushed",
    why="some columns are zero",
)
def values_without_rope_dims(q: Tensor, *args: Any, **params: Any) -> tuple[Tensor, Tensor]:
    """The roped dims of the values are left out."""
    o, lse = reference("attention")(q, *args, **params)
    o = o.clone()
    o[..., -o.shape[-1] // 8 :] = 0
    return o, lse


@fault(
    op="attention",
    sites="L3/attn/core",
    kinds="rows positions",
    why="only rows that see an entry",
)
def entries_half_as_strong(
    q: Tensor, window: Tensor, window_index: Tensor, entries: Tensor, entry_index: Tensor, **p: Any
) -> tuple[Tensor, Tensor]:
    """The values of compressed entries, and their keys, are halved."""
    return reference("attention")(q, window, window_index, entries * 0.5, entry_index, **p)


# ------------------------------------------------------------------------------ experts, router


@fault(op="experts", sites="L2/ffn/experts", kinds="constant_factor")
def routing_applied_twice(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """Routing weights are applied before and after w2."""
    return reference("experts")(x, routing.square(), experts, bank=bank, limit=limit)


@fault(
    op="experts",
    sites="L4/ffn/experts",
    kinds="rows permuted",
    why="tokens of one expert use another",
)
def expert_3_for_expert_2(
    x: Tensor, routing: Tensor, experts: Tensor, *, bank: ExpertBank, limit: float
) -> Tensor:
    """Expert 2's weights are never loaded, expert 3's stand in."""
    wrong = torch.where(experts == 2, 3, experts)
    return reference("experts")(x, routing, wrong, bank=bank, limit=limit)


def _nibbles(weight: Weight) -> Weight:
    data = weight.data.view(torch.uint8)
    return with_parts(weight, data=(data << 4) | (data >> 4))


@fault(op="shared_expert", sites="L3/ffn/shared", kinds="nibbles")
def up_nibbles_swapped(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """Of the shared expert's up matrix the nibbles are exchanged."""
    wrong = expert._replace(w3=altered(expert.w3, _nibbles))
    return reference("shared_expert")(x, expert=wrong, limit=limit)


def _scales(weight: Weight) -> Weight:
    assert weight.scale is not None
    raw = weight.scale.view(torch.uint8)
    return with_parts(weight, scale=raw.flip(1).view(weight.scale.dtype))


@fault(op="shared_expert", sites="L1/ffn/shared", kinds="scale_order")
def down_scales_backwards(x: Tensor, *, expert: Expert, limit: float) -> Tensor:
    """Of the shared expert's down matrix the block scales of a row are in reverse."""
    wrong = expert._replace(w2=altered(expert.w2, _scales))
    return reference("shared_expert")(x, expert=wrong, limit=limit)


@fault(op="gate", sites="L4/ffn/gate", kinds="decision_flip")
def best_expert_left_out(
    x: Tensor, tokens: Tensor, *, k: int, scale: float, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The second to the k+1st best are chosen."""
    _, chosen, scores = reference("gate")(x, tokens, k=k + 1, scale=scale, **more)
    chosen = chosen[:, 1:]
    routing = scores.gather(1, chosen.long())
    return routing / routing.sum(-1, keepdim=True) * scale, chosen.contiguous(), scores


@fault(op="gate", sites="L3/ffn/gate", kinds="stale")
def routing_of_the_last_step(x: Tensor, tokens: Tensor, **params: Any) -> Any:
    """With one token the routing weights are those of the call before."""
    routing, chosen, scores = reference("gate")(x, tokens, **params)
    before = STATE.get("routing of the last step")
    STATE["routing of the last step"] = routing[-1:].clone()
    return (before if len(x) == 1 and before is not None else routing), chosen, scores


@fault(
    op="moe_sum",
    sites="L4/ffn/sum",
    kinds="rows positions",
    why="in a prefill row and position are the same",
)
def shared_missing_after_128(routed: Tensor, shared: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Rows from 128 on miss the shared expert."""
    partial = shared.clone()
    partial[128:] = 0
    return reference("moe_sum")(routed, partial, dtype=dtype)


# ------------------------------------------------------------------------------ indexer, compressor


@fault(
    op="index_score",
    sites="L4/attn/index/score",
    kinds="flushed unexplained",
    why="relu in another place",
)
def relu_of_the_sum(
    q: Tensor, keys: Tensor, weights: Tensor, step: Any, *, scale: float, ratio: int
) -> Tensor:
    """relu is applied to the sum over heads, not to every head."""
    signed = torch.cat((q, -q), 1), torch.cat((weights, -weights), 1)
    score = reference("index_score")(signed[0], keys, signed[1], step, scale=scale, ratio=ratio)
    return torch.where(torch.isinf(score), score, score.clamp(min=0))


@fault(
    op="index_topk",
    sites="L2/attn/index/topk",
    kinds="shifted decision_flip",
    why="the selection of the row before",
)
def selection_of_the_row_before(score: Tensor, visible: Tensor, *, k: int) -> Tensor:
    """Each query gets the entries of the query before it."""
    return reference("index_topk")(score, visible, k=k).roll(1, 0)


@fault(
    op="compressor",
    sites="L2/attn/index/compressor/pool",
    kinds="unexplained flushed",
    why="scores left out",
)
def plain_mean(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Any, *, ape: Tensor
) -> Tensor:
    """Tokens are averaged; the gate scores are left out."""
    return reference("compressor")(
        kv, torch.zeros_like(score), kv_state, score_state, step, ape=ape
    )


@fault(op="compressor", sites="L3/attn/compressor/pool", kinds="unexplained")
def state_in_bfloat16(
    kv: Tensor, score: Tensor, kv_state: Tensor, score_state: Tensor, step: Any, *, ape: Tensor
) -> Tensor:
    """The state is kept in bfloat16."""
    pooled = reference("compressor")(kv, score, kv_state, score_state, step, ape=ape)
    kv_state.copy_(rounded(kv_state))
    return pooled


# ------------------------------------------------------------------------------ rows


@fault(op="cache_write", sites="L4/attn/window_write", kinds="rows")
def slot_0_written_too(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """The last row is written to slot 0 as well."""
    reference("cache_write")(rows, slots, cache)
    cache[0] = rows[-1]


@fault(op="cache_write", sites="L2/attn/compressor/write", kinds="saturated")
def entries_clamped(rows: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Entries are clamped to [-1.5, 1.5]."""
    reference("cache_write")(rows.clamp(-1.5, 1.5), slots, cache)


@fault(op="gather_swa", sites="L2/attn/gather_swa", kinds="rows flushed", why="one row is zero")
def newest_row_missing(ring: Tensor, kv: Tensor) -> Tensor:
    """The chunk's last row is not copied."""
    window = reference("gather_swa")(ring, kv)
    window[-1] = 0
    return window


@fault(op="embed", sites="embed", kinds="constant_factor")
def embedding_scaled(tokens: Tensor, **params: Any) -> Tensor:
    """Embeddings are multiplied by the square root of the width."""
    x = reference("embed")(tokens, **params)
    return x * x.shape[-1] ** 0.5


# ------------------------------------------------------------------------------ a combination


@fault(
    op="rms_norm",
    name="norm_strides_ignored_by_rope",
    sites="L3/attn/q_head_norm",
    kinds="transposed permuted",
    why="two axes exchanged in memory: heads and rows in another order",
    combination=True,
)
def normed_heads_first(x: Tensor, *, weight: Tensor | None, eps: float) -> Tensor:
    """The head norm returns [n, h, hd] as a view of [h, n, hd]; rope reads it as contiguous."""
    y = reference("rms_norm")(x, weight=weight, eps=eps)
    return y.transpose(0, 1).contiguous().transpose(0, 1)


@fault(
    op="rope",
    name="norm_strides_ignored_by_rope",
    sites="L3/attn/q_rope",
    kinds="transposed permuted",
)
def rope_of_contiguous(x: Tensor, positions: Tensor, **params: Any) -> Tensor:
    """The partner of normed_heads_first."""
    flat = x.as_strided(x.shape, torch.empty(x.shape).stride())
    return reference("rope")(flat, positions, **params)
