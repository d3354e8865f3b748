"""Cases for compute-sanitizer: hyper-connections, indexer scores, top-k and compressor. See sanitize.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from sanitize_cuda import BF16, F32, randn, run
from torch import Tensor

from dsv4_bench.engine.cuda import indexer
from dsv4_bench.engine.cuda.compressor import compressed_entry
from dsv4_bench.engine.cuda.hyper import hc_post_pre, hc_post_pre_norm
from dsv4_bench.engine.fixed_step import FixedStep
from dsv4_bench.engine.step import Step

# ------------------------------------------------------------------------------ hyper-connections


def streams(n: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments by the name of what takes them."""
    constants: dict[str, Any] = {"eps": 1e-6, "norm_eps": 1e-6}
    pre = {"fn": randn(24, 4 * d), "scale": randn(3), "base": randn(24), "iters": 20}
    head = {"fn": randn(4, 4 * d), "scale": randn(1), "base": randn(4)}
    gates = randn(n, 4), torch.rand(n, 4, 4).cuda()
    x, y = randn(n, 4, d, dtype=dtype), randn(n, d, dtype=dtype)
    return {"args": (y, x, *gates), "pre": {**pre, **constants}, "head": {**head, **constants}}


def hyper() -> None:
    """Few tokens; ragged tiles of 8 and of 16 tokens; any width."""
    for n, d, dtype in (
        (3, 4096, BF16),
        (17, 4096, BF16),
        (26, 4096, BF16),
        (2, 7168, BF16),
        (3, 100, BF16),
        (3, 99, F32),
    ):
        given = streams(n, d, dtype)
        x = given["args"][1]
        run("hc_pre", x, **given["pre"])
        run("hc_head", x, **given["head"])
        run("hc_post", *given["args"])
    run("hc_post", *streams(3, 100, F32)["args"])


def hyper_joined() -> None:
    """hc_post and the next hc_pre in one go, without and with the norm that follows and the sum before."""
    for n in (1, 8, 17, 26):
        given = streams(n, 4096, BF16)
        norm = {"weight": randn(4096, dtype=F32 if n == 8 else BF16), "weight_eps": 1e-6}
        hc_post_pre_norm(*given["args"], **given["pre"], **norm)
        if n <= 8:
            parts = randn(n, 4096), randn(n, 4096)
            hc_post_pre_norm(*given["args"], parts=parts, **given["pre"], **norm)
    hc_post_pre(*given["args"], **given["pre"])


# ------------------------------------------------------------------------------ indexer and top-k


def uneven() -> tuple[Step, int]:
    """A step of three sequences that begin in the middle, and pool rows with some to spare."""
    step = Step(torch.zeros(46).long().cuda(), (2000, 3, 701), (1, 40, 5), 128)
    return step, step.entries(4) + 3


def scores() -> None:
    """With the blocks of two processors: several tokens a block, more tiles than its ring holds."""
    step, capacity = uneven()
    decode = Step(torch.zeros(4).long().cuda(), (1300, 701, 5, 900), (1,) * 4, 128)
    with mock.patch.object(indexer, "processors", lambda device: 2):
        for dtype, heads in ((BF16, 64), (BF16, 8), (BF16, 3), (F32, 3)):
            q, keys = randn(46, heads, 128, dtype=dtype), randn(3, capacity, 128, dtype=dtype)
            run("index_score", q, keys, randn(46, heads, dtype=dtype), step, scale=0.1, ratio=4)
        keys = randn(4, decode.entries(4) + 3, 128, dtype=BF16)
        q, weights = randn(4, 64, 128, dtype=BF16), randn(4, 64, dtype=BF16)
        run("index_score", q, keys, weights, decode, scale=0.1, ratio=4)
        turned = torch.zeros(q.shape, dtype=BF16).cuda()
        for to in (None, turned):
            given = (q, keys, weights, decode)
            indexer.rope_index_score(*given, freqs=randn(32), scale=0.1, ratio=4, turned=to)


def topk_of(total: int, *scores: Tensor) -> None:
    for score in scores:
        run("index_topk", score[None].cuda(), torch.tensor([total]).cuda(), k=512)


def cubes(total: int) -> Tensor:
    """Scores whose largest say little of the k-th best."""
    return (torch.arange(total) ** 3 // 9).float()


def topk() -> None:
    """A row in several blocks: random, all equal, and what the bound does not help. Then many rows."""
    topk_of(12_000, torch.randn(12_000))
    for total in (3_000, 700):
        topk_of(total, torch.randn(total), torch.zeros(total), cubes(total))
    for n, total, available in ((3, 900, 132), (16, 1024, 132), (2, 5000, 2)):
        topk_of_rows(n, total, available)
    for total in (400, 900, 1152, 2000):
        topk_of_rows(3, total, 2)


def topk_of_rows(n: int, total: int, available: int) -> None:
    """On a GPU of so many processors; scores of a few values crowd the bins."""
    visible = (torch.arange(1, n + 1) * total // n).cuda()
    with mock.patch.object(indexer, "processors", lambda device: available):
        scores = torch.randn(n, total)
        for score in (scores, scores.round()):  # initcheck sees no kernel of torch's write
            run("index_topk", score.cuda(), visible, k=100)


def topk_long() -> None:
    """A row in several blocks that hold more of it, then in a cluster, in registers of either size."""
    topk_of(18_001, torch.randn(18_001))
    topk_of(40_001, torch.randn(40_001), cubes(40_001))
    topk_of(70_001, torch.randn(70_001))


# ------------------------------------------------------------------------------ compressor


def compressor() -> None:
    step, _ = uneven()
    for ratio, width, slots in ((4, 256, 8), (128, 128, 128)):
        kv, gate = randn(46, width), randn(46, width)
        states = [randn(3, slots, width) for _ in range(2)]
        ape = randn(ratio, width)
        run("compressor", kv, gate, *states, step, ape=ape)
        one_token(kv[:3], gate[:3], states, ape)


def one_token(kv: Tensor, gate: Tensor, states: list[Tensor], ape: Tensor) -> None:
    """A window that closes, one that stays open, one that closes and has no place in the cache."""
    ratio, dim = len(ape), 128
    starts = [ratio - 1, 0, ratio - 1]
    positions = torch.tensor(starts).cuda()
    step = FixedStep(torch.zeros(3).long().cuda(), positions, 128, 256, {ratio: 64})
    rows = [[start, 1, b, b] for b, start in enumerate(starts)]
    step._tables = {ratio: torch.tensor(rows).cuda()}  # a copy from the host, for initcheck
    run("compressor", kv, gate, *states, step, ape=ape)
    outs = (randn(3, dim), *(randn(3, dim, dtype=BF16) for _ in range(2)))
    for dtype, wanted in ((BF16, None), (F32, None), (BF16, outs)):
        compressed_entry(
            *(kv, gate, *states, step),
            ape=ape,
            weight=randn(dim, dtype=dtype),
            eps=1e-6,
            positions=torch.tensor([0, 5, 70000]).cuda(),
            freqs=randn(32),
            slots=torch.tensor([2, -1, -1]).cuda(),
            entries=randn(4, dim, dtype=BF16),
            outs=wanted,
        )


PARTS = {
    "hyper": (hyper, ("hyper", "hyper_post")),
    "hyper_joined": (hyper_joined, ("hyper",)),
    "scores": (scores, ("indexer",)),
    "topk": (topk, ("topk",)),
    "topk_long": (topk_long, ("topk",)),
    "compressor": (compressor, ("compressor",)),
}
