"""Runs each kernel of attention, hyper-connections, indexer and compressor once, for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/sanitize_cuda_attention.py

Small inputs with ragged ends, -1 indices and unequal sequences. Results are not judged here.
"""

from __future__ import annotations

from typing import Any

import torch
from cuda_judge import kernel
from torch import Tensor

from dsv4_bench.engine.cuda.compressor import compressed_entry
from dsv4_bench.engine.cuda.hyper import hc_post_pre, hc_post_pre_norm
from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.kv_entry import pack
from dsv4_bench.engine.step import Step


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype).cuda()


def hyper() -> None:
    f32 = torch.float32
    for n, d, dtype in ((37, 4096, torch.bfloat16), (9, 7168, torch.bfloat16), (3, 100, f32)):
        x, y = randn(n, 4, d, dtype=dtype), randn(n, d, dtype=dtype)
        constants: dict[str, Any] = {"eps": 1e-6, "norm_eps": 1e-6}
        pre = {"fn": randn(24, 4 * d, dtype=f32), "scale": randn(3, dtype=f32)}
        got = kernel("hc_pre", x, base=randn(24, dtype=f32), iters=20, **pre, **constants)
        head = {"fn": randn(4, 4 * d, dtype=f32), "scale": randn(1, dtype=f32)}
        kernel("hc_head", x, base=randn(4, dtype=f32), **head, **constants)
        kernel("hc_post", y, x, got["post"], got["comb"])
        pre["base"] = randn(24, dtype=f32)
        args = y, x, got["post"], got["comb"]
        hc_post_pre(*args, iters=20, **pre, **constants)
        norm = {"weight": randn(d, dtype=dtype), "weight_eps": 1e-6}
        hc_post_pre_norm(*args, iters=20, **pre, **constants, **norm)


def attention() -> None:
    for n, heads, window, selected, dtype in (
        (1, 64, 128, 200, torch.bfloat16),
        (40, 64, 128, 200, torch.bfloat16),
        (20, 64, 128, 320, torch.bfloat16),
        (140, 20, 65, 129, torch.bfloat16),
        (2, 3, 5, 7, torch.float32),
    ):
        pools = [randn(300, 512, dtype=dtype) for _ in range(2)]
        index = [torch.randint(-1, 300, (n, k), dtype=torch.int32) for k in (window, selected)]
        sink = randn(heads, dtype=torch.float32)
        indices = [x.cuda() for x in index]
        args = randn(n, heads, 512, dtype=dtype), pools[0], indices[0], pools[1], indices[1]
        kernel("attention", *args, sink=sink, scale=0.04)


def packed_entries() -> None:
    rows = torch.randn(300, 512)
    entries = pack(rows, 584).cuda()
    for n, heads, window, selected, dtype in (
        (1, 64, 128, 200, torch.bfloat16),
        (40, 64, 128, 200, torch.bfloat16),
        (20, 64, 128, 320, torch.bfloat16),
        (140, 20, 65, 129, torch.bfloat16),
        (2, 3, 5, 7, torch.float32),
    ):
        index = [torch.randint(-1, 300, (n, k), dtype=torch.int32) for k in (window, selected)]
        indices, sink = [x.cuda() for x in index], randn(heads, dtype=torch.float32)
        args = randn(n, heads, 512, dtype=dtype), entries, indices[0], entries, indices[1]
        kernel("attention", *args, sink=sink, scale=0.04)
        slots = torch.randperm(300)[:n].cuda()
        kernel("cache_write", randn(n, 512, dtype=dtype), slots, entries)
        kernel("gather_swa", entries[:7], randn(n, 512, dtype=dtype))


def indexer() -> None:
    starts, lengths = (2000, 3, 701), (1, 40, 5)
    step = Step(torch.zeros(46, dtype=torch.int64, device="cuda"), starts, lengths, 128)
    capacity = step.entries(4) + 3
    spans = [torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]
    visible = ((torch.cat(spans) + 1) // 4).cuda()  # initcheck does not see torch's own kernels
    for dtype, heads in ((torch.bfloat16, 64), (torch.float32, 3)):
        q, keys = randn(46, heads, 128, dtype=dtype), randn(3, capacity, 128, dtype=dtype)
        args = q, keys, randn(46, heads, dtype=dtype), step
        score = kernel("index_score", *args, scale=0.1, ratio=4)["score"]
        kernel("index_topk", score, visible, k=100)
    decode = Step(torch.zeros(2, dtype=torch.int64, device="cuda"), (40000, 701), (1, 1), 128)
    keys = randn(2, decode.entries(4) + 3, 128)
    args = randn(2, 64, 128), keys, randn(2, 64), decode
    kernel("index_score", *args, scale=0.1, ratio=4)
    # A cluster a row, or many blocks; random, and what the bound does not help.
    for total in (40001, 12000, 3000, 700):
        whole = torch.tensor([total]).cuda()
        for score in (torch.randn(total), (torch.arange(total) ** 3 // 9).float()):
            kernel("index_topk", score[None].cuda(), whole, k=512)
    for ratio, width, slots in ((4, 256, 8), (128, 128, 128)):
        kv, gate = (randn(46, width, dtype=torch.float32) for _ in range(2))
        states = [randn(3, slots, width, dtype=torch.float32) for _ in range(2)]
        ape = randn(ratio, width, dtype=torch.float32)
        kernel("compressor", kv, gate, *states, step, ape=ape)
        compressor_of_one_token(kv, gate, states, ape)


def compressor_of_one_token(kv: Tensor, gate: Tensor, states: list[Tensor], ape: Tensor) -> None:
    """A window that closes, one that stays open, one that closes and has no place in the cache."""
    ratio, dim = len(ape), 128
    starts = torch.tensor([ratio - 1, 0, ratio - 1]).cuda()
    step = FixedStep(torch.zeros(3).long().cuda(), starts, 128, 256, {ratio: 64})
    step._tables = {ratio: step.sequence_table(ratio).cpu().cuda()}  # for initcheck, as above
    kernel("compressor", kv[:3], gate[:3], *states, step, ape=ape)
    compressed_entry(
        *(kv[:3], gate[:3], *states, step),
        ape=ape,
        weight=randn(dim),
        eps=1e-6,
        positions=torch.tensor([0, 5, 70000]).cuda(),
        freqs=randn(32, dtype=torch.float32),
        slots=torch.tensor([2, -1, -1]).cuda(),
        entries=randn(4, dim),
    )


def main() -> None:
    torch.manual_seed(1)
    hyper()
    attention()
    packed_entries()
    indexer()
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()
