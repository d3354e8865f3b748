"""DeepGEMM (deepseek-ai) as a peer of the indexer's scores, and its product of mHC pre.

Scores: fp8 keys in pages, one query a sequence.
Its schedule, computed once a step and shared by all layers, is not in the time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peer_library import BF16, CUDA, Peer, error, launch
from torch import Tensor

HEADS, DIM, PAGE = 64, 128, 64
FP8 = torch.float8_e4m3fn


def scores(batch: int, keys: int) -> Peer:
    """Scores [batch, keys] of one query a sequence, each over pages of its own."""
    pages = torch.empty(batch * keys // PAGE, PAGE * (DIM + 4), device=CUDA, dtype=torch.uint8)
    data = torch.randn(len(pages), PAGE * DIM, device=CUDA, dtype=BF16).to(FP8)
    scale = torch.rand(len(pages), PAGE, device=CUDA) + 0.5
    pages[:, : PAGE * DIM], pages[:, PAGE * DIM :] = data.view(torch.uint8), scale.view(torch.uint8)
    q = torch.randn(batch, HEADS, DIM, device=CUDA, dtype=BF16).to(FP8)
    weights = torch.randn(batch, HEADS, device=CUDA)
    lengths = torch.full((batch,), keys, device=CUDA, dtype=torch.int32)
    table = torch.randperm(len(pages), device=CUDA).int().view(batch, -1)
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    plan = torch.zeros(processors + 1, 2, device=CUDA, dtype=torch.int32)
    launch("deepgemm", "deepgemm_plan", batch, lengths, plan)()
    out = torch.empty(batch, keys, device=CUDA)
    inputs = (q, pages, weights, lengths, out, table, plan)
    shape = (batch, len(pages), out.stride(0), table.stride(0))
    call = launch("deepgemm", "deepgemm_logits", *inputs, *shape)

    def check() -> float:
        last = batch - 1
        page = table[last].long()
        rows = data[page].view(-1, DIM).float() * scale[page].view(-1, 1)
        dots = (rows @ q[last].float().T).relu_()
        return error(out[last], dots @ weights[last], 0.001)

    return call, check


def prenorm(x: Tensor, fn: Tensor, splits: int) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """x [n, 4 d] bf16 times fn [24, 4 d], and the squares of x summed: mix, sums and the call."""
    n, k = x.shape
    mix = torch.empty(splits, n, len(fn), device=CUDA)
    sums = torch.empty(splits, n, device=CUDA)
    return mix, sums, launch("deepgemm", "deepgemm_prenorm", x, fn, mix, sums, n, k, splits)
