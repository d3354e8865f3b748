"""Cases for compute-sanitizer: the probes' kernels over views of every kind, alone and in a graph. See sanitize.py.

What they find is not brought to the host by way of torch's kernels, whose writes initcheck does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine import cuda
from dsv4_bench.engine.cuda.softmax_stats import softmax_stats


def views() -> list[cuda.stats.View]:
    """Inputs are copied from the host: what torch's kernels write, the sanitizer does not see."""
    found: list[cuda.stats.View | None] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = torch.randn(40, 1003).to(dtype).cuda()
        flat = torch.randn(70_001).to(dtype).cuda()
        index = torch.tensor([3, -1, 39, 3]).cuda()
        for view in (base, base[:, 3:-2], base[::2], flat[1:], flat[:1], flat[:0]):
            found.append(cuda.stats.moments_view(view))
        found.append(cuda.stats.moments_view(base, index))
        comb: Tensor = torch.rand(33, 4, 4).to(dtype).cuda()
        found += [cuda.stats.sums_view(comb, axis) for axis in (1, 2)]
        found += [cuda.stats.sums_view(comb[:, 0], None), cuda.stats.empty_view(comb, 10)]
    found.append(cuda.stats.values_view(torch.arange(7).cuda(), 2))
    return [view for view in found if view is not None]


def softmax() -> None:
    for n, heads, dim, widths in (
        (3, 9, 512, (128, 33)),
        (1, 64, 264, (65, 512)),
        (1, 128, 8, (3, 0)),
    ):
        pools = [
            (torch.randn(50, dim).bfloat16().cuda(), torch.randint(-1, 50, (n, w)).int().cuda())
            for w in widths
        ]
        q, lse = torch.randn(n, heads, dim).bfloat16().cuda(), torch.randn(n, heads).cuda()
        both = pools[0], pools[1] if widths[1] else None
        given = (q, lse, torch.randn(heads).cuda(), range(n), both, 0.1)
        assert softmax_stats(*given) is not None


def statistics() -> None:
    device = torch.device("cuda")
    for exponents in (False, True):
        ring = cuda.stats.Ring(device, slots=40, steps=2, exponents=exponents, width=200)
        for tensor in (ring.step, ring.arrived):
            tensor.copy_(torch.zeros(tensor.shape, dtype=tensor.dtype))
        looked = views()
        ring.begin()
        ring.launch(looked)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ring.begin()
            ring.launch(looked[:20])
            ring.launch(looked[20:], 20)
        for _ in range(3):
            graph.replay()
    stamps = cuda.stats.Stamps(device, 2, 2)
    stamps.step.copy_(torch.zeros(1, dtype=torch.int64))
    for _ in range(3):
        stamps.stamp(0, begin=True)
        stamps.stamp(1)


def probes() -> None:
    statistics()
    softmax()


PARTS = {"probes": (probes, ("probes", "probe_softmax"))}
