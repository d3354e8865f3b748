"""The sm90 kernels of the routed and shared experts, against float64 on a GPU.

Oracle: the reference in double precision (tests of its own) on the same bits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_cpu_kernels import make_weight
from test_cuda_linear import BF16, CUDA, close, kernel, on_gpu, random_weight, truth
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import IMPLEMENTATIONS

pytestmark = pytest.mark.gpu

FOUR_BITS = ["nvfp4", "mxfp4"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(12)


def make_experts(kind: str, count: int, d: int, inner: int) -> list[Expert]:
    """Experts whose three global scales, where the format has one, are all different."""

    def one(n: int, k: int) -> Weight:
        weight = on_gpu(make_weight(kind, n, k))
        if kind != "nvfp4":
            return weight
        return replace(weight, global_scale=weight.global_scale * float(1 + torch.rand(1)))

    return [Expert(one(inner, d), one(d, inner), one(inner, d)) for _ in range(count)]


def choose(n: int, k: int, count: int) -> Tensor:
    return torch.stack([torch.randperm(count)[:k] for _ in range(n)]).int().to(CUDA)


def compare(bank: list[Expert], x: Tensor, ids: Tensor, limit: float = 2.0) -> None:
    routing = torch.rand(ids.shape, device=CUDA)
    want = truth("experts", x, routing, ids, bank=bank, limit=limit)
    got = kernel("experts", x, routing, ids, bank=bank, limit=limit)
    close(got, want, f"{len(x)} tokens", limit=1e-3)


@pytest.mark.parametrize("kind", [*FOUR_BITS, "fp8_e8m0", "fp8_f32", "bf16"])
@pytest.mark.parametrize("d, inner", [(256, 128), (160, 96), (1024, 512), (2304, 768)])
def test_experts(kind, d, inner):
    """Sizes of whole stages and others; warps with different numbers of stages, or none."""
    bank = make_experts(kind, 10, d, inner)
    for n in (1, 2, 3, 5, 9, 20, 21, 64, 65):
        x = torch.randn(n, d, device=CUDA).to(BF16)
        compare(bank, x, choose(n, 4, 10))
        want = truth("shared_expert", x, expert=bank[0], limit=2.0)
        close(kernel("shared_expert", x, expert=bank[0], limit=2.0), want, "shared", limit=1e-3)


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("d, inner", [(512, 128), (768, 512), (4096, 2048)])
@pytest.mark.parametrize(
    "sizes",
    [
        (9, 31, 32, 33),
        (15, 16, 17, 40),
        (23, 24, 25, 8),
        (63, 64, 65, 1),
        (95, 96, 97, 0),
        (127, 128, 129, 300),
    ],
)
def test_experts_of_every_tile_width(kind, d, inner, sizes):
    """Experts with just below, just above and exactly as many pairs as a tile is wide."""
    bank = make_experts(kind, 4, d, inner) if d < 4096 else random_experts(kind, 4, d, inner)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids))].int().to(CUDA)[:, None]
    compare(bank, torch.randn(len(ids), d, device=CUDA).to(BF16), ids)


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize(
    "sizes, count",
    [
        ((1, 2, 3, 4), 16),
        ((2, 2, 2, 2), 16),
        ((5, 8, 9, 1), 16),
        ((4, 0, 7, 6), 16),
        ((9, 30, 65, 12), 4),
    ],
)
def test_experts_of_tokens_of_any_magnitude(kind, sizes, count):
    """Every number of pairs that shares the products of a weight, what is left of longer lists, and a tile."""
    bank = make_experts(kind, count, 1024, 512)
    ids = torch.repeat_interleave(torch.arange(4) * (count // 4 + count // 16), torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids))].int().to(CUDA)[:, None]
    x = torch.randn(len(ids), 1024, device=CUDA).to(BF16)
    x *= torch.exp2(torch.randint(-30, 20, (len(ids), 1), device=CUDA)).to(BF16)
    x[:, :256] *= 2.0**-20  # magnitudes differ from stage to stage
    routing = torch.rand(ids.shape, device=CUDA)
    want = truth("experts", x, routing, ids, bank=bank, limit=10.0)
    got = kernel("experts", x, routing, ids, bank=bank, limit=10.0)
    # Where a sum lies next to the middle of two bf16, float32's last bit decides the rounding of gate, up or
    # hidden: a token may be off by a part of bf16's last bit, all of them, at one norm, by far less.
    norms = want.norm(dim=1, keepdim=True)
    close((got.double() / norms).float(), want / norms, "rows of one norm", limit=5e-4)
    for token, error in enumerate(((got.double() - want) / norms).norm(dim=1).tolist()):
        assert error <= 2.0**-8, f"token {token}: relative error {error:.2e}"


@pytest.mark.parametrize("kind", ["fp8_e8m0", "fp8_f32", "bf16", *FOUR_BITS])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_shared_expert_at_model_shape(kind, n):
    (expert,) = random_experts(kind, 1, 4096, 2048)
    x = torch.randn(n, 4096, device=CUDA).to(BF16)
    x[:, 7] *= 100
    want = truth("shared_expert", x, expert=expert, limit=10.0)
    close(kernel("shared_expert", x, expert=expert, limit=10.0), want, f"{n} rows", limit=1e-3)


def random_experts(kind: str, count: int, d: int, inner: int) -> list[Expert]:
    """Experts of the model's size, made on the GPU."""

    def one(n: int, k: int, scale: float) -> Weight:
        return replace(random_weight(kind, n, k), global_scale=scale if kind == "nvfp4" else 1.0)

    return [
        Expert(one(inner, d, 0.01), one(d, inner, 0.02 + 0.01 * i), one(inner, d, 0.03))
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("d, inner", [(4096, 2048), (7168, 3072)])
@pytest.mark.parametrize("n", [1, 8, 64, 200])
def test_experts_at_model_shapes(kind, d, inner, n):
    bank = random_experts(kind, 24, d, inner)
    x = torch.randn(n, d, device=CUDA).to(BF16)
    x[:, 7] *= 100  # an outlier channel
    compare(bank, x, choose(n, 6, 24), limit=10.0)


def test_experts_chosen_by_all_and_by_none():
    for d, inner in ((128, 64), (512, 256)):
        bank = make_experts("nvfp4", 12, d, inner)
        for n in (1, 40, 130):
            x = torch.randn(n, d, device=CUDA).to(BF16)
            compare(bank, x, torch.tensor([3, 7], dtype=torch.int32, device=CUDA).repeat(n, 1))
        none = choose(1, 2, 12)[:0]
        nothing = kernel("experts", x[:0], none.float(), none, bank=bank, limit=1.0)
        assert nothing.shape == (0, d)


@pytest.mark.parametrize("d, inner", [(256, 128), (512, 256)])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 70, 300])
def test_experts_repeat_to_the_bit_and_keep_nan(n, d, inner):
    """A NaN reaches its own token only: rows of a tile that hold no pair stay out of the results."""
    bank = make_experts("nvfp4", 16, d, inner)
    x = torch.randn(n, d, device=CUDA).to(BF16)
    ids = choose(n, 6, 16)
    routing = torch.rand(n, 6, device=CUDA)
    first = kernel("experts", x, routing, ids, bank=bank, limit=7.0)
    assert first.isfinite().all()
    for _ in range(100):
        assert torch.equal(kernel("experts", x, routing, ids, bank=bank, limit=7.0), first)
    x[n // 2, 9] = math.nan
    got = kernel("experts", x, routing, ids, bank=bank, limit=7.0)
    assert got[n // 2].isnan().all()
    rest = [i for i in range(n) if i != n // 2]
    assert torch.equal(got[rest], first[rest])


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("n", [3, 150])
@pytest.mark.parametrize("inner", [128, 256])
def test_experts_keep_a_scale_that_is_nan(kind, n, inner):
    bank = make_experts(kind, 4, 512, inner)
    scale = bank[1].w3.scale
    assert scale is not None
    scale.view(torch.uint8)[5, 2] = 0x7F if kind == "nvfp4" else 0xFF
    x = torch.randn(n, 512, device=CUDA).to(BF16)
    ids = torch.arange(n, device=CUDA).remainder(4).int()[:, None]
    got = kernel("experts", x, torch.ones(n, 1, device=CUDA), ids, bank=bank, limit=7.0)
    assert torch.equal(got.isnan().all(1), ids[:, 0] == 1)
    assert torch.equal(got.isnan().any(1), ids[:, 0] == 1)


@pytest.mark.parametrize("n", [1, 8, 64])
def test_experts_in_a_graph_and_of_one_stacked_tensor(n):
    """All experts as slices of three stacked tensors; a replay gives what the call gave."""
    parts = make_experts("nvfp4", 6, 512, 256)

    def stacked(which: int) -> list[Weight]:
        data = torch.stack([expert[which].data for expert in parts])
        scale = torch.stack([expert[which].scale.view(torch.uint8) for expert in parts])
        scale = scale.view(torch.float8_e4m3fn)
        return [
            replace(expert[which], data=data[i], scale=scale[i]) for i, expert in enumerate(parts)
        ]

    bank = [Expert(*weights) for weights in zip(*(stacked(i) for i in range(3)), strict=True)]
    x, ids = torch.randn(n, 512, device=CUDA).to(BF16), choose(n, 3, 6)
    routing = torch.rand(n, 3, device=CUDA)
    first = kernel("experts", x, routing, ids, bank=parts, limit=7.0)
    assert torch.equal(kernel("experts", x, routing, ids, bank=bank, limit=7.0), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel_only(x, routing, ids, bank)
        z = kernel_only(x, routing, ids, parts)
    y.fill_(math.nan), z.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, first) and torch.equal(z, first)


def kernel_only(x: Tensor, routing: Tensor, ids: Tensor, bank: list[Expert]) -> Tensor:
    return IMPLEMENTATIONS["experts"]["sm90"].function(x, routing, ids, bank=bank, limit=7.0)


def test_experts_of_unlike_formats_are_refused():
    bank = [*make_experts("nvfp4", 1, 128, 64), *make_experts("mxfp4", 1, 128, 64)]
    x, ids = torch.randn(1, 128, device=CUDA).to(BF16), torch.zeros(1, 1, device=CUDA).int()
    with pytest.raises(DSV4Error, match="expert 1"):
        kernel("experts", x, torch.ones(1, 1, device=CUDA), ids, bank=bank, limit=1.0)
