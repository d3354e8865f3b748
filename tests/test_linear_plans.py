"""How linear of few rows, and linears, divide work over blocks and warps: nothing left out, nothing twice. Needs nvcc, no GPU."""

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
Joint = tuple[int, int, tuple[tuple[str, int], ...]]  # k, rows; format and n of each matrix
BYTES = {"fp8": 1, "bf16": 2}
LAYER = (("fp8", 1024), ("fp8", 512), *(("bf16", n) for n in (1024, 1024, 256, 256, 64)))
MATRICES = [
    (4096, LAYER),
    (7168, (("fp8", 1536), *LAYER[1:])),
    (1024, (("fp8", 32768), ("fp8", 8192))),
    (4096, (("fp8", 2048), ("fp8", 2048))),
    (16, (("fp8", 33), ("bf16", 1), ("bf16", 300))),
    (8192, (("bf16", 1), ("fp8", 1))),
    (1536, (("fp8", 65536), ("fp8", 8192))),
    (4096, (("bf16", 129280), ("fp8", 130))),
]
JOINT: list[Joint] = [(k, rows, some) for rows in (1, 8) for k, some in MATRICES]
FLASH = [(4096, 8192), (32768, 1024), (8192, 8192), (1024, 4096), (512, 4096), (64, 4096)]


def shapes() -> list[Shape]:
    found: list[Shape] = []
    for kind, (n, k) in itertools.product(
        STAGE_COLUMNS, [*FLASH, (40, 2112), (16, 64), (1000, 1152)]
    ):
        found += [(kind, n, k, 1, rows) for rows in (1, 2, 8)]
    found += [("fp8", 8192, 4096, 8, rows) for rows in (1, 8)]
    return [
        *found,
        ("fp8", 96, 1152, 2, 1),
        ("fp8", 3360, 1024, 70, 1),
        ("bf16", 144, 256, 3, 3),
        ("fp8", 16384, 65536, 1, 1),
    ]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    program = tmp_path_factory.mktemp("plans") / "plans"
    source = Path(__file__).with_name("linear_plans.cu")
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O0"]
    subprocess.run([library.nvcc()[0], *flags, "-o", program, source], check=True)
    lines = [" ".join(map(str, shape)) for shape in shapes()]
    for k, rows, matrices in JOINT:
        lines.append(
            f"joint {k} {rows} {len(matrices)} " + " ".join(f"{f} {n}" for f, n in matrices)
        )
    text = "\n".join(lines)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def plans(printed: list[list[int]]) -> dict[Shape, list[int]]:
    """Split, places, rounds, stages of a row, stages of a warp, blocks, bytes of shared memory."""
    return dict(zip(shapes(), printed, strict=False))


@pytest.fixture(scope="module")
def joint(printed: list[list[int]]) -> dict[Joint, list[int]]:
    """Split, bytes of shared memory, and rows of a block and blocks of each matrix."""
    return dict(zip(JOINT, printed[len(shapes()) :], strict=True))


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
        room = SHARED // 2 if rows == 1 else SHARED  # beside a block of the next kernel
        if (n, k) in FLASH:
            assert plan[-1] <= room, (kind, n, k, rows)
    assert plans["fp8", 16384, 65536, 1, 1][-1] > SHARED // 2  # alone


def test_large_matrices_fill_the_gpu_in_whole_waves(plans: dict[Shape, list[int]]) -> None:
    for kind, (n, k), rows in itertools.product(STAGE_COLUMNS, FLASH[:3], (1, 8)):
        blocks = plans[kind, n, k, 1, rows][5]
        assert blocks > 0.9 * PROCESSORS * -(-blocks // PROCESSORS), (kind, n, k)


def test_every_row_of_joint_matrices_is_in_one_block(joint: dict[Joint, list[int]]) -> None:
    for (k, _, matrices), (split, shared, *divided) in joint.items():
        assert WARPS % split == 0 and shared <= SHARED
        for (kind, n), rows, blocks in zip(matrices, divided[::2], divided[1::2], strict=True):
            assert (blocks - 1) * rows < n <= blocks * rows, (k, matrices)
            assert kind == "bf16" or rows % 16 == 0, "a tile of FP8 has one scale a stage"


def test_joint_blocks_are_one_a_processor_and_alike(joint: dict[Joint, list[int]]) -> None:
    """Where the matrices are as large as a decode layer's: the longest block reads 15 % more than its share."""
    for (k, matrices), rows in itertools.product(MATRICES[:4], (1, 8)):
        _, _, *divided = joint[k, rows, matrices]
        assert 0.9 * PROCESSORS < sum(divided[1::2]) <= PROCESSORS
        total = sum(n * BYTES[kind] for kind, n in matrices)
        longest = max(r * BYTES[kind] for (kind, _), r in zip(matrices, divided[::2], strict=True))
        assert longest <= 1.15 * total / PROCESSORS, (k, matrices, longest, total)
