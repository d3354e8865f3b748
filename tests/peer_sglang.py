"""SGLang as a peer: topk_v2 of the indexer's selection, hopper_bf16_gemv of one bfloat16 row.

topk_v2 returns the chosen entries in no order.
"""

from __future__ import annotations

from ctypes import c_int64

import torch
from peer_library import BF16, CUDA, Peer, error, launch


def select(rows: int, total: int, equal: bool, k: int = 512) -> Peer:
    scores = torch.randn(rows, total, device=CUDA)
    if equal:
        scores.zero_()
    lengths = torch.full((rows,), total, device=CUDA, dtype=torch.int32)
    plan = torch.zeros(rows + 1, 2, device=CUDA, dtype=torch.int32)
    out = torch.empty(rows, k, device=CUDA, dtype=torch.int32)
    shape = (rows, total, c_int64(scores.stride(0)), k)
    call = launch("sglang", "topk_select", scores, lengths, out, plan, *shape)

    def check() -> float:
        """0, or raises ArithmeticError: the values chosen must be the k best, each entry once."""
        index = out.long().sort(1).values
        got = scores.gather(1, index).sort(1, descending=True).values
        once = bool((index[:, 1:] > index[:, :-1]).all())
        if not (once and got.equal(scores.topk(k).values)):
            raise ArithmeticError("wrong result: not the k best entries")
        return 0.0

    return call, check


def gemv(n: int, k: int) -> Peer:
    """One bfloat16 row [k] times a matrix [n, k]; the shapes that the shared object has."""
    x, weight = (torch.randn(*size, device=CUDA, dtype=BF16) for size in ((1, k), (n, k)))
    out = torch.empty(1, n, device=CUDA, dtype=BF16)
    call = launch("sglang", "sglang_gemv", x, weight, out, n, k)
    return call, lambda: error(out, x.float() @ weight.float().T, 0.01)
