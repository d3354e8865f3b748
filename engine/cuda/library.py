"""The compiled CUDA kernels for sm_90a: how they are built, loaded and called, and where they can run.

One shared object per file ``csrc/cuda/<name>_sm90.cu``, built by nvcc at its first call (1 to 3 s)
and kept by content, as on the CPU. Every exported function is ``int dsv4_<name>(..., void* stream)``
and returns a cudaError_t, or -1 for arguments it does not take; nothing in it synchronises.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dsv4_bench.engine import build
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.registry import Context, Function, implementation

# ------------------------------------------------------------------------------ compiler and build

ARCH = "sm_90a"
# No fast math: subnormals, NaN and infinity keep their meaning. -v leaves ptxas' report in the log.
# -O1 is the host's half alone. Kernels of a source are optimised in eight threads: that of norm takes
# 2.5 s instead of 3.4 on the host of an H200, and a fixed number makes the same code everywhere.
FLAGS = (
    *("-gencode=arch=compute_90a,code=sm_90a", "-O1", "-split-compile=8", "-std=c++17", "--shared"),
    *("-Xcompiler=-fPIC,-fvisibility=hidden", "-lineinfo", "-Xptxas=-v", "--cudart=static"),
)


def nvcc() -> tuple[str | None, str]:
    """nvcc ($DSV4_NVCC, else the path, else $CUDA_HOME) and "", or None and the reason."""
    chosen = os.environ.get("DSV4_NVCC")
    if chosen:
        found = shutil.which(chosen)
        return (found, "") if found else (None, f"$DSV4_NVCC is {chosen!r}, not an executable")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    return (found, "") if found else (None, "nvcc not found: set $DSV4_NVCC or $CUDA_HOME")


@lru_cache
def cuda_build(name: str) -> build.Build:
    """The build of ``csrc/cuda/<name>_sm90.cu``."""
    return build.Build(f"{name}_sm90", (f"cuda/{name}_sm90.cu",), FLAGS, ARCH, nvcc()[0])


def sources() -> list[str]:
    """The name of every CUDA source there is."""
    folder = build.csrc() / "cuda"
    return sorted(path.name.removesuffix("_sm90.cu") for path in folder.glob("*_sm90.cu"))


def library_path(name: str) -> Path:
    """The shared object of `name`, built now if need be. Raises CannotAnswer if it cannot be."""
    target = cuda_build(name)
    if target.compiler is None and target.find() is None:
        raise CannotAnswer(f"{target.name} is not built, and {nvcc()[1]}", "install CUDA 13's nvcc")
    return target.library()


def build_all(names: Iterable[str] | None = None, workers: int | None = None) -> dict[str, Path]:
    """Build many sources at once, `workers` compilers side by side; name -> shared object."""
    wanted = sources() if names is None else list(names)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return dict(zip(wanted, pool.map(library_path, wanted), strict=True))


def reset() -> None:
    """Forget compiler and loaded libraries: the next call looks at the environment again."""
    cuda_build.cache_clear()
    _device_reason.cache_clear()
    for library in _LIBRARIES.values():
        library.functions = {}


# ------------------------------------------------------------------------------ where they can run


@lru_cache
def _device_reason() -> str | None:
    """Why no kernel here can run on this machine's current GPU, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"needs sm_90a, this is sm_{major}{minor}"


def unsuitable(context: Context, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why no kernel for sm_90a and activations of `dtypes` can serve `context`, or None."""
    if reason := _device_reason():
        return reason
    if context.device != "cuda":
        return f"needs CUDA tensors, this is {context.device}"
    if context.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"needs {known}, this is {str(context.dtype).removeprefix('torch.')}"
    return None


def unavailable(name: str, context: Context, dtypes: Iterable[torch.dtype]) -> str | None:
    """Why source `name` cannot serve `context` with activations of `dtypes`, or None; builds nothing."""
    if reason := unsuitable(context, dtypes):
        return reason
    if nvcc()[0] is None and cuda_build(name).find() is None:
        return "nvcc not found and not built"
    return None


# ------------------------------------------------------------------------------ calls

P, N, I, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum dsv4_dtype
_LIBRARIES: dict[str, Library] = {}


class Library:
    """One CUDA source: `signatures` gives each function's argument types, without the stream."""

    def __init__(self, name: str, signatures: dict[str, tuple[Any, ...]]) -> None:
        self.name = name
        self.signatures = signatures
        self.functions: dict[str, Callable[..., int]] = {}
        self._describe: Callable[[int], bytes] | None = None
        _LIBRARIES[name] = self

    def path(self) -> Path:
        """The shared object, built now if need be."""
        return library_path(self.name)

    def load(self) -> None:
        """Build if need be, and load."""
        self._bind(self.path(), self.signatures)

    def _bind(self, path: Path, functions: Iterable[str]) -> None:
        """Make `functions` callable from the shared object at `path`."""
        library = ctypes.CDLL(str(path))  # drops the GIL during a call
        describe = library.dsv4_error_string
        describe.argtypes, describe.restype = (I,), ctypes.c_char_p
        table: dict[str, Callable[..., int]] = {}
        for name in functions:
            function = getattr(library, f"dsv4_{name}")
            function.argtypes, function.restype = (*self.signatures[name], P), ctypes.c_int
            table[name] = function
        self._describe, self.functions = describe, {**self.functions, **table}

    def _loaded(self, function: str) -> Callable[..., int]:
        """`function`, from a library that is loaded now."""
        self.load()
        return self.functions[function]

    def call(self, function: str, on: Tensor, *args: Any) -> None:
        """Launch `function` on the device and current stream of tensor `on`.

        Raises DSV4Error for arguments the kernel does not take, RuntimeError for a CUDA error.
        """
        run = self.functions.get(function) or self._loaded(function)
        index = on.device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        if index == torch.cuda.current_device():
            status = run(*args, stream)
        else:
            with torch.cuda.device(index):
                status = run(*args, stream)
        if status == -1:
            wrong(function, "the kernel does not take these sizes")
        if status:
            assert self._describe is not None
            text = self._describe(status).decode()
            raise RuntimeError(f"{function} (sm90): CUDA error {status}: {text}")


def sm90(
    op: str,
    library: Library,
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES),
    also: tuple[Library, ...] = (),
) -> Callable[[Function], Function]:
    """Register the decorated function as implementation `sm90` of `op`, compiled in `library` (and `also`)."""

    def requires(context: Context) -> str | None:
        return unavailable(library.name, context, dtypes)

    def code() -> str:
        return "+".join(cuda_build(used.name).identity() for used in (library, *also))

    return implementation(op=op, name="sm90", requires=requires, code=code)


# ------------------------------------------------------------------------------ tensors

_ALIGNMENT = 16  # bytes: the widest load


def wrong(op: str, text: str, name: str = "sm90") -> NoReturn:
    """Raise DSV4Error for arguments of `op` that the kernel must not be given."""
    raise DSV4Error(f"{op} ({name}): {text}", "the reference implementation may accept it")


def dense(x: Tensor) -> Tensor:
    """`x` contiguous from an address that 16-byte loads accept; itself if it is."""
    if not x.is_contiguous():
        return x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def activation(op: str, x: Tensor) -> tuple[Tensor, int]:
    """`x` dense in GPU memory, and its dtype code; DSV4Error if not float32 or bfloat16."""
    kind = DTYPES.get(x.dtype)
    if kind is None or not x.is_cuda:
        wrong(op, f"expected a float32 or bfloat16 CUDA tensor, got {x.dtype} on {x.device}")
    return dense(x), kind


def typed(op: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a dense CUDA tensor of `dtype`; itself if it is one."""
    if not x.is_cuda:
        wrong(op, f"expected a CUDA tensor, got {x.dtype} on {x.device}")
    return dense(x if x.dtype == dtype else x.to(dtype))


def floats(op: str, x: Tensor) -> Tensor:
    """`x` as a dense float32 CUDA tensor."""
    return typed(op, x, torch.float32)
