"""The cutedsl kernel of linear, against float64 on a GPU: formats, ragged tiles, NaN, guards, repeats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_cpu_kernels import make_weight, oracle_weight, same
from torch import Tensor
from verified import measured

import dsv4_bench.engine.dsl.linear as dsl_linear
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.dsl import library as dsl_library
from dsv4_bench.engine.dsl.linear import FEW_ROWS, Plan, no_empty_share
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.formats import DENSE_CACHE, Weight
from dsv4_bench.engine.numerics import double_precision
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS
from dsv4_bench.probes.metrics import relative_error

_MISSING = dsl_library.compiler()[0] is None and dsl_linear.LINEAR.built() is None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_MISSING, reason=f"{dsl_library.compiler()[1]}, and not built elsewhere"),
]

CUDA, BF16, F32 = torch.device("cuda"), torch.bfloat16, torch.float32
FORMATS = ["nvfp4", "mxfp4", "fp8_e8m0", "bf16"]
# Relative L2 to float64 rounded once: float32 sums (the matrix unit keeps a bit less), bf16 flips.
LIMIT = {F32: 3e-6, BF16: 1e-3}
# Around one tile of 128 weight rows and of 256 activation rows, and around a stage of 64 columns.
SHAPES = [(8, 64), (128, 128), (136, 192), (264, 1088)]
ROWS = [1, 127, 129, 257, 600]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


def kernel(x: Tensor, weight: Weight, out_dtype: torch.dtype | None = None) -> Tensor:
    """The kernel's result; an error that it left on the device surfaces here."""
    y = IMPLEMENTATIONS["linear"]["cutedsl"].function(x, weight=weight, out_dtype=out_dtype)
    torch.cuda.synchronize()
    return y


def close(
    got: Tensor, want: Tensor, what: str = "", op: str = "linear", name: str = "cutedsl"
) -> None:
    """`got` equals float64 `want`, rounded once to got's dtype."""
    rounded, limit = want.to(got), LIMIT[got.dtype]
    measured(op, name, relative_error(got, rounded), limit)
    same(got, rounded, limit, what)


def random_weight(kind: str, n: int, k: int) -> Weight:
    """Random bits of a large matrix, made on the GPU; all values finite."""

    def codes(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device=CUDA)

    if kind == "nvfp4":
        scale = codes(0x18, 0x58, n, k // 16).view(torch.float8_e4m3fn)
        return Weight(kind, kind, codes(0, 256, n, k // 2), scale, 0.0117)
    if kind == "mxfp4":
        return Weight(kind, kind, codes(0, 256, n, k // 2), codes(110, 125, n, k // 32))
    w = torch.randn(n, k, device=CUDA)
    if kind == "bf16":
        return Weight(kind, "dense", w.to(BF16))
    scale = codes(110, 125, -(-n // 128), -(-k // 128)).view(torch.float8_e8m0fnu)
    return Weight(kind, "fp8_block", w.to(torch.float8_e4m3fn), scale)


def truth(x: Tensor, weight: Weight) -> Tensor:
    """The reference in float64, on the same device."""
    DENSE_CACHE.clear()
    with double_precision():
        return OPS["linear"].reference(x, weight=weight, out_dtype=torch.float64)


@pytest.fixture(params=[Plan(256, 1), Plan(128, 1), Plan(128, 2), Plan(128, 5)], ids=str)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Whatever the shape: these tiles, and that many parts of the columns if there are steps enough."""

    def plan(n: int, m: int, k: int, coded: bool, narrow: bool, processors: int) -> Plan:
        parts = [s for s in range(1, request.param.splits + 1) if no_empty_share(-(-k // 64), s)]
        return Plan(128 if narrow else request.param.tokens, parts[-1])

    monkeypatch.setattr(dsl_linear, "plan", plan)
    return request.param


@pytest.mark.parametrize("kind", FORMATS)
def test_ragged_tiles(kind: str, forced: Plan) -> None:
    for n, k in SHAPES:
        weight = make_weight(kind, n, k)
        exact = oracle_weight(weight).to(CUDA)
        moved = weight.to(CUDA)
        for m in ROWS:
            x = torch.randn(m, k, device=CUDA).to(BF16)
            want = x.double() @ exact.T
            for dtype in (F32, BF16):
                got = kernel(x, moved, dtype)
                close(got, want, f"{kind} [{n}, {k}], {m} rows, {dtype}")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("n, k", [(4096, 8192), (32768, 1024), (1536, 7168), (16384, 1536)])
def test_model_shapes(kind: str, n: int, k: int) -> None:
    weight = random_weight(kind, n, k)
    for m in (128, 1000):
        x = torch.randn(m, k, device=CUDA).to(BF16)
        x[:, 5] *= 300  # an outlier channel
        want = truth(x, weight)
        for dtype in (F32, BF16):
            close(kernel(x, weight, dtype), want, f"{m} rows, {dtype}")


@pytest.mark.parametrize("kind", ["mxfp4", "fp8_e8m0"])
def test_scales_of_any_size(kind: str) -> None:
    """The smallest (a subnormal), one, and large exponents, a 128-row block each."""
    exponents = torch.tensor([0, 1, 100, 127, 160, 220], dtype=torch.uint8)
    weight = make_weight(kind, 128 * len(exponents), 256)
    columns = weight.scale.shape[1]
    per_block = exponents[:, None].repeat(1, columns)
    rows = weight.scale.shape[0] // len(exponents)
    weight.scale = per_block.repeat_interleave(rows, 0).view(torch.float8_e8m0fnu)
    exact, moved = oracle_weight(weight), weight.to(CUDA)
    x = torch.randn(130, 256).to(BF16)
    for block, exponent in enumerate(exponents.tolist()):
        scaled = x * 2.0 ** max(-60, min(60, 127 - exponent))
        part = slice(128 * block, 128 * block + 128)
        want = scaled.double() @ exact[part].T
        close(kernel(scaled.to(CUDA), moved, F32)[:, part], want, f"2^{exponent - 127}")


def test_every_nvfp4_code_and_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    codes = torch.stack(
        [row.roll(i) for i, row in enumerate(codes)]
    )  # each at every place of a block
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 32)
    scale[127::128] = 0x38  # NaN codes have a test of their own
    weight = Weight("w", "nvfp4", codes, scale.view(torch.float8_e4m3fn), 3.0)
    x = torch.randn(129, 512).to(BF16)
    want = x.double() @ oracle_weight(weight).T
    got = kernel(x.to(CUDA), weight.to(CUDA), F32)
    for row in range(256):
        close(got[:, row], want[:, row], f"scale code {row}")


@pytest.mark.parametrize("kind", FORMATS)
def test_nan_and_infinity_stay_where_they_belong(kind: str) -> None:
    weight = make_weight(kind, 136, 256)
    if weight.scale is not None:
        weight.scale.view(torch.uint8)[0, 0] = 0x7F if kind == "nvfp4" else 0xFF
    if kind in ("bf16", "fp8_e8m0"):
        weight.data[3, 200] = math.nan
    x = torch.randn(300, 256).to(BF16)
    x[150, 17], x[0, 40] = math.nan, math.inf
    want = x.double() @ oracle_weight(weight).T
    assert want.isnan().any() and want.isfinite().any()
    close(kernel(x.to(CUDA), weight.to(CUDA), F32), want)


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_around_the_product_is_written_or_read(kind: str) -> None:
    """Guards of NaN before and after x, and of a pattern around y."""
    n, k, m = 136, 192, 257
    weight = random_weight(kind, n, k)
    packed, guard = pack(weight), 4096
    surrounded = torch.full((2 * guard + m * k,), math.nan, dtype=BF16, device=CUDA)
    x = surrounded[guard:-guard].view(m, k)
    x.copy_(torch.randn(m, k))
    out = torch.full((2 * guard + m * n,), 7.5, dtype=F32, device=CUDA)
    y = out[guard:-guard].view(m, n)
    for splits in (1, 3):
        y.fill_(math.nan)
        dsl_linear._launch(x, packed, y, m, 1, 128, splits, 132)
        close(y, truth(x, weight))
    assert (out[:guard] == 7.5).all() and (out[-guard:] == 7.5).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_grouped_linear(kind: str) -> None:
    run: Any = IMPLEMENTATIONS["grouped_linear"]["cutedsl"].function
    for n, groups, k in ((512, 2, 128), (768, 3, 64), (8192, 8, 4096)):
        weight = random_weight(kind, n, k)
        with double_precision():
            for m in (1, 257, 300):
                o = torch.randn(m, groups * k, device=CUDA).to(BF16)
                want = OPS["grouped_linear"].reference(o.double(), weight=weight, groups=groups)
                close(run(o, weight=weight, groups=groups), want, f"{m} rows", "grouped_linear")
    with pytest.raises(DSV4Error, match="grouped_linear"):
        run(o, weight=random_weight(kind, 256, 4096), groups=8)


def test_few_and_many_rows_of_one_implementation() -> None:
    both: Any = IMPLEMENTATIONS["linear"]["sm90+cutedsl"].function
    weight = random_weight("nvfp4", 1536, 4096)
    for m in (1, FEW_ROWS, FEW_ROWS + 1, 64, 300):
        x = torch.randn(m, 4096, device=CUDA).to(BF16)
        y = both(x, weight=weight, out_dtype=None)
        close(y, truth(x, weight), f"{m} rows", name="sm90+cutedsl")
    odd = random_weight("bf16", 9, 64)  # cutedsl takes n in eights
    x = torch.randn(300, 64, device=CUDA).to(BF16)
    close(both(x, weight=odd, out_dtype=None), truth(x, odd), name="sm90+cutedsl")
    grouped: Any = IMPLEMENTATIONS["grouped_linear"]["sm90+cutedsl"].function
    weight = random_weight("fp8_e8m0", 512, 128)
    for m in (5, 300):
        o = torch.randn(m, 256, device=CUDA).to(BF16)
        with double_precision():
            want = OPS["grouped_linear"].reference(o.double(), weight=weight, groups=2)
        got = grouped(o, weight=weight, groups=2)
        close(got, want, f"{m} rows", "grouped_linear", "sm90+cutedsl")


def test_views_ranks_and_output_types() -> None:
    weight = make_weight("nvfp4", 24, 192)
    exact, there = oracle_weight(weight), weight.to(CUDA)
    wide = torch.randn(300, 400, device=CUDA).to(BF16)
    odd = torch.randn(1 + 300 * 192, device=CUDA).to(BF16)[1:].view(300, 192)  # not 16-byte aligned
    for x in (wide[:, 3:195], wide[:, ::2][:, :192], odd, odd.view(3, 100, 192)):
        close(kernel(x, there), x.double().cpu() @ exact.T)
    half = kernel(odd, there, torch.float16)
    assert half.dtype == torch.float16
    assert kernel(odd[:0], there).shape == (0, 24)


def test_what_it_does_not_take_is_refused() -> None:
    weight = make_weight("nvfp4", 16, 64).to(CUDA)
    x = torch.randn(130, 64, device=CUDA)
    with pytest.raises(DSV4Error, match=r"linear \(cutedsl\): x must be bfloat16"):
        kernel(x, weight)
    with pytest.raises(DSV4Error, match=r"x is \[130, 65\]"):
        kernel(torch.randn(130, 65, device=CUDA).to(BF16), weight)
    with pytest.raises(DSV4Error, match="fp8_block"):
        kernel(x.to(BF16), make_weight("fp8_f32", 16, 64).to(CUDA))
    with pytest.raises(DSV4Error, match=r"\[9, 64\]"):
        kernel(x.to(BF16), make_weight("bf16", 9, 64).to(CUDA))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_hundred_repeats_and_a_graph_give_the_same_bits(kind: str) -> None:
    weight = random_weight(kind, 4096, 2048)
    x = torch.randn(700, 2048, device=CUDA).to(BF16)
    first = kernel(x, weight)
    assert all(torch.equal(kernel(x, weight), first) for _ in range(100))
    run: Any = IMPLEMENTATIONS["linear"]["cutedsl"].function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, weight=weight, out_dtype=None)
        z = run(y[:, :2048].contiguous(), weight=weight, out_dtype=None)
    y.fill_(math.nan), z.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, first)
    assert torch.equal(z, kernel(first[:, :2048].contiguous(), weight))
