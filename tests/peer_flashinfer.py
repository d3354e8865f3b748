"""FlashInfer as a peer of the hyper-connections: post, and pre behind DeepGEMM's product."""

from __future__ import annotations

import torch
from peer_deepgemm import prenorm
from peer_library import BF16, CUDA, Peer, error, launch

import dsv4_bench.engine.ops  # noqa: F401  (registers the references)
from dsv4_bench.engine.registry import OPS

STREAMS, D, ITERS, EPS = 4, 4096, 20, 1e-6


def splits_of(n: int) -> int:
    """The fastest of 1, 2, 8 and 16 on an H200 for the chain of both kernels."""
    return 8 if n <= 1024 else 1


def pre(n: int) -> Peer:
    x = torch.randn(n, STREAMS, D, device=CUDA, dtype=BF16)
    fn = torch.randn(24, STREAMS * D, device=CUDA) * (STREAMS * D) ** -0.5
    scale, base = torch.rand(3, device=CUDA), torch.randn(24, device=CUDA)
    splits = splits_of(n)
    mix, sums, product = prenorm(x.flatten(1), fn, splits)
    post, comb = torch.empty(n, STREAMS, device=CUDA), torch.empty(n, 16, device=CUDA)
    u = torch.empty(n, D, device=CUDA, dtype=BF16)
    inputs, results = (mix, sums, x, scale, base), (post, comb, u)
    constants = (EPS, EPS, 2.0, ITERS)
    fused = launch("flashinfer", "flashinfer_pre", *inputs, *results, n, D, splits, *constants)

    def call() -> None:
        product()
        fused()

    def check() -> float:
        params = {"fn": fn, "scale": scale, "base": base, "iters": ITERS}
        want = OPS["hc_pre"].reference(x[:64].float(), **params, eps=EPS, norm_eps=EPS)
        found = zip((u, post, comb.view(n, STREAMS, STREAMS)), want, strict=True)
        return max(error(got[:64], right, 0.01) for got, right in found)

    return call, check


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
