"""How the CuTe-DSL kernels are built, found, called and registered as `cutedsl` implementations.

One shared object for every kernel that a file ``engine/dsl/<op>_sm90.py`` exports, made by `compile.py` at the
kernel's first call (2 to 3 s, in a process of its own: the DSL's state is global) and kept by content like
every other build. A machine without nvidia-cutlass-dsl uses those that were built elsewhere.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


class WarmCompiler:
    """A process that has imported the DSL and compiles one source after the other; it ends with us."""

    def __init__(self, command: str) -> None:
        self.process = subprocess.Popen(
            [*shlex.split(command), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # it forks: no threads
            start_new_session=True,  # Ctrl-C is not for it
        )

    def run(self, words: list[str], folder: Path) -> int | None:
        """The exit code of the compiler with the arguments `words` in `folder`; None if it is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(
                json.dumps({"words": words, "folder": str(folder)}),
                file=self.process.stdin,
                flush=True,
            )
            return int(self.process.stdout.readline())
        except (OSError, ValueError):
            return None


_warm: list[WarmCompiler] = []


def keep_warm() -> None:
    """Start a compiler that every later build here uses, if there is none yet and one can be."""
    command = compiler()[0]
    if command is not None and not _warm:
        _warm.append(WarmCompiler(command))


@dataclass(frozen=True)
class DslBuild(build.Build):
    """A build by the warm compiler, where there is one."""

    def _run(self, work: Path) -> int:
        _, _, _, *words = self.command()  # without python -m and the module
        code = _warm[0].run(words, work) if _warm else None
        return super()._run(work) if code is None else code


@lru_cache
def dsl_build(op: str, kernel: str = "") -> DslBuild:
    """The build of one kernel of ``engine/dsl/<op>_sm90.py``; without a name, what all of them come from."""
    files = (f"{op}_sm90.py", *HELPERS)
    flags = ("--kernel", kernel) if kernel else ()
    return DslBuild(f"{kernel or op}_dsl_sm90", files, flags, ARCH, compiler()[0], FOLDER)


def reset() -> None:
    """Forget what was read of sources and compiler."""
    dsl_build.cache_clear()


def sources() -> list[str]:
    """The op of every DSL source there is."""
    return sorted(path.name.removesuffix("_sm90.py") for path in FOLDER.glob("*_sm90.py"))


class DslLibrary(Library):
    """The kernels of `op`, each loaded when it is first called; `signatures` as in Library."""

    def __init__(self, op: str, signatures: dict[str, tuple[Any, ...]]) -> None:
        super().__init__(f"{op}_dsl", signatures)
        self.op = op

    def built(self) -> Path | None:
        """The shared object of some kernel if all of them are built."""
        found = [dsl_build(self.op, kernel).find() for kernel in self.signatures]
        return found[0] if all(found) else None

    def identity(self) -> str:
        """Names sources and compiler; where there is none, the one that made what was found."""
        target = dsl_build(self.op)
        found = self.built() if target.compiler is None else None
        if found is None:
            return target.identity()
        return f"{target.name}-{target.content[:12]}-{found.parent.name.rpartition('-')[2]}"

    def path_of(self, kernel: str) -> Path:
        """The shared object of `kernel`, built now if need be. Raises CannotAnswer if it cannot be."""
        target = dsl_build(self.op, kernel)
        if target.compiler is None and target.find() is None:
            raise CannotAnswer(
                f"{target.name} is not built, and {compiler()[1]}",
                "pip install nvidia-cutlass-dsl, or build it on another machine",
            )
        return target.library()

    def build_all(self, workers: int | None = None) -> dict[str, Path]:
        """Build every kernel, `workers` compilers side by side; name -> shared object."""
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            paths = pool.map(self.path_of, self.signatures)
            return dict(zip(self.signatures, paths, strict=True))

    def load(self) -> None:
        for kernel in self.signatures:
            self._loaded(kernel)

    def _loaded(self, function: str) -> Callable[..., int]:
        self._bind(self.path_of(function), [function])
        return self.functions[function]


def cutedsl(
    op: str, library: DslLibrary, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
) -> Callable[[Function], Function]:
    """Register the decorated function as implementation `cutedsl` of `op`, compiled in `library`."""

    def requires(context: Context) -> str | None:
        if reason := cuda.library.unsuitable(context, dtypes):
            return reason
        command, reason = compiler()
        if command is None and library.built() is None:
            return f"{reason} and not built"
        return None

    return implementation(op=op, name="cutedsl", requires=requires, code=library.identity)
