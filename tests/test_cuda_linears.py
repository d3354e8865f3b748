"""Several linears of one to eight rows in one launch, against float64. Skipped where there is no H100 or H200."""

from __future__ import annotations

import pytest
import torch
from test_cpu_kernels import make_weight, oracle_weight, same
from test_cuda_linear import BF16, CUDA, LIMIT, on_gpu, random_weight
from torch import Tensor

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.cuda.linears import joins_linears, linears
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS

pytestmark = pytest.mark.gpu

F32 = torch.float32
# A CSA layer's products of its normed input: format, rows, result.
LAYER = [
    ("fp8", 1024, None),
    ("fp8", 512, None),
    ("bf16", 1024, F32),
    ("bf16", 1024, F32),
    ("bf16", 256, F32),
    ("bf16", 256, F32),
    ("bf16", 64, None),
]


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.cuda.synchronize()
    for y, exact in zip(found, wanted, strict=True):
        same(y.cpu(), exact.to(y.dtype).cpu(), LIMIT[y.dtype])


@pytest.mark.parametrize("k", [16, 80, 512, 1040, 4096, 8192])
def test_ragged_shapes_and_mixed_formats(k: int) -> None:
    torch.manual_seed(k)
    kinds = [("bf16", 1), ("fp8", 33), ("fp8_f32", 130), ("bf16", 16), ("bf16", 47), ("fp8", 129)]
    weights = [make_weight(kind, n, k) for kind, n in kinds]
    dtypes = [F32, BF16, None, BF16, F32, F32]
    for shape in ((1, k), (1, 1, k), (2, k), (1, 7, k), (8, k)):
        x = torch.randn(shape).to(BF16)
        x[..., 3] *= 300  # an outlier channel
        on = [on_gpu(w) for w in weights]
        assert joins_linears(x.to(CUDA), on, dtypes)
        found = linears(x.to(CUDA), on, dtypes)
        assert [y.dtype for y in found] == [dtype or BF16 for dtype in dtypes]
        check(found, [x.double() @ oracle_weight(w).T for w in weights])


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("k", [1152, 4096, 7168])
def test_the_bits_are_those_of_linear_alone(k: int, m: int) -> None:
    """Here both give every warp of a block a part of each row."""
    weights = [random_weight(kind, n, k) for kind, n, _ in LAYER]
    x = torch.randn(m, k, device=CUDA).to(BF16)
    alone = [
        IMPLEMENTATIONS["linear"]["sm90"].function(x, weight=w, out_dtype=F32) for w in weights
    ]
    for y, wanted in zip(linears(x, weights, [F32] * len(weights)), alone, strict=True):
        assert torch.equal(y, wanted)


def test_views_at_offsets() -> None:
    """Weights, scales and activations inside larger tensors: nothing else is read or written."""
    k = 512
    weights = [on_gpu(make_weight(kind, n, k)) for kind, n in (("bf16", 40), ("fp8_f32", 144))]
    around = torch.full((5, k), torch.nan, device=CUDA, dtype=BF16)
    x = torch.randn(3, k, device=CUDA).to(BF16)
    around[1:4] = x
    inside = []
    for w in weights:
        data = torch.full((w.shape[0] + 2, k), torch.nan, device=CUDA).to(w.data.dtype)
        data[1:-1] = w.data
        inside.append(Weight(w.name, w.format, data[1:-1], w.scale))
    found = linears(around[1:4], inside, [F32, F32])
    for y, wanted in zip(found, linears(x, weights, [F32, F32]), strict=True):
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize(
    ("k", "matrices"),
    [
        (4096, LAYER),
        (7168, LAYER),
        (1024, [("fp8", 32768, None), ("fp8", 8192, None)]),  # wq_b and index/wq_b
        (1536, [("fp8", 9000, None), ("bf16", 3000, F32)]),
        (528, [("bf16", 2500, F32), ("fp8", 5000, F32)]),
    ],
    ids=["4096", "7168", "1024", "1536", "528"],
)
def test_a_layer_a_hundred_times(
    k: int, matrices: list[tuple[str, int, torch.dtype | None]], m: int
) -> None:
    torch.manual_seed(1)
    weights = [random_weight(kind, n, k) for kind, n, _ in matrices]
    dtypes = [dtype for *_, dtype in matrices]
    x = torch.randn(m, k, device=CUDA).to(BF16)
    found = linears(x, weights, dtypes)
    reference = OPS["linear"].reference
    check(found, [reference(x.double(), weight=w, out_dtype=torch.float64) for w in weights])
    for _ in range(100):
        again = linears(x, weights, dtypes)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_nan_and_infinity_stay_where_they_are() -> None:
    """In one weight row, in one scale, and in x: in every result."""
    weights = [on_gpu(make_weight(kind, 64, 256)) for kind in ("bf16", "fp8_f32", "fp8")]
    weights[0].data[5, 7], weights[1].scale[0, 1] = torch.nan, torch.inf  # type: ignore[index]
    x = torch.randn(1, 256, device=CUDA).to(BF16)
    dense, scaled, plain = (y[0] for y in linears(x, weights, [F32] * 3))
    assert dense.isnan().nonzero().tolist() == [[5]]
    assert not scaled.isfinite().any() and plain.isfinite().all()
    x[0, 9] = torch.nan
    assert all(y.isnan().all() for y in linears(x, weights, [F32] * 3))


def test_nan_and_infinity_of_one_row_stay_in_it() -> None:
    weights = [on_gpu(make_weight(kind, 64, 256)) for kind in ("bf16", "fp8_f32", "fp8")]
    x = torch.randn(6, 256, device=CUDA).to(BF16)
    clean = linears(x, weights, [F32] * 3)
    x[2, 9], x[4, 200] = torch.nan, torch.inf
    for y, before in zip(linears(x, weights, [F32] * 3), clean, strict=True):
        assert y[2].isnan().all() and not y[4].isfinite().any()
        kept = [0, 1, 3, 5]
        assert torch.equal(y[kept], before[kept])


def test_what_is_not_joined() -> None:
    good = [on_gpu(make_weight(kind, 64, 256)) for kind in ("bf16", "fp8")]
    x, dtypes = torch.randn(1, 256, device=CUDA).to(BF16), [None, None]
    assert joins_linears(x, good, dtypes)
    assert not joins_linears(x, good[:1], dtypes[:1])
    assert not joins_linears(x, good * 5, dtypes * 5)
    assert not joins_linears(x.float(), good, dtypes)
    assert joins_linears(x.expand(8, 256).contiguous(), good, dtypes)
    assert not joins_linears(x.expand(9, 256).contiguous(), good, dtypes)
    assert not joins_linears(x, good, [None, torch.float16])
    for kind, n, k in (("nvfp4", 64, 256), ("f32", 64, 256), ("bf16", 64, 128)):
        unfit: Weight = on_gpu(make_weight(kind, n, k))
        assert not joins_linears(x, [good[0], unfit], dtypes)
