"""FlashInfer as a peer of the hyper-connections: post, and pre behind the product of DeepGEMM or cuBLAS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peer_deepgemm import prenorm
from peer_library import BF16, CUDA, Peer, error, launch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the references)
from dsv4_bench.engine.registry import OPS

STREAMS, D, ITERS, EPS = 4, 4096, 20, 1e-6


def splits_of(n: int) -> int:
    """The fastest of 1, 2, 8 and 16 on an H200 for the chain of both kernels."""
    return 8 if n <= 1024 else 1


class Pre:
    """Inputs and results of one hc_pre of n tokens."""

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, STREAMS, D, device=CUDA, dtype=BF16)
        self.fn = torch.randn(24, STREAMS * D, device=CUDA) * (STREAMS * D) ** -0.5
        self.scale, self.base = torch.rand(3, device=CUDA), torch.randn(24, device=CUDA)
        self.post, self.comb = torch.empty(n, STREAMS, device=CUDA), torch.empty(n, 16, device=CUDA)
        self.u = torch.empty(n, D, device=CUDA, dtype=BF16)

    def fused(self, mix: Tensor, sums: Tensor | None, splits: int) -> Callable[[], None]:
        """Everything behind the product; without `sums` (and splits 0) the norm too."""
        inputs = (mix, sums, self.x, self.scale, self.base)
        shape = (len(self.x), D, splits, EPS, EPS, 2.0, ITERS)
        return launch("flashinfer", "flashinfer_pre", *inputs, self.post, self.comb, self.u, *shape)

    def check(self) -> float:
        params = {"fn": self.fn, "scale": self.scale, "base": self.base, "iters": ITERS}
        want = OPS["hc_pre"].reference(self.x[:64].float(), **params, eps=EPS, norm_eps=EPS)
        found = (self.u, self.post, self.comb.view(-1, STREAMS, STREAMS))
        return max(error(got[:64], right, 0.01) for got, right in zip(found, want, strict=True))


def pre(n: int) -> Peer:
    """DeepGEMM's product and sums of squares, then FlashInfer."""
    case, splits = Pre(n), splits_of(n)
    mix, sums, product = prenorm(case.x.flatten(1), case.fn, splits)
    fused = case.fused(mix, sums, splits)

    def call() -> None:
        product()
        fused()

    return call, case.check


def pre_cublas(n: int) -> Peer:
    """A cast, cuBLAS's tf32 product, then FlashInfer with the norm."""
    case = Pre(n)
    wide = torch.empty(n, STREAMS * D, device=CUDA)
    mix = torch.empty(n, len(case.fn), device=CUDA)
    fused = case.fused(mix, None, 0)

    def call() -> None:
        wide.copy_(case.x.flatten(1))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.mm(wide, case.fn.T, out=mix)
        torch.backends.cuda.matmul.allow_tf32 = before
        fused()

    return call, case.check


def post(n: int) -> Peer:
    y = torch.randn(n, D, device=CUDA, dtype=BF16)
    x = torch.randn(n, STREAMS, D, device=CUDA, dtype=BF16)
    gain, comb = torch.rand(n, STREAMS, device=CUDA), torch.rand(n, STREAMS, STREAMS, device=CUDA)
    out = torch.empty_like(x)
    call = launch("flashinfer", "flashinfer_post", y, x, gain, comb, out, n)

    def check() -> float:
        want = OPS["hc_post"].reference(y.float(), x.float(), gain, comb)
        return error(out, want, 0.01)

    return call, check
