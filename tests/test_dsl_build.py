"""Every CuTe-DSL kernel compiles for sm_90a and spills no register; needs nvidia-cutlass-dsl, but no GPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dsv4_bench.engine.dsl.linear as dsl_linear
from dsv4_bench.engine import cuda_library, ptxas
from dsv4_bench.engine.dsl import compile as dsl_compile
from dsv4_bench.engine.dsl import library as dsl_library
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Context

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
        log = ptxas.log_of(dsl_library.dsl_build(op).library())
    else:
        source = dsl_library.FOLDER / f"{op}_sm90.py"
        command = [sys.executable, "-m", "dsv4_bench.engine.dsl.compile", "-c", str(source)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log
    found = ptxas.resources(log)
    kernels = {used.kernel.rpartition("_")[0] for used in found}  # the DSL appends a number
    assert kernels == set(LIBRARIES[op].signatures), log
    for used in found:
        print(f"{used.kernel}: {used.registers} registers")
    assert not [used for used in found if used.spills]
    assert not ptxas.serialized(log)


@needs_compiler
@pytest.mark.parametrize("op", dsl_library.sources())
def test_the_library_exports_what_is_declared(op: str) -> None:
    library = ctypes.CDLL(str(LIBRARIES[op].path()))
    for function in ("error_string", *LIBRARIES[op].signatures):
        assert getattr(library, f"dsv4_{function}")


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


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impl = IMPLEMENTATIONS["linear"]["cutedsl"]
    monkeypatch.setattr(cuda_library, "_device_reason", lambda: "no CUDA device")
    assert impl.unavailable(Context("cuda")) == "no CUDA device"
    monkeypatch.setattr(cuda_library, "_device_reason", lambda: None)
    import torch

    context = Context("cuda", torch.bfloat16)
    assert impl.unavailable(Context("cuda", torch.float32)) == "needs bfloat16, this is float32"
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path))
    monkeypatch.setattr(dsl_library, "find_spec", lambda name: None)
    dsl_library.dsl_build.cache_clear()
    try:
        assert impl.unavailable(context) == "nvidia-cutlass-dsl is not installed and not built"
        with pytest.raises(CannotAnswer, match="linear_dsl_sm90 is not built"):
            LIBRARIES["linear"].path()
        # A library that was built elsewhere serves without the DSL, and is its own identity.
        target = dsl_library.dsl_build("linear")
        folder = tmp_path / "kernels" / f"{target.name}-{target.content[:12]}-01234567"
        folder.mkdir(parents=True)
        (folder / f"{target.name}.so").touch()
        assert impl.unavailable(context) is None
        assert target.identity() == folder.name
    finally:
        monkeypatch.undo()
        dsl_library.dsl_build.cache_clear()
