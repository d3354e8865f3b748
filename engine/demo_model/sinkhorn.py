"""mHC's Sinkhorn normalisation as two Triton kernels, for training.

Forty passes over 4x4 matrices are thousands of launches a step as separate operations. The forward
kernel keeps the sums it divided by; the backward kernel runs the divisions in reverse from the
result, so that no intermediate matrix is stored. Without a GPU, plain autograd does the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BLOCK = 64


def sinkhorn_plain(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[n, 4, 4] -> doubly stochastic, as transformers does it."""
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


if triton is not None:

    @triton.jit
    def _forward(logits, out, sums, n, eps, ITERS: tl.constexpr, BLOCK: tl.constexpr):
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        four = tl.arange(0, 4)
        index = rows[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
        inside = (rows < n)[:, None, None] & (four[None, :, None] < 4) & (four[None, None, :] < 4)
        kept = rows[:, None] * 4 + four[None, :]
        live = (rows < n)[:, None] & (four[None, :] < 4)
        x = tl.load(logits + index, mask=inside, other=0.0)
        x = tl.exp(x - tl.max(x, axis=2)[:, :, None])
        x = x / tl.sum(x, axis=2)[:, :, None] + eps
        for i in range(2 * ITERS - 1):
            if i % 2 == 0:
                total = tl.sum(x, axis=1) + eps
                x = x / total[:, None, :]
            else:
                total = tl.sum(x, axis=2) + eps
                x = x / total[:, :, None]
            tl.store(sums + i * n * 4 + kept, total, mask=live)
        tl.store(out + index, x, mask=inside)

    @triton.jit
    def _backward(grad, out, sums, result, n, eps, ITERS: tl.constexpr, BLOCK: tl.constexpr):
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        four = tl.arange(0, 4)
        index = rows[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
        inside = (rows < n)[:, None, None] & (four[None, :, None] < 4) & (four[None, None, :] < 4)
        kept = rows[:, None] * 4 + four[None, :]
        live = (rows < n)[:, None] & (four[None, :] < 4)
        g = tl.load(grad + index, mask=inside, other=0.0)
        y = tl.load(out + index, mask=inside, other=0.0)
        for j in range(2 * ITERS - 1):  # y = x / total: dx = (dy - sum(dy * y)) / total
            i = 2 * ITERS - 2 - j
            total = tl.load(sums + i * n * 4 + kept, mask=live, other=1.0)
            if i % 2 == 0:
                g = (g - tl.sum(g * y, axis=1)[:, None, :]) / total[:, None, :]
                y = y * total[:, None, :]
            else:
                g = (g - tl.sum(g * y, axis=2)[:, :, None]) / total[:, :, None]
                y = y * total[:, :, None]
        y = y - eps
        g = y * (g - tl.sum(g * y, axis=2)[:, :, None])
        tl.store(result + index, g, mask=inside)


class _Sinkhorn(torch.autograd.Function):
    """The two kernels as one differentiable operation on [n, 4, 4] float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iters: int, eps: float) -> Tensor:
        logits = logits.contiguous()
        n = logits.shape[0]
        out = torch.empty_like(logits)
        sums = logits.new_empty(2 * iters - 1, n, 4)
        _forward[(triton.cdiv(n, BLOCK),)](logits, out, sums, n, eps, ITERS=iters, BLOCK=BLOCK)
        ctx.save_for_backward(out, sums)
        ctx.iters, ctx.eps = iters, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        out, sums = ctx.saved_tensors
        grad = grads[0].contiguous()
        n, result = out.shape[0], torch.empty_like(out)
        grid = (triton.cdiv(n, BLOCK),)
        _backward[grid](grad, out, sums, result, n, ctx.eps, ITERS=ctx.iters, BLOCK=BLOCK)
        return result, None, None


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """[..., 4, 4] float32 -> the same shape; kernels on a GPU, plain operations elsewhere."""
    flat = logits.reshape(-1, 4, 4)
    if logits.is_cuda and triton is not None:
        return _Sinkhorn.apply(flat, iters, eps).view(logits.shape)
    return sinkhorn_plain(flat, iters, eps).view(logits.shape)
