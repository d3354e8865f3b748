"""No kernel writes a register that a pending wgmma may still read; needs nvcc and cuobjdump, but no GPU."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
from sass_hazards import Instruction, cubin_in, functions, hazards

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda
from dsv4_bench.engine.dsl import library as dsl_library
from dsv4_bench.engine.dsl.linear import LINEAR


def tool(name: str) -> Path | None:
    """The program `name` of the package nvidia-cuda-<name>."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == name), None)


CUOBJDUMP, NVDISASM = tool("cuobjdump"), tool("nvdisasm")
needs_tools = pytest.mark.skipif(
    CUOBJDUMP is None or NVDISASM is None, reason="nvidia-cuda-cuobjdump or -nvdisasm not installed"
)
needs_nvcc = pytest.mark.skipif(cuda.library.nvcc()[0] is None, reason=cuda.library.nvcc()[1])
needs_dsl = pytest.mark.skipif(dsl_library.compiler()[0] is None, reason=dsl_library.compiler()[1])


def with_wgmma() -> list[str]:
    """Sources that multiply with wgmma, in their own file or in a header that they include."""
    found = []
    for name in cuda.library.sources():
        files = cuda.library.cuda_build(name).files
        seen, left = set(), [f"cuda/{name}_sm90.cu"]
        while left:
            file = left.pop()
            if file in files and file not in seen:
                seen.add(file)
                included = re.findall(r'#include "(\w+\.cuh)"', files[file].decode())
                left += [f"cuda/{header}" for header in included]
        if any(b"wgmma_wait<" in files[file] for file in seen):
            found.append(name)
    return found


def disassembled(file: Path) -> list[tuple[str, list[Instruction]]]:
    assert CUOBJDUMP is not None and NVDISASM is not None
    for program in (CUOBJDUMP, NVDISASM):
        program.chmod(program.stat().st_mode | 0o111)
    return list(functions(file, CUOBJDUMP, str(NVDISASM.parent)))


def unsafe(file: Path) -> dict[str, list[str]]:
    """Kernels with hazards; fails if no kernel of `file` uses wgmma."""
    multiplying = [
        (name, code)
        for name, code in disassembled(file)
        if any("GMMA" in instruction.text for instruction in code)
    ]
    assert multiplying, f"{file}: no wgmma"
    found = {name: hazards(code) for name, code in multiplying}
    return {name: [f"{i.address:x} {i.text}" for i in bad] for name, bad in found.items() if bad}


@needs_nvcc
@needs_tools
@pytest.mark.parametrize("name", with_wgmma())
def test_cuda_kernels_leave_the_operands_of_wgmma_alone(name: str) -> None:
    assert unsafe(cuda.library.library_path(name)) == {}


@needs_dsl
@needs_tools
def test_dsl_kernels_leave_the_operands_of_wgmma_alone(tmp_path: Path) -> None:
    names = [name for name in LINEAR.signatures if re.match(r"linear_(nvfp4|mxfp4|fp8)", name)]
    built = LINEAR.build_all(workers=2)
    objects = {name: built[name].with_name(f"{name}.o") for name in names}
    cubins = [cubin_in(file, tmp_path / f"{name}.cubin") for name, file in objects.items()]
    with ThreadPoolExecutor(2) as pool:
        assert [bad for bad in pool.map(unsafe, cubins) if bad] == []


# ------------------------------------------------------------------------------ the finder itself

HGMMA = "HGMMA.64x256x16.F32.BF16 R24, R{}, gdesc[UR4], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{}"


def code(*texts: str) -> list[Instruction]:
    return [Instruction(16 * i, text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "texts, bad",
    [
        ((HGMMA.format(152), WAIT.format(0), "MOV R152, R3", "EXIT"), []),
        ((HGMMA.format(152), "MOV R152, R3", WAIT.format(0), "EXIT"), [1]),
        ((HGMMA.format(152), "LDS.128 R148, [R3]", "MOV R156, R2", "EXIT"), []),
        ((HGMMA.format(152), "@!P0 LDS.128 R152, [R3]", "EXIT"), [1]),
        ((HGMMA.format(152), "IMAD.WIDE R154, R2, R3, R4", "EXIT"), [1]),
        ((HGMMA.format(152), "STS [R3], R152", "ISETP.GE.AND P0, PT, R152, R3, PT", "EXIT"), []),
        # Two groups: the wait leaves the newer one pending.
        ((HGMMA.format(152), HGMMA.format(156), WAIT.format(1), "MOV R152, R3", "EXIT"), []),
        ((HGMMA.format(152), HGMMA.format(156), WAIT.format(1), "MOV R156, R3", "EXIT"), [3]),
        # Around a loop: what it begins with is written while its last product is pending.
        (("MOV R152, R3", HGMMA.format(152), "@P0 BRA 0x0", WAIT.format(0), "EXIT"), [0]),
        (("MOV R152, R3", HGMMA.format(152), WAIT.format(0), "@P0 BRA 0x0", "EXIT"), []),
        # One path waits, the other does not.
        ((HGMMA.format(152), "@P0 BRA 0x30", WAIT.format(0), "MOV R152, R3", "EXIT"), [3]),
        # Operands in shared memory read no registers.
        (("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "MOV R4, R3", "EXIT"), []),
    ],
)
def test_hazards_are_found(texts: tuple[str, ...], bad: list[int]) -> None:
    assert [i.address // 16 for i in hazards(code(*texts))] == bad
