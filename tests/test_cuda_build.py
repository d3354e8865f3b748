"""Every CUDA kernel compiles for sm_90a, loads, and spills no register; needs nvcc, but no GPU."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda, ptxas
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, KERNEL_ORDER, Context

needs_nvcc = pytest.mark.skipif(cuda.library.nvcc()[0] is None, reason=cuda.library.nvcc()[1])


@pytest.fixture(scope="module")
def built() -> dict[str, Path]:
    """Every source, built into the user's cache: only what changed is compiled."""
    return cuda.library.build_all(workers=2)


@needs_nvcc
def test_every_source_is_declared_and_every_function_is_exported(built: dict[str, Path]) -> None:
    declared = {
        name: library
        for name, library in cuda.library._LIBRARIES.items()
        if type(library) is cuda.library.Library  # others are built otherwise
    }
    assert set(built) == set(declared)
    for name, path in built.items():
        library = ctypes.CDLL(str(path))
        assert library.dsv4_error_string
        for function in declared[name].signatures:
            assert getattr(library, f"dsv4_{function}")


@needs_nvcc
def test_no_kernel_spills(built: dict[str, Path]) -> None:
    spilled = []
    for name, path in [*built.items(), ("linear (sm_100a)", cuda.sm100.LINEAR.path())]:
        found = ptxas.resources_of(path)
        assert found, f"{name}: ptxas reported no kernel"
        for title, used in zip(ptxas.demangled([r.kernel for r in found]), found, strict=True):
            print(f"{name}: {title}: {used.registers} registers, {used.shared} bytes shared")
            if used.spills:
                spilled.append(f"{title}: {used}")
    assert not spilled, "\n".join(spilled)


@needs_nvcc
def test_no_wgmma_waits_for_the_one_before(built: dict[str, Path]) -> None:
    waiting = {name: ptxas.serialized(ptxas.log_of(path)) for name, path in built.items()}
    assert not any(waiting.values()), waiting


@needs_nvcc
def test_the_blackwell_kernel_uses_its_own_tensor_cores(tmp_path: Path) -> None:
    """It has never run: that its instructions are the intended ones is all that is known."""
    library = ctypes.CDLL(str(cuda.sm100.LINEAR.path()))
    assert all(getattr(library, f"dsv4_{name}") for name in cuda.sm100.LINEAR.signatures)
    target = cuda.sm100.sm100_build()
    ptx, source = tmp_path / "linear.ptx", target.root / target.sources[0]
    arch = "-gencode=arch=compute_100a,code=compute_100a"
    command = [target.compiler, arch, "-std=c++17", "--ptx", "-o", ptx, source]
    subprocess.run(command, check=True, capture_output=True)
    text = ptx.read_text()
    for instruction in (
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X",
        "tcgen05.cp.cta_group::1.32x128b.warpx4",
        "cvt.rn.satfinite.e2m1x2.f32",
        "cp.async.bulk.tensor.2d",
    ):
        assert instruction in text


@pytest.mark.parametrize("capability", [(9, 0), (10, 3), (12, 0)])
def test_no_route_picks_the_blackwell_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    impl = IMPLEMENTATIONS["linear"]["sm100"]
    context = Context("cuda", torch.bfloat16)
    assert "sm100" not in KERNEL_ORDER["cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert impl.unavailable(context) == "compiled, never run; no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    name = "sm_{}{}".format(*capability)
    assert impl.unavailable(context) == f"compiled, never run; needs sm_100a, this is {name}"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert impl.unavailable(context) is None
    assert impl.unavailable(Context("cuda", torch.float32)) is not None


# ------------------------------------------------------------------------------ bit tricks


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    """What tests/cuda_bits.cu prints on the host: rows of numbers by their first word."""
    program = tmp_path_factory.mktemp("bits") / "bits"
    source = Path(__file__).with_name("cuda_bits.cu")
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O0"]
    subprocess.run([cuda.library.nvcc()[0], *flags, "-o", program, source], check=True)
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows: dict[str, list[list[float]]] = {}
    for name, *numbers in map(str.split, text.splitlines()):
        rows.setdefault(name, []).append([float(number) for number in numbers])
    return rows


def e2m1(code: int) -> float:
    magnitude = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code % 8]
    return -magnitude if code >= 8 else magnitude


def floats(words: list[float], dtype: torch.dtype) -> list[float]:
    return torch.tensor(words, dtype=torch.int32).short().view(dtype).double().tolist()


@needs_nvcc
def test_four_bit_codes_decode_in_the_order_of_their_columns(bits: dict) -> None:
    columns = [int(c) for c in bits["columns"][0][1:]][:8]
    assert columns == [0, 4, 1, 5, 2, 6, 3, 7]
    seen = set()
    for name, dtype, factor, order in (
        ("bf16", torch.bfloat16, 2.0**126, columns),
        ("fp16", torch.float16, 2.0**14, [0, 2, 4, 6, 1, 3, 5, 7]),
    ):
        for word, *halves in bits[name]:
            codes = [int(word) >> 4 * i & 15 for i in range(8)]
            seen.update((name, i, code) for i, code in enumerate(codes))
            want = [e2m1(codes[i]) for i in order]
            got = [value * factor for value in floats(halves, dtype)]
            assert got == want
            assert [math.copysign(1, v) for v in got] == [math.copysign(1, v) for v in want]
    assert len(seen) == 2 * 8 * 16


@needs_nvcc
def test_e8m0_scales_decode_from_the_smallest_to_nan(bits: dict) -> None:
    for code, as_float, as_bf16 in bits["e8m0"]:
        want = 2.0 ** (code - 127) if code < 255 else math.nan
        assert as_float == as_bf16 == want or (code == 255 and as_float != as_float)


# ------------------------------------------------------------------------------ reports, reasons

REPORT = """\
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    {0} bytes stack frame, {1} bytes spill stores, {2} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compile time = 3.1 ms
"""


@pytest.mark.parametrize("numbers", [(0, 0, 0), (8, 0, 0), (0, 4, 0), (0, 0, 4)])
def test_the_report_is_read(numbers: tuple[int, int, int]) -> None:
    (found,) = ptxas.resources(REPORT.format(*numbers))
    assert (found.kernel, found.registers, found.shared) == ("_Z1fPf", 40, 64)
    assert (found.stack, found.spill_stores, found.spill_loads) == numbers
    assert found.spills == any(numbers)


WRAPPED = """\
          ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are
          serialized due to insufficient register resources for the wgmma pipeline in the function
          'f_0'
          ptxas info    : Compiling entry function 'f_0' for 'sm_90a'
          ptxas         .     1968 bytes stack frame, 2708 bytes spill stores, 3220 bytes spill
          loads
          ptxas info    : Used 232 registers, used 2 barriers, 1968 bytes cumulative stack size
"""


def test_a_report_with_wrapped_lines_is_read() -> None:
    (found,) = ptxas.resources(WRAPPED)
    assert (found.registers, found.stack, found.spill_loads) == (232, 1968, 3220)
    assert ptxas.serialized(WRAPPED) == ["f_0"] and ptxas.serialized(REPORT) == []


def test_template_arguments_stay_in_the_name_and_parameters_go() -> None:
    mangled = "_ZN4dsv412_GLOBAL__N_14kernIfLb1EEEvPKT_l"
    (name,) = ptxas.demangled([mangled])
    assert name in (mangled, "dsv4::(anonymous namespace)::kern<float, true>")


def test_the_gpu_route_prefers_these_kernels() -> None:
    assert KERNEL_ORDER["cuda"][:2] == ("sm90+cutedsl", "sm90")


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impl = IMPLEMENTATIONS["rms_norm"]["sm90"]
    gpu, cpu = Context("cuda"), Context("cpu")
    monkeypatch.setattr(cuda.library, "_device_reason", lambda: "no CUDA device")
    assert impl.unavailable(gpu) == impl.unavailable(cpu) == "no CUDA device"
    monkeypatch.setattr(cuda.library, "_device_reason", lambda: None)
    assert impl.unavailable(cpu) == "needs CUDA tensors, this is cpu"
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path))
    monkeypatch.setenv("DSV4_NVCC", str(tmp_path / "nvcc"))
    cuda.library.cuda_build.cache_clear()
    try:
        assert impl.unavailable(gpu) == "nvcc not found and not built"
        with pytest.raises(CannotAnswer, match="norm_sm90 is not built"):
            cuda.library.library_path("norm")
    finally:
        monkeypatch.undo()
        cuda.library.cuda_build.cache_clear()


@pytest.mark.parametrize(
    "capability, reason", [((9, 0), None), ((10, 0), "needs sm_90a, this is sm_100")]
)
def test_another_gpu_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    cuda.library._device_reason.cache_clear()
    try:
        assert cuda.library._device_reason() == reason
    finally:
        cuda.library._device_reason.cache_clear()
