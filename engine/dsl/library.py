"""How the CuTe-DSL kernels are built, found, called and registered as `cutedsl` implementations.

One shared object per file ``engine/dsl/<op>_sm90.py``, made by `compile.py` in a process of its own
(seconds; the DSL's state is global) and kept by content like every other build. A machine without
nvidia-cutlass-dsl uses one that was built elsewhere.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine import build, cuda
from dsv4_bench.engine.cuda.library import ARCH, Library, nvcc
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.registry import Context, Function, implementation

FOLDER = Path(__file__).parent
HELPERS = ("codes.py",)  # that the sources import


def compiler() -> tuple[str | None, str]:
    """The command that compiles a DSL source and "", or None and the reason."""
    if find_spec("cutlass") is None:
        return None, "nvidia-cutlass-dsl is not installed"
    found, reason = nvcc()
    if found is None:
        return None, reason
    words = [sys.executable, "-m", "dsv4_bench.engine.dsl.compile", "--nvcc", found]
    return shlex.join(words), ""


@lru_cache
def dsl_build(op: str) -> build.Build:
    """The build of ``engine/dsl/<op>_sm90.py``."""
    files = (f"{op}_sm90.py", *HELPERS)
    return build.Build(f"{op}_dsl_sm90", files, (), ARCH, compiler()[0], FOLDER)


def sources() -> list[str]:
    """The op of every DSL source there is."""
    return sorted(path.name.removesuffix("_sm90.py") for path in FOLDER.glob("*_sm90.py"))


class DslLibrary(Library):
    """The kernels of `op`; `signatures` as in Library."""

    def __init__(self, op: str, signatures: dict[str, tuple[Any, ...]]) -> None:
        super().__init__(f"{op}_dsl", signatures)
        self.op = op

    def path(self) -> Path:
        target = dsl_build(self.op)
        if target.compiler is None and target.find() is None:
            raise CannotAnswer(
                f"{target.name} is not built, and {compiler()[1]}",
                "pip install nvidia-cutlass-dsl, or build it on another machine",
            )
        return target.library()


def cutedsl(
    op: str, library: DslLibrary, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
) -> Callable[[Function], Function]:
    """Register the decorated function as implementation `cutedsl` of `op`, compiled in `library`."""

    def requires(context: Context) -> str | None:
        if reason := cuda.library.unsuitable(context, dtypes):
            return reason
        command, reason = compiler()
        if command is None and dsl_build(library.op).find() is None:
            return f"{reason} and not built"
        return None

    return implementation(
        op=op, name="cutedsl", requires=requires, code=lambda: dsl_build(library.op).identity()
    )
