"""How linear of few rows divides its work over blocks and warps: nothing left out, nothing twice. Needs nvcc, no GPU."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from dsv4_bench.engine.cuda import library

pytestmark = pytest.mark.skipif(library.nvcc()[0] is None, reason=library.nvcc()[1])

PROCESSORS, WARPS, SHARED = 132, 8, 226 * 1024
STAGE_COLUMNS = {"nvfp4": 256, "fp8": 128, "bf16": 64}  # of 128 bytes
Shape = tuple[str, int, int, int, int]  # format, n, k, groups, rows
FLASH = [(4096, 8192), (32768, 1024), (8192, 8192), (1024, 4096), (512, 4096), (64, 4096)]


def shapes() -> list[Shape]:
    found: list[Shape] = []
    for kind, (n, k) in itertools.product(
        STAGE_COLUMNS, [*FLASH, (40, 2112), (16, 64), (1000, 1152)]
    ):
        found += [(kind, n, k, 1, rows) for rows in ((1,) if kind == "nvfp4" else (1, 2, 4))]
    found += [("fp8", 8192, 4096, 8, rows) for rows in (1, 4)]
    return [
        *found,
        ("fp8", 96, 1152, 2, 1),
        ("fp8", 3360, 1024, 70, 1),
        ("bf16", 144, 256, 3, 3),
        ("fp8", 16384, 65536, 1, 1),
    ]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[Shape, list[int]]:
    """Split, places, rounds, stages of a row, stages of a warp, blocks, bytes of shared memory."""
    program = tmp_path_factory.mktemp("plans") / "plans"
    source = Path(__file__).with_name("linear_plans.cu")
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O0"]
    subprocess.run([library.nvcc()[0], *flags, "-o", program, source], check=True)
    lines = "".join(" ".join(map(str, shape)) + "\n" for shape in shapes())
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    rows = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    return dict(zip(shapes(), rows, strict=True))


def test_every_row_and_column_has_one_warp(plans: dict[Shape, list[int]]) -> None:
    for (kind, n, k, groups, _), (split, places, rounds, stages, own, blocks, _) in plans.items():
        assert stages == -(-k // STAGE_COLUMNS[kind])
        assert split * places == WARPS
        assert (own - 1) * split < stages <= own * split, (kind, n, k)
        tiles, block = -(-n // 16), places * rounds
        assert (blocks - 1) * block < tiles <= blocks * block, (kind, n, k)
        if groups > 1:
            assert n // groups % (16 * block) == 0, (kind, n, k, groups)


def test_what_fits_is_what_is_asked_for(plans: dict[Shape, list[int]]) -> None:
    for (kind, n, k, _, rows), plan in plans.items():
        if (n, k) in FLASH and rows == 1:  # beside a block of the next kernel
            assert 2 * (plan[-1] + 1024) <= SHARED + 2048, (kind, n, k)
    assert plans["fp8", 16384, 65536, 1, 1][-1] > SHARED // 2  # alone


def test_large_matrices_fill_the_gpu_in_whole_waves(plans: dict[Shape, list[int]]) -> None:
    for kind, (n, k) in itertools.product(STAGE_COLUMNS, FLASH[:3]):
        blocks = plans[kind, n, k, 1, 1][5]
        assert blocks > 0.9 * PROCESSORS * -(-blocks // PROCESSORS), (kind, n, k)
