"""The checkpoint's number formats as differentiable rounding, for fine-tuning through them.

`fake_quantized` gives every matrix that the checkpoint stores in FP8 or NVFP4 the value it will
have there; the gradient passes straight through the rounding. The numbers are those of
engine/formats.py, computed on whichever device the parameters are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DENSE = ("embed", "lm_head", "mlp.gate.", "weights_proj", "compressor.kv_proj", "compressor.gate_proj",
          "indexer.kv_proj", "indexer.gate_proj")  # fmt: skip


def stored_format(name: str, value: Tensor) -> str:
    """`nvfp4`, `fp8` or `plain`, for a transformers parameter of the `nvfp4` layout."""
    if ".mlp.experts." in name:
        return "nvfp4"
    if value.dim() < 2 or not name.endswith("_proj.weight") or any(part in name for part in _DENSE):
        return "plain"
    return "fp8"


def round_fp8(weight: Tensor) -> Tensor:
    """[n, k] through e4m3 with a power-of-two scale a 128x128 block."""
    n, k = weight.shape
    rows, cols = -(-n // 128), -(-k // 128)
    padded = F.pad(weight, (0, cols * 128 - k, 0, rows * 128 - n)).view(rows, 128, cols, 128)
    amax = padded.abs().amax((1, 3), keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448.0)))
    value = (padded / scale).to(torch.float8_e4m3fn).float() * scale
    return value.view(rows * 128, cols * 128)[:n, :k]


def round_nvfp4(weight: Tensor) -> Tensor:
    """[e, n, k] through e2m1 with e4m3 scales a 16 elements and one float32 scale an expert."""
    e, n, k = weight.shape
    peak = weight.abs().amax((1, 2)).clamp(min=1e-12).view(e, 1, 1, 1) / 2688.0
    blocks = weight.reshape(e, n, k // 16, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / (6.0 * peak)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale = scale.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).float() * peak
    x = blocks / scale
    size = x.abs().clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((size / step).round() * step * x.sign() * scale).view(e, n, k)


class _Through(torch.autograd.Function):
    """The rounded value forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx: object, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quantized(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replacements for the parameters that the checkpoint quantises, by name."""
    found = {}
    for name, value in params.items():
        form = stored_format(name, value)
        if form != "plain":
            with torch.no_grad():
                rounded = round_nvfp4(value) if form == "nvfp4" else round_fp8(value)
            found[name] = _Through.apply(value, rounded)
    return found
