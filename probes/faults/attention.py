"""Faults of sparse attention: the sink, the scale, padding, masks, tiles of keys, heads"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.ops.attention import gather_rows
from dsv4_bench.probes.faults.base import fault, noise_of_call, right, rounded

attention = right("attention")
Pool = Tensor | None  # None in sliding layers
Result = tuple[Tensor, Tensor]


def gathered(
    window: Tensor, window_index: Tensor, entries: Pool, entry_index: Pool
) -> tuple[Tensor, Tensor]:
    """Keys [n, w + k, hd] in float32, zeros for index -1, and which of them are valid."""
    keys, valid = gather_rows(window, window_index), window_index >= 0
    if entries is not None and entry_index is not None and entry_index.shape[1]:
        keys = torch.cat((keys, gather_rows(entries, entry_index)), 1)
        valid = torch.cat((valid, entry_index >= 0), 1)
    return keys, valid


def softmax_with_sink(q: Tensor, keys: Tensor, valid: Tensor, sink: Tensor, scale: float) -> Result:
    """(p [n, h, keys], lse [n, h]) in float32; invalid keys get no weight."""
    logits = (acc(q) @ keys.transpose(1, 2)) * scale
    logits = logits.masked_fill(~valid[:, None], -torch.inf)
    extended = torch.cat((logits, acc(sink).expand(len(logits), -1)[..., None]), -1)
    lse = torch.logsumexp(extended, -1)
    return torch.exp(logits - lse[..., None]), lse


# ------------------------------------------------------------------------------ sink and scale


@fault(
    op="attention",
    sites="L2/attn/core",
    kinds="constant_factor",
    source="the sink is already in the scaled domain",
)
def sink_scaled_twice(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """The sink is multiplied by the softmax scale once more."""
    return attention(q, *args, sink=sink * scale, scale=scale)


@fault(op="attention", sites="L3/attn/core", kinds="constant_factor", source="the release")
def sink_missing(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """The sink is left out of the denominator."""
    return attention(q, *args, sink=torch.full_like(sink, -torch.inf), scale=scale)


@fault(
    op="attention",
    sites="L4/attn/core",
    kinds="constant_factor",
    source="vllm PR 57711: each KV split adds the sink",
)
def sink_once_per_split(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """Both KV splits add the sink, so it counts twice."""
    return attention(q, *args, sink=sink + math.log(2), scale=scale)


@fault(
    op="attention",
    sites="L2/attn/core",
    kinds="constant_factor columns",
    why="one head is wrong, by a factor in each row",
    source="grid of heads with a wrong stride for the sink",
)
def one_head_with_neighbours_sink(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """Head 5 uses the sink of head 4."""
    wrong = sink.clone()
    wrong[5 % len(sink)] = sink[4 % len(sink)]
    return attention(q, *args, sink=wrong, scale=scale)


@fault(
    op="attention",
    sites="L4/attn/core",
    kinds="constant_factor",
    source="AMD-AGI/Primus PR 928: logits 1.277 times too sharp",
)
def yarn_mscale_in_softmax(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """YaRN's attention factor 0.1 ln 16 + 1 is multiplied into the softmax scale."""
    return attention(q, *args, sink=sink, scale=scale * (0.1 * math.log(16) + 1))


@fault(
    op="attention",
    sites="L0/attn/core",
    kinds="constant_factor",
    source="scale from the dims without rope, as in MLA",
)
def scale_without_rope_dims(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """The softmax scale counts only the 7 of 8 head dims that are not roped."""
    return attention(q, *args, sink=sink, scale=scale * (8 / 7) ** 0.5)


@fault(
    op="attention",
    sites="L1/attn/core",
    kinds="constant_factor",
    source="a logarithm of base 2 handed out as natural",
)
def lse_in_base_2(q: Tensor, *args: Any, sink: Tensor, scale: float) -> Result:
    """The log-sum-exp is returned in base 2; the output itself is right."""
    o, lse = attention(q, *args, sink=sink, scale=scale)
    return o, lse / math.log(2)


# ------------------------------------------------------------------------------ padding and masks


@fault(
    op="attention",
    sites="L0/attn/core",
    kinds="nan padding",
    why="NaN that comes from padding",
    source="FMHA decode over fewer than 128 keys, 0 x NaN; vllm issue 41249",
)
def short_window_nan(
    q: Tensor, window: Tensor, window_index: Tensor, *rest: Any, **params: Any
) -> Result:
    """Rows with fewer than 128 keys multiply zero weights by uninitialised values: 0 x NaN."""
    o, lse = attention(q, window, window_index, *rest, **params)
    short = (window_index < 0).any(1)
    o = o.clone()
    o[short] = torch.nan
    return o, lse


@fault(
    op="attention",
    sites="L1/attn/core",
    kinds="padding constant_factor",
    why="padding counted as keys: in each of those rows everything is too small by a factor",
    source="padded N passed as the logical length, 1 valid key got weight 1/128",
)
def padded_length_as_length(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Pool,
    entry_index: Pool,
    *,
    sink: Tensor,
    scale: float,
) -> Result:
    """Missing window keys count as keys of zeros: they take their share of the softmax."""
    keys, valid = gathered(window, window_index, entries, entry_index)
    valid = valid.clone()
    valid[:, : window_index.shape[1]] = True
    p, lse = softmax_with_sink(q, keys, valid, sink, scale)
    return (p @ keys).to(q.dtype), lse


@fault(
    op="attention",
    sites="L3/attn/core",
    kinds="padding",
    source="vllm issue 57156, PR 57158: invalid indices read slot 0",
)
def missing_entries_read_slot_0(
    q: Tensor, window: Tensor, window_index: Tensor, entries: Pool, entry_index: Pool, **p: Any
) -> Result:
    """An entry index of -1 is clamped to row 0 and attended to."""
    if entry_index is not None:
        entry_index = entry_index.clamp(min=0)
    return attention(q, window, window_index, entries, entry_index, **p)


@fault(
    op="attention",
    sites="L2/attn/core",
    kinds="nan padding",
    why="NaN in the rows whose entries are all padding",
    source="online softmax: -inf minus -inf in a fully masked block",
)
def masked_block_nan(
    q: Tensor, window: Tensor, window_index: Tensor, entries: Pool, entry_index: Pool, **p: Any
) -> Result:
    """Rows that see no entry at all get NaN from the fully masked block."""
    o, lse = attention(q, window, window_index, entries, entry_index, **p)
    if entry_index is not None:
        o = o.clone()
        o[(entry_index < 0).all(1)] = torch.nan
    return o, lse


@fault(
    op="attention",
    sites="L2/attn/core",
    kinds="shifted",
    source="a causal mask with < for <=",
)
def own_token_not_seen(
    q: Tensor, window: Tensor, window_index: Tensor, *rest: Any, **params: Any
) -> Result:
    """A query does not see its own key, from the second token on."""
    last = window_index.clone()
    last[:, -1] = torch.where((window_index >= 0).sum(1) > 1, -1, last[:, -1])
    return attention(q, window, last, *rest, **params)


@fault(
    op="attention",
    sites="L3/attn/core",
    kinds="tiles positions",
    why="the keys of one tile are missing; they are entries, seen from position 127 on",
    source="loop over tiles of 64 keys rounded down",
)
def last_key_tile_missing(
    q: Tensor, window: Tensor, window_index: Tensor, entries: Pool, entry_index: Pool, **p: Any
) -> Result:
    """Keys beyond the last full tile of 64 are not attended to."""
    if entry_index is not None:
        width = entry_index.shape[1]
        tail = min((window_index.shape[1] + width) % 64, width)
        entry_index = entry_index.clone()
        entry_index[:, width - tail :] = -1
    return attention(q, window, window_index, entries, entry_index, **p)


@fault(
    op="attention",
    sites="L4/attn/core",
    kinds="rows positions",
    why="the single row of a decode step is wrong, a prefill is right",
    source="prefill and decode on different paths, mlx-lm PR 1189",
)
def decode_ignores_entries(
    q: Tensor, window: Tensor, window_index: Tensor, entries: Pool, entry_index: Pool, **p: Any
) -> Result:
    """A decode step attends to the window alone."""
    if len(q) == 1 and entry_index is not None:
        entry_index = torch.full_like(entry_index, -1)
    return attention(q, window, window_index, entries, entry_index, **p)


# ------------------------------------------------------------------------------ heads, precision


@fault(
    op="attention",
    sites="L3/attn/core",
    kinds="columns",
    source="accumulator of one warp in 16 bits",
)
def one_head_in_bfloat16(q: Tensor, *args: Any, **params: Any) -> Result:
    """The last head alone is computed with bfloat16 logits."""
    o, lse = attention(q, *args, **params)
    coarse, _ = attention(rounded(q), *args, **params)
    o = o.clone()
    o[:, -1] = rounded(coarse[:, -1])
    return o, lse


@fault(op="attention", sites="L1/attn/core", kinds="permuted", source="heads stored by group")
def heads_interleaved(q: Tensor, *args: Any, **params: Any) -> Result:
    """The output's heads are stored in the order 0, 4, 1, 5, ..."""
    o, lse = attention(q, *args, **params)
    n, heads, dim = o.shape
    return o.view(n, 2, heads // 2, dim).transpose(1, 2).reshape(o.shape), lse


@fault(
    op="attention",
    sites="L0/attn/core",
    kinds="transposed",
    source="[n, h, hd] written as [h, n, hd]",
)
def output_heads_first(q: Tensor, *args: Any, **params: Any) -> Result:
    """The output buffer is filled head by head."""
    o, lse = attention(q, *args, **params)
    return o.transpose(0, 1).reshape(o.shape), lse


@fault(
    op="attention",
    sites="L2/attn/core",
    kinds="unexplained",
    source="weights of 8 bits, as for an FP8 P V product",
)
def weights_in_fp8(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Pool,
    entry_index: Pool,
    *,
    sink: Tensor,
    scale: float,
) -> Result:
    """The softmax weights are rounded to e4m3 before they meet the values."""
    keys, valid = gathered(window, window_index, entries, entry_index)
    p, lse = softmax_with_sink(q, keys, valid, sink, scale)
    return (rounded(p, torch.float8_e4m3fn) @ keys).to(q.dtype), lse


@fault(
    op="attention",
    sites="L4/attn/core",
    kinds="unexplained",
    source="combining KV splits: each by its own maximum",
)
def splits_combined_unweighted(
    q: Tensor,
    window: Tensor,
    window_index: Tensor,
    entries: Pool,
    entry_index: Pool,
    *,
    sink: Tensor,
    scale: float,
) -> Result:
    """Window and entries are normalised apart and averaged by their number of keys."""
    o, lse = attention(q, window, window_index, None, None, sink=sink, scale=scale)
    if entries is None or entry_index is None or not entry_index.shape[1]:
        return o, lse
    other, _ = attention(q, entries, entry_index, None, None, sink=sink, scale=scale)
    first, second = (window_index >= 0).sum(1), (entry_index >= 0).sum(1)
    share = (second / (first + second))[:, None, None]
    mixed = acc(o) * (1 - share) + acc(other) * share
    _, lse = attention(q, window, window_index, entries, entry_index, sink=sink, scale=scale)
    return mixed.to(q.dtype), lse


@fault(
    op="attention",
    sites="L3/attn/core",
    kinds="nondeterministic",
    source="1Cat-vLLM PR 162: a key row written while it is read",
)
def key_read_too_early(q: Tensor, *args: Any, **params: Any) -> Result:
    """Now and then a row is read before the writer is done with it: small errors, others each time."""
    o, lse = attention(q, *args, **params)
    noise = noise_of_call("key_read_too_early", o[:, :1, :1])
    hit = noise > 1.0
    return torch.where(hit, o * (1 + 0.03 * noise), o).to(o.dtype), lse
