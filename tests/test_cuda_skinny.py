"""The kernel of linear for a few to 64 rows, however its work is divided, against float64 on a GPU."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cpu_kernels import make_weight, oracle_weight, same
from torch import Tensor

from dsv4_bench.engine.cuda.library import nvcc
from dsv4_bench.engine.cuda.skinny import STAGES, best_plan, plan_for, plan_of
from dsv4_bench.engine.cuda.skinny import skinny as run
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.formats import Weight

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
FORMATS = ["nvfp4", "mxfp4", "fp8_e8m0", "fp8_f32", "bf16"]
LIMIT = {torch.float32: 3e-6, BF16: 1e-3}  # as in test_cuda_linear.py


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(12)


def skinny(
    x: Tensor, weight: Weight, parts: int, groups: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x [m, groups * k] times the weight [n, k], by the kernel of this file; what was there is NaN."""
    packed = pack(weight)
    y = torch.full((len(x), packed.n), math.nan, dtype=dtype, device=CUDA)
    columns = STAGES[packed.format].columns
    run(x, packed, groups, y, plan_of(packed.n, len(x), packed.k, columns, groups, parts))
    torch.cuda.synchronize()
    return y


def close(got: Tensor, want: Tensor, what: str = "") -> None:
    """`got` equals float64 `want`, rounded once to got's dtype."""
    same(got.cpu(), want.to(got.dtype), LIMIT[got.dtype], what)


def among_nan(x: Tensor) -> Tensor:
    """`x` on the GPU, with NaN before and behind it."""
    m, k = x.shape
    around = torch.full((m + 66, k), math.nan, dtype=x.dtype, device=CUDA)
    around[1 : m + 1] = x.to(CUDA)
    return around[1 : m + 1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_any_number_of_parts(kind, parts):
    whole = 128  # columns: rows of scales are words
    for n, k in ((272, 2 * whole), (40, 9 * whole), (200, 33 * whole), (513, 8 * whole)):
        weight = make_weight(kind, n, k)
        exact, there = oracle_weight(weight), weight.to(CUDA)
        for m in (1, 5, 16, 17, 32, 33, 64, 65, 130):
            x = torch.randn(m, k).to(BF16)
            x[:, 5] *= 300  # an outlier channel
            got = skinny(among_nan(x), there, parts)
            close(got, x.double() @ exact.T, f"[{n}, {k}], {m} rows")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, step", [("nvfp4", 64), ("fp8_f32", 16), ("fp8_e8m0", 48), ("bf16", 8)]
)
def test_columns_that_end_anywhere(kind, step):
    for k in range(step, 600, 5 * step):
        weight = make_weight(kind, 70, k)
        x = torch.randn(9, k).to(BF16)
        got = skinny(among_nan(x), weight.to(CUDA), 2, dtype=BF16)
        close(got, x.double() @ oracle_weight(weight).T, f"{k} columns")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("groups, n, parts", [(3, 256, 3), (2, 512, 1)])
def test_groups(kind, groups, n, parts):
    weight = make_weight(kind, groups * n, 384)
    w = oracle_weight(weight).view(groups, n, 384)
    for m in (7, 64):
        x = torch.randn(m, groups * 384).to(BF16)
        want = torch.einsum("mgk,gnk->mgn", x.double().view(m, groups, 384), w).flatten(1)
        close(skinny(among_nan(x), weight.to(CUDA), parts, groups), want)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
def test_nan_and_infinity_stay_where_they_belong(kind):
    weight = make_weight(kind, 192, 512)
    if weight.scale is not None:
        is_float = weight.scale.dtype == torch.float32
        raw = weight.scale if is_float else weight.scale.view(torch.uint8)
        raw[0, 1] = math.nan if is_float else 0x7F if weight.format == "nvfp4" else 0xFF
    x = torch.randn(20, 512).to(BF16)
    x[3, 17], x[0, 40] = math.nan, math.inf
    want = x.double() @ oracle_weight(weight).T
    assert want[3].isnan().all() and want[1:3].isfinite().any()
    close(skinny(among_nan(x), weight.to(CUDA), 2), want)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("m", [8, 64])
def test_a_hundred_repeats_give_the_same_bits(kind, m):
    weight, x = make_weight(kind, 1024, 4096).to(CUDA), torch.randn(m, 4096, device=CUDA).to(BF16)
    for parts in (1, 5):
        first = skinny(x, weight, parts)
        assert all(torch.equal(skinny(x, weight, parts), first) for _ in range(100))


# ------------------------------------------------------------------------------ how work is divided


@pytest.mark.parametrize("kind", STAGES)
def test_large_matrices_fill_the_gpu_in_one_wave(kind):
    for n, k in ((4096, 8192), (32768, 1024), (8192, 8192)):
        assert 120 <= n // 256 * best_plan(n, 64, k, STAGES[kind].columns).parts <= 132, (n, k)


@pytest.mark.parametrize(
    "kind, n, k, groups, fewest",
    [
        (0, 4096, 8192, 1, 17),
        (0, 32768, 1024, 1, 5),  # one part: no kernel for the sums
        (2, 4096, 8192, 1, 17),
        (2, 1024, 4096, 1, 5),
        (5, 256, 4096, 1, 5),
        (2, 8192, 4096, 8, 17),
        (2, 768, 4096, 6, 65),  # a tile would span groups
        (0, 4096, 8224, 1, 65),  # rows of scales that are not words
        (4, 4096, 8192, 1, 65),  # float32
    ],
)
def test_where_it_is_chosen(kind, n, k, groups, fewest):
    weight = SimpleNamespace(format=kind, n=n, k=k)
    rows = [m for m in range(1, 130) if plan_for(weight, m, groups)]
    assert rows == list(range(fewest, 65))


def test_no_part_is_empty():
    for k in (64, 256, 1024, 4096, 7168):
        for n in (64, 512, 4096):
            assert 1 <= best_plan(n, 8, k, 128).parts <= -(-k // 128)


def test_the_workspace_holds_activations_and_parts():
    # 2 blocks of 64 rows, 3 stages of 256 columns; 6 parts of 100 rows of a tile.
    activations, parts = 2 * 64 * 3 * 256 * 2, 6 * 100 * 256 * 4
    assert plan_of(200, 100, 700, 256, 1, 6).workspace == 1024 + activations + parts
    assert plan_of(512, 5, 256, 256, 2, 1).workspace == 1024 + 2 * 2 * 16 * 256


# ------------------------------------------------------------------------------ where activations lie


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The words of each line of what tests/skinny_columns.cu prints."""
    if nvcc()[0] is None:
        pytest.skip(nvcc()[1])
    program = tmp_path_factory.mktemp("skinny") / "columns"
    source = Path(__file__).with_name("skinny_columns.cu")
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O0"]
    subprocess.run([nvcc()[0], *flags, "-o", program, source], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind, chunk", [("fp4", 32), ("fp8", 16), ("bf16", 8)])
def test_activations_meet_their_weights(printed, kind, chunk):
    """A thread's weights are of chunks 2 member and 2 member + 1; every column is there once."""
    words = [list(map(int, line[2:])) for line in printed if line[:2] == ["columns", kind]]
    assert sorted(c for word in words for c in word[5:]) == list(range(8 * chunk))
    for step, half, j, member, e, low, high in words:
        # Codes i and i + 4 of four bits are decoded into one register, four of them from eight codes.
        inside = 8 * (j // 2) + 2 * (j % 2) + e if kind == "fp4" else 4 * j + 2 * e
        assert low == (2 * member + step) * chunk + half * chunk // 2 + inside
        assert high == low + (4 if kind == "fp4" else 1)
