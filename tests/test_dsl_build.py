"""Every CuTe-DSL kernel compiles for sm_90a and spills no register; needs nvidia-cutlass-dsl, but no GPU."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dsv4_bench.engine.dsl.linear as dsl_linear
from dsv4_bench.engine import build, cuda, ptxas
from dsv4_bench.engine.dsl import compile as dsl_compile
from dsv4_bench.engine.dsl import library as dsl_library
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Context, choose

LIBRARIES = {"linear": dsl_linear.LINEAR}

needs_dsl = pytest.mark.skipif(
    find_spec("cutlass") is None, reason="nvidia-cutlass-dsl is not installed"
)
needs_compiler = pytest.mark.skipif(
    dsl_library.compiler()[0] is None, reason=dsl_library.compiler()[1]
)


def test_every_source_is_declared() -> None:
    assert set(dsl_library.sources()) == set(LIBRARIES)


@needs_dsl
@pytest.mark.parametrize("op", dsl_library.sources())
def test_no_kernel_spills(op: str, tmp_path: Path) -> None:
    """From the build where nvcc can make one, else from the objects alone."""
    if dsl_library.compiler()[0] is not None:
        built = LIBRARIES[op].build_all(workers=2)
        log = "\n".join(map(ptxas.log_of, built.values()))
    else:
        sources = [dsl_library.FOLDER / name for name in dsl_library.dsl_build(op).sources]
        command = [sys.executable, "-m", "dsv4_bench.engine.dsl.compile", "-c", *map(str, sources)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log
    found = ptxas.resources(log)
    kernels = {used.kernel.rpartition("_")[0] for used in found}  # the DSL appends a number
    assert kernels == {f"dsv4_{name}" for name in LIBRARIES[op].signatures}, log
    for used in found:
        print(f"{used.kernel}: {used.registers} registers")
    assert not [used for used in found if used.spills]
    assert not ptxas.serialized(log)


@needs_compiler
@pytest.mark.parametrize("op", dsl_library.sources())
def test_the_library_exports_what_is_declared(op: str) -> None:
    for function, path in LIBRARIES[op].build_all(workers=2).items():
        library = ctypes.CDLL(str(path))
        assert library.dsv4_error_string and getattr(library, f"dsv4_{function}")


HEADER = """\
static inline int32_t cute_dsl_scale_wrapper(scale_Kernel_Module_t *module, void *x, int64_t n, \
float factor, cudaStream_t stream) {
    int32_t ret = 0;
"""


def test_the_exported_function_passes_every_argument_on() -> None:
    text = dsl_compile.glue("scale", HEADER)
    assert "int dsv4_scale(void *x, int64_t n, float factor, cudaStream_t stream)" in text
    assert "cute_dsl_scale_wrapper(&kernels, x, n, factor, stream)" in text
    with pytest.raises(SystemExit, match="no wrapper"):
        dsl_compile.glue("other", HEADER)


@needs_dsl
def test_a_source_that_does_not_compile_is_shown(tmp_path: Path) -> None:
    source = tmp_path / "broken.py"
    source.write_text("def exports():\n    raise ValueError('no such layout')\n    yield\n")
    command = [sys.executable, "-m", "dsv4_bench.engine.dsl.compile", "-c", str(source)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "no such layout" in done.stderr


@needs_dsl
def test_one_kernel_is_compiled_alone(tmp_path: Path) -> None:
    sources = [str(dsl_library.FOLDER / name) for name in dsl_library.dsl_build("linear").sources]
    command = [sys.executable, "-m", "dsv4_bench.engine.dsl.compile", "-c", "--kernel"]
    subprocess.run([*command, "sum_f32", *sources], cwd=tmp_path, check=True, capture_output=True)
    assert {path.name for path in tmp_path.glob("*.[oh]")} == {"sum_f32.o", "sum_f32.h"}
    done = subprocess.run([*command, "sum_f3", *sources], cwd=tmp_path, capture_output=True)
    assert done.returncode == 1 and b"exports no sum_f3" in done.stderr


@needs_compiler
def test_a_warm_compiler_does_one_job_after_the_other(tmp_path: Path) -> None:
    command = dsl_library.compiler()[0]
    assert command is not None
    warm = dsl_library.WarmCompiler(command)
    try:
        (tmp_path / "broken.py").write_text(
            "def exports():\n    raise ValueError('no such layout')\n"
        )
        assert warm.run(["-c", "broken.py"], tmp_path) == 1
        assert "no such layout" in (tmp_path / "build.log").read_text()
        sources = [str(dsl_library.FOLDER / n) for n in dsl_library.dsl_build("linear").sources]
        assert warm.run(["-c", "--kernel", "sum_f32", *sources], tmp_path) == 0
        assert (tmp_path / "sum_f32.o").exists()
        assert ptxas.resources((tmp_path / "build.log").read_text())  # what ptxas says is kept
    finally:
        warm.process.kill()
        warm.process.wait()
    assert warm.run(["-c", *sources], tmp_path) is None


@needs_compiler
def test_builds_use_the_warm_compiler_and_do_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path))
    asked = []

    class Gone:
        def run(self, words: list[str], folder: Path) -> None:
            asked.append((words, folder.parent))

    monkeypatch.setattr(dsl_library, "_warm", [Gone()])
    assert LIBRARIES["linear"].path_of("sum_bf16").exists()
    ((words, folder),) = asked
    assert "--nvcc" in words and words[-2:] == ["linear_sm90.py", "codes.py"]
    assert folder == tmp_path / "kernels"


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impl = IMPLEMENTATIONS["linear"]["cutedsl"]
    monkeypatch.setattr(cuda.library, "_device_reason", lambda: "no CUDA device")
    assert impl.unavailable(Context("cuda")) == "no CUDA device"
    monkeypatch.setattr(cuda.library, "_device_reason", lambda: None)
    context = Context("cuda", torch.bfloat16)
    assert impl.unavailable(Context("cuda", torch.float32)) == "needs bfloat16, this is float32"
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path))
    monkeypatch.setattr(dsl_library, "find_spec", lambda name: None)
    dsl_library.dsl_build.cache_clear()
    try:
        assert impl.unavailable(context) == "nvidia-cutlass-dsl is not installed and not built"
        with pytest.raises(CannotAnswer, match="sum_f32_dsl_sm90 is not built"):
            LIBRARIES["linear"].path_of("sum_f32")
        # Kernels that were built elsewhere serve without the DSL, if none is missing.
        whole = f"linear_dsl_sm90-{dsl_library.dsl_build('linear').content[:12]}-"
        for kernel in LIBRARIES["linear"].signatures:
            assert impl.unavailable(context) and LIBRARIES["linear"].identity() == whole
            target = dsl_library.dsl_build("linear", kernel)
            folder = tmp_path / "kernels" / f"{target.name}-{target.content[:12]}-01234567"
            folder.mkdir(parents=True)
            (folder / f"{target.name}.so").touch()
        assert impl.unavailable(context) is None
        assert LIBRARIES["linear"].identity() == f"{whole}01234567"
    finally:
        monkeypatch.undo()
        dsl_library.dsl_build.cache_clear()


# ------------------------------------------------------------------------------ plans


@pytest.mark.parametrize(
    "n, k", [(8, 8), (1536, 4096), (4096, 8192), (32768, 1024), (129280, 4096)]
)
@pytest.mark.parametrize("m", [1, 128, 300, 1024, 8192])
@pytest.mark.parametrize("narrow", [False, True])
def test_every_part_of_the_columns_has_steps(n: int, k: int, m: int, narrow: bool) -> None:
    tokens, splits = dsl_linear.plan(n, m, k, True, narrow, 132)
    steps = -(-k // 64)
    assert (splits - 1) * -(-steps // splits) < steps
    assert (
        f"linear_nvfp4_{'f32' if narrow or splits > 1 else 'bf16'}_{tokens}"
        in LIBRARIES["linear"].signatures
    )


def test_plans_fill_the_gpu() -> None:
    def plan(n: int, m: int, k: int) -> tuple[int, int]:
        return tuple(dsl_linear.plan(n, m, k, True, False, 132))

    assert plan(4096, 4096, 8192) == plan(32768, 1024, 1024) == (256, 1)  # enough large tiles
    assert plan(4096, 512, 8192) == (128, 1)  # 128 blocks instead of 64
    assert (
        plan(4096, 128, 8192)[1] > 1 and plan(1536, 128, 4096)[1] > 1
    )  # too few tiles of any size


# ------------------------------------------------------------------------------ by the number of rows


class Held:
    """A tensor, or a weight, of that shape as far as the choice looks."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def numel(self) -> int:
        return math.prod(self.shape)


FEW, WEIGHT = dsl_linear.FEW_ROWS, Held(1024, 64)


@pytest.mark.parametrize("op", ["linear", "grouped_linear"])
@pytest.mark.parametrize(
    "shape, refused, chosen",
    [
        ((0, 64), None, "sm90"),
        ((FEW, 64), None, "sm90"),
        ((FEW + 1, 64), None, "cutedsl"),
        ((2, FEW, 64), None, "cutedsl"),
        ((4096, 64), "no such format", "sm90"),
        ((4096, 0), None, "sm90"),
    ],
)
def test_many_rows_go_to_cutedsl_if_it_takes_them(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    shape: tuple[int, ...],
    refused: str | None,
    chosen: str,
) -> None:
    table = IMPLEMENTATIONS[op]
    monkeypatch.setattr(dsl_linear, "why_not", lambda *args: refused)
    for name in ("sm90", "cutedsl"):
        monkeypatch.setattr(table[name], "function", lambda x, _name=name, **params: _name)
    params = {"out_dtype": None} if op == "linear" else {"groups": 1}
    assert table["sm90+cutedsl"].function(Held(*shape), weight=WEIGHT, **params) == chosen


def test_kernel_means_both_where_both_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context("cuda", torch.bfloat16)
    monkeypatch.setattr(cuda.library, "_device_reason", lambda: None)
    monkeypatch.setattr(cuda.library, "nvcc", lambda: (sys.executable, ""))
    monkeypatch.setattr(dsl_library, "compiler", lambda: (sys.executable, ""))
    monkeypatch.setattr(build.Build, "find", lambda self: None)
    caches = cuda.library.cuda_build, dsl_library.dsl_build
    for cache in caches:
        cache.cache_clear()
    try:
        for op in ("linear", "grouped_linear"):
            impl, note = choose(op, "kernel", context)
            assert (impl.name, note) == ("sm90+cutedsl", "")
            names = [build.split("-")[0] for build in impl.code().split("+")]
            assert names == ["linear_sm90", "skinny_sm90", "linear_dsl_sm90"]
            assert choose(op, "kernel", Context("cuda", torch.float32))[0].name == "sm90"
        monkeypatch.setattr(dsl_library, "compiler", lambda: (None, "no DSL"))
        dsl_library.dsl_build.cache_clear()
        assert choose("linear", "kernel", context)[0].name == "sm90"
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
