"""The order of columns in the expert kernels: each activation meets the weight of its own column.

The kernels' own functions run on the host; how a matrix instruction lays out its operands is taken
from the PTX manual. Needs nvcc, but no GPU.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from dsv4_bench.engine import cuda

pytestmark = pytest.mark.skipif(cuda.library.nvcc()[0] is None, reason=cuda.library.nvcc()[1])


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[int]]]:
    program = tmp_path_factory.mktemp("layout") / "layout"
    source = Path(__file__).with_name("experts_layout.cu")
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O0"]
    subprocess.run([cuda.library.nvcc()[0], *flags, "-o", program, source], check=True)
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return [(name, list(map(int, rest))) for name, *rest in map(str.split, text.splitlines())]


@pytest.mark.parametrize("kind", ["code", "fp16"])
def test_columns_lie_where_their_codes_are_multiplied(
    layout: list[tuple[str, list[int]]], kind: str
) -> None:
    """wgmma m64nNk16: thread t of a quad holds columns 2t, 2t + 1 in its first register of a row and
    2t + 8, 2t + 9 in its second. Thread t decodes the 16 bytes (32 columns) number t of a row, one
    32-bit word after the other, two registers a step of 16 columns."""
    where = {code: (register, half) for name, (code, register, half) in _of(layout, kind)}
    assert sorted(where) == list(range(8)) and len(set(where.values())) == 8
    places = dict(values for _, values in _of(layout, "place"))
    assert sorted(places.values()) == list(range(128))
    for column, place in places.items():
        thread, word, code = column // 32, column % 32 // 8, column % 8
        register, half = where[code]
        step = 2 * word + register // 2
        assert place == 16 * step + 2 * thread + half + 8 * (register % 2)


def test_codes_in_fp16(layout: list[tuple[str, list[int]]]) -> None:
    """e2m1 (sign, two bits of exponent, one of mantissa) by hand, times 2^-14."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    bits = dict(values for _, values in _of(layout, "bits"))
    for code, value in enumerate([*magnitudes, *(-m for m in magnitudes)]):
        assert struct.pack("<e", value * 2**-14) == struct.pack("<H", bits[code])


def _of(layout: list[tuple[str, list[int]]], name: str) -> list[tuple[str, list[int]]]:
    return [entry for entry in layout if entry[0] == name]
