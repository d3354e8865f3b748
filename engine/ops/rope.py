"""Rotary embedding on interleaved pairs of the last dims, and its inverse.

Source: the release, precompute_freqs_cis and apply_rotary_emb.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.registry import op


def rope_frequencies(config: Config, layer: int) -> Tensor:
    """Angles per position of `layer`, float32 [rd/2].

    Sliding-only layers: base rope_theta, no scaling. Layers with a compressor: base
    compress_rope_theta with YaRN at all lengths, no attention factor.
    """
    rd = config.qk_rope_head_dim
    exponent = torch.arange(0, rd, 2, dtype=torch.float32) / rd
    if config.ratio(layer) == 0:
        return 1.0 / config.rope_theta**exponent
    base = config.compress_rope_theta
    freqs = 1.0 / base**exponent
    yarn = config.rope_scaling
    if yarn is None:
        return freqs

    def correction_dim(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return rd * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), rd - 1)
    index = torch.arange(rd // 2, dtype=torch.float32)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return freqs * (1 - ramp) + (freqs / yarn.factor) * ramp


@op(
    "rope",
    outputs=("y",),
    flops=lambda a: 6 * a["x"].numel() // a["x"].shape[-1] * a["freqs"].numel(),
)
def rope(x: Tensor, positions: Tensor, *, freqs: Tensor, inverse: bool) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the last rd dims by +-position * freqs[i]; a new tensor.

    x [n, d] or [n, h, d], positions [n] int64, freqs [rd/2] float32. Angles, cos and sin in
    float32, result in x's dtype; the other dims are copied.
    """
    rd = 2 * freqs.numel()
    angle = acc(positions.float()[:, None] * freqs)  # [n, rd/2], the product always in float32
    if x.dim() == 3:
        angle = angle[:, None]
    cos, sin = angle.cos(), angle.sin() * (-1.0 if inverse else 1.0)
    even, odd = acc(x[..., -rd::2]), acc(x[..., -rd + 1 :: 2])
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :-rd], rotated.to(x.dtype)), dim=-1)
