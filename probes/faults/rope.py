"""Faults of rotary embedding and of the norms: base, pairs, positions, direction, eps, weight"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4_bench.engine.config import FLASH
from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.ops.rope import rope_frequencies
from dsv4_bench.probes.faults.base import fault, remembered, right, rounded

rope = right("rope")
rms_norm = right("rms_norm")
_SLIDING, _COMPRESSED = 0, 2  # layers of FLASH
_BASE = "columns positions"
_BASE_WHY = "only roped columns are wrong, and position 0 is right"


def _frequencies(freqs: Tensor, layer: int, yarn: bool = True) -> Tensor:
    """The release's frequencies of a layer kind, for as many pairs as `freqs` has."""

    def make() -> Tensor:
        config = replace(FLASH, qk_rope_head_dim=2 * freqs.numel())
        return rope_frequencies(config if yarn else replace(config, rope_scaling=None), layer)

    return remembered(("freqs", freqs.numel(), layer, yarn), make).to(freqs.device)


# ------------------------------------------------------------------------------ rope


@fault(
    op="rope",
    sites="L0/attn/q_rope",
    kinds=_BASE,
    why=_BASE_WHY,
    source="Avarok-Cybersecurity/atlas PR 276",
)
def compress_base_on_sliding_layer(
    x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool
) -> Tensor:
    """A sliding layer uses base 160000 with YaRN; it should be 10000 without."""
    return rope(x, positions, freqs=_frequencies(freqs, _COMPRESSED), inverse=inverse)


@fault(
    op="rope",
    sites="L3/attn/kv_rope",
    kinds=_BASE,
    why=_BASE_WHY,
    source="ml-explore/mlx-lm PR 1189: one base for all layers",
)
def sliding_base_on_compressed_layer(
    x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool
) -> Tensor:
    """A compressed layer uses base 10000; it should be 160000 with YaRN."""
    return rope(x, positions, freqs=_frequencies(freqs, _SLIDING), inverse=inverse)


@fault(
    op="rope",
    sites="L2/attn/q_rope",
    kinds=_BASE,
    why=_BASE_WHY,
    source="the release: YaRN applies at all lengths",
)
def yarn_missing(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """Frequencies are not stretched by YaRN."""
    return rope(x, positions, freqs=_frequencies(freqs, _COMPRESSED, False), inverse=inverse)


@fault(
    op="rope",
    sites="L4/attn/q_rope",
    kinds="halves_swapped permuted columns",
    why="pairs (i, i + rd/2) for (2i, 2i + 1); only roped columns are wrong",
    source="NVIDIA-NeMo/Automodel issue 2039: cosine .866",
)
def pairs_half_split(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """Pairs are (i, i + 32) as in GPT-NeoX, not neighbours."""
    rd = 2 * freqs.numel()
    tail = x[..., -rd:].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    turned = rope(torch.cat((x[..., :-rd], tail), -1), positions, freqs=freqs, inverse=inverse)
    tail = turned[..., -rd:].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return torch.cat((turned[..., :-rd], tail), -1)


@fault(
    op="rope",
    sites="L1/attn/kv_rope",
    kinds="columns shifted positions",
    why="the roped columns lie elsewhere; position 0 is right",
    source="the release: the last 64 of 512",
)
def first_dims_roped(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """The first 64 dims are rotated instead of the last."""
    rd = 2 * freqs.numel()
    return rope(x.roll(-rd, -1), positions, freqs=freqs, inverse=inverse).roll(rd, -1)


@fault(
    op="rope",
    sites="L3/attn/q_rope",
    kinds="shifted",
    source="positions counted from 1",
)
def position_plus_1(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """Everything is rotated as if it stood one position later."""
    return rope(x, positions + 1, freqs=freqs, inverse=inverse)


@fault(
    op="rope",
    sites="L2/attn/compressor/rope",
    kinds="columns positions rows shifted",
    why="entry 0 is right, the roped columns of the others have another position",
    source="AMD-AGI/Primus PR 930: pool index used as rope position",
)
def entry_roped_at_its_index(
    x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool
) -> Tensor:
    """Entry j is rotated to position j instead of 4 j."""
    return rope(x, positions // 4, freqs=freqs, inverse=inverse)


@fault(
    op="rope",
    sites="L2/attn/o_rope",
    kinds="positions columns",
    why=_BASE_WHY,
    source="AMD-AGI/Primus PR 928: output not de-rotated",
)
def output_rotated_forwards(
    x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool
) -> Tensor:
    """The attention output is rotated forwards once more instead of back."""
    return rope(x, positions, freqs=freqs, inverse=not inverse)


@fault(
    op="rope",
    sites="L3/attn/o_rope",
    kinds="positions columns",
    why=_BASE_WHY,
    source="AMD-AGI/Primus PR 949",
)
def output_not_rotated_back(
    x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool
) -> Tensor:
    """The attention output keeps its rotation."""
    return x.clone()


@fault(
    op="rope",
    sites="L4/attn/kv_rope",
    kinds="columns positions unexplained",
    why="rounding, in the roped columns, and none at position 0",
    source="the release: transformers casts cos and sin to bfloat16",
)
def cos_sin_in_bfloat16(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """cos and sin are rounded to bfloat16."""
    rd = 2 * freqs.numel()
    angle = (positions.float()[:, None] * freqs).view(len(x), *[1] * (x.dim() - 2), -1)
    cos, sin = rounded(angle.cos()), rounded(angle.sin()) * (-1.0 if inverse else 1.0)
    even, odd = acc(x[..., -rd::2]), acc(x[..., -rd + 1 :: 2])
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((x[..., :-rd], turned.to(x.dtype)), -1)


@fault(
    op="rope",
    sites="L4/attn/index/rope",
    kinds="positions",
    source="positions in a chunk counted from its start",
)
def position_in_the_window(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """Positions are taken modulo 128, the size of the window."""
    return rope(x, positions % 128, freqs=freqs, inverse=inverse)


# ------------------------------------------------------------------------------ norms


@fault(
    op="rms_norm",
    sites="L1/attn/q_norm",
    kinds="constant_factor",
    source="another model's eps",
)
def eps_1e_5(x: Tensor, *, weight: Tensor | None, eps: float) -> Tensor:
    """eps is 1e-5 instead of 1e-6."""
    return rms_norm(x, weight=weight, eps=1e-5)


@fault(
    op="rms_norm",
    sites="L2/ffn/norm",
    kinds="constant_factor",
    source="another model's norm: weights stored minus 1",
)
def norm_weight_plus_1(x: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """The weight is taken for an offset from 1."""
    return rms_norm(x, weight=acc(weight) + 1, eps=eps)


@fault(
    op="rms_norm",
    sites="L3/attn/q_head_norm",
    kinds="constant_factor",
    source="the release: every head of q is normed, without a weight",
)
def q_head_norm_missing(x: Tensor, *, weight: Tensor | None, eps: float) -> Tensor:
    """The heads of q are not normed."""
    return x.clone()


@fault(
    op="rms_norm",
    sites="L4/attn/q_head_norm",
    kinds="constant_factor",
    source="the release: over all 512 dims",
)
def q_head_norm_without_rope_dims(x: Tensor, *, weight: Tensor | None, eps: float) -> Tensor:
    """The mean square of a head leaves out its last eighth, the roped dims."""
    kept = acc(x[..., : x.shape[-1] * 7 // 8])
    rho = torch.rsqrt(kept.square().mean(-1, keepdim=True) + eps)
    return (acc(x) * rho).to(x.dtype)


@fault(
    op="rms_norm",
    sites="head/norm",
    kinds="constant_factor unexplained",
    why="a factor for each row times one for each column",
    source="Avarok-Cybersecurity/atlas PR 186: final norm skipped",
)
def final_norm_skipped(x: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """The norm before the logits is skipped."""
    return x.clone()


@fault(
    op="rms_norm",
    sites="L1/attn/norm",
    kinds="shifted rows",
    why="every row is the one before",
    source="a row pointer advanced too late",
)
def row_of_the_token_before(x: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """With more than one row, row i holds the norm of row i - 1."""
    return rms_norm(x, weight=weight, eps=eps).roll(1, 0)


@fault(
    op="rms_norm",
    sites="L4/ffn/norm",
    kinds="constant_factor unexplained",
    why="mean over a padded width: a factor for the whole",
    source="width padded to a power of two",
)
def mean_over_padded_width(x: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    """The mean square is divided by the width padded to a multiple of 96."""
    width = x.shape[-1]
    padded = -(-width // 96) * 96 if width % 96 else width + 96
    return (acc(rms_norm(x, weight=weight, eps=eps)) * (padded / width) ** 0.5).to(x.dtype)
