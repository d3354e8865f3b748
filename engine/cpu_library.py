"""The compiled CPU kernels: which ISA, built how, loaded when, and how Python hands them tensors.

One shared object per ISA from the same sources; only the chosen one is built, at the first call.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dsv4_bench.engine import build
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, did_you_mean
from dsv4_bench.engine.packed import Packs
from dsv4_bench.engine.registry import Context, Function, implementation

# ------------------------------------------------------------------------------ ISA and build

# Best first: flags in /proc/cpuinfo that the CPU must have, options that the compiler gets.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c")
_WIDE = "-mprefer-vector-width=512"
ISAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512bf16": (
        (*_AVX512, "avx512_bf16"),
        (*(f"-m{flag}" for flag in _AVX512), "-mavx512bf16", _WIDE),
    ),
    "avx512": (_AVX512, (*(f"-m{flag}" for flag in _AVX512), _WIDE)),
    "avx2": (_AVX2, tuple(f"-m{flag}" for flag in _AVX2)),
    "portable": ((), ()),
}
# -ffp-contract=fast lets a * b + c be one instruction; no flag here may touch NaN or infinity.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-math-errno", "-pthread"),
)


@lru_cache
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def missing_flags(isa: str) -> list[str]:
    """What this CPU lacks for `isa`."""
    return [flag for flag in ISAS[isa][0] if flag not in cpu_flags()]


def choose_isa() -> str:
    """$DSV4_CPU_ISA, else the best this CPU has. Raises for an unknown ISA or one it lacks."""
    wanted = os.environ.get("DSV4_CPU_ISA")
    if not wanted:
        return next(isa for isa in ISAS if not missing_flags(isa))
    if wanted not in ISAS:
        raise DSV4Error(f"unknown $DSV4_CPU_ISA {wanted!r}", did_you_mean(wanted, ISAS))
    if missing := missing_flags(wanted):
        raise CannotAnswer(
            f"$DSV4_CPU_ISA is {wanted}, but this CPU lacks {', '.join(missing)}",
            "unset it to use the best this CPU has",
        )
    return wanted


@lru_cache
def cpu_build(isa: str) -> build.Build:
    """The build of all CPU kernels for `isa`."""
    folder = build.csrc() / "cpu"
    sources = tuple(sorted(f"cpu/{path.name}" for path in folder.glob("*.cpp")))
    command, _ = build.compiler()
    flags = (*_FLAGS, *ISAS[isa][1])
    arch = f"{platform.machine()}-{isa}"
    return build.Build(f"cpu-{isa}", sources, flags, arch, command)


@lru_cache
def _no_kernels() -> str | None:
    """Why there can be no kernels on this machine, or None. Compiles nothing."""
    try:
        isa = choose_isa()
    except DSV4Error as error:
        return error.message
    command, reason = build.compiler()
    if command is not None or cpu_build(isa).find() is not None:
        return None
    return reason


def requires(context: Context) -> str | None:
    """None where the CPU kernels can serve `context`, else the reason; cheap, builds nothing."""
    if context.device != "cpu":
        return f"needs CPU tensors, this is {context.device}"
    if context.dtype not in DTYPES:
        return f"needs float32 or bfloat16, this is {str(context.dtype).removeprefix('torch.')}"
    return _no_kernels()


def code() -> str:
    """What identifies the compiled code: ISA and build key."""
    isa = choose_isa()
    target = cpu_build(isa)
    if target.compiler is None and (found := target.find()) is not None:
        return found.parent.name
    return f"{target.name}-{target.key}"


# ------------------------------------------------------------------------------ the library

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
# Argument types of every kernel, in the order of its C declaration; all return an int status.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "linear": (_P, _I, _N, _P, _N, _P, _I, _I),
    "expert": (_P, _I, _N, _P, _P, _N, _N, _P, _P, _P, _F, _P, _I),
    "moe_sum": (_P, _P, _N, _P, _I, _I),
    "attention": (_P, _P, _N, _P, _N, _P, _N, _P, _N, _P, _F, _N, _N, _N, _P, _P, _I, _I),
    "compressor": (_P, _P, _P, _P, _P, _P, _N, _N, _N, _I, _P, _P, _I),
    "index_score": (_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _N, _F, _P, _I, _I, _I),
    "index_topk": (_P, _P, _N, _N, _N, _P, _I),
    "hc_pre": (_P, _I, _N, _N, _N, _P, _P, _P, _N, _F, _F, _P, _P, _P, _I),
    "hc_post": (_P, _I, _P, _I, _P, _P, _N, _N, _N, _P, _I),
    "hc_head": (_P, _I, _N, _N, _N, _P, _P, _P, _F, _F, _P, _I),
    "rms_norm": (_P, _I, _N, _N, _P, _I, _F, _P, _I),
    "rope": (_P, _I, _P, _N, _N, _N, _P, _N, _I, _P, _I),
    "gate": (_P, _I, _P, _N, _P, _P, _N, _F, _P, _P, _P, _I),
    "embed": (_P, _N, _P, _I, _N, _N, _N, _P, _I),
    "cache_write": (_P, _I, _P, _N, _P, _I, _N, _N, _N),
    "gather_swa": (_P, _N, _P, _N, _N, _I, _I, _P),
    "read_bytes": (_P, _N, _P, _I),
    "stats": (_P, _I, _N, _P, _I),
}


@dataclass(frozen=True)
class Kernels:
    """The loaded functions by op name; each takes plain numbers and addresses."""

    isa: str
    path: Path
    call: dict[str, Callable[..., int]]


_kernels: Kernels | None = None


def kernels() -> Kernels:
    """The loaded library; the first call builds it if need be. Raises CannotAnswer when it fails."""
    return _kernels or _load()


def kernels_at_hand() -> Kernels | None:
    """The library if it is loaded or need only be loaded; None where it would have to be built."""
    if _kernels is not None:
        return _kernels
    try:
        return _load() if cpu_build(choose_isa()).find() is not None else None
    except (DSV4Error, OSError):
        return None


def _load() -> Kernels:
    global _kernels
    isa = choose_isa()
    path = cpu_build(isa).library()
    library = ctypes.CDLL(str(path))  # drops the GIL during a call
    table = {}
    for name, types in _SIGNATURES.items():
        function = getattr(library, f"dsv4_{name}")
        function.argtypes, function.restype = types, ctypes.c_int
        table[name] = function
    _kernels = Kernels(isa, path, table)
    return _kernels


def reset() -> None:
    """Forget the choice of ISA, compiler and library: the next call looks at the environment again."""
    global _kernels
    _kernels = None
    _no_kernels.cache_clear()
    cpu_build.cache_clear()


_NO_MEMORY, _BAD_INDEX = 1, 2  # enum dsv4_status


def run(op: str, *args: Any, bad_index: str = "") -> None:
    """Call kernel `op`. Raises IndexError with text `bad_index`, or MemoryError."""
    status = kernels().call[op](*args)
    if status == _BAD_INDEX:
        raise IndexError(f"{op}: {bad_index}")
    if status == _NO_MEMORY:
        raise MemoryError(f"{op}: no memory for the kernel's scratch space")
    assert status == 0, f"{op}: unknown kernel status {status}"


def plain_kv(context: Context) -> str | None:
    """`requires`, for an op on pools of keys: these kernels take no packed entries."""
    return "takes no packed KV entries" if context.kv == "fp8" else requires(context)


def cpu(
    op: str, requires: Callable[[Context], str | None] = requires
) -> Callable[[Function], Function]:
    """Register the decorated function as implementation `cpu` of `op`."""
    return implementation(op=op, name="cpu", requires=requires, code=code)


# ------------------------------------------------------------------------------ tensors

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum dsv4_dtype
EMBED_DTYPES = {**DTYPES, torch.float16: 2}


def wrong(op: str, text: str) -> NoReturn:
    """Raise DSV4Error for arguments of `op` that the kernel must not be given."""
    raise DSV4Error(f"{op} (cpu): {text}", "the reference implementation may accept it")


def activation(op: str, x: Tensor) -> tuple[Tensor, int]:
    """`x` contiguous in CPU memory, and its dtype code; DSV4Error if not float32 or bfloat16."""
    kind = DTYPES.get(x.dtype)
    if kind is None or not x.is_cpu:
        wrong(op, f"expected a float32 or bfloat16 CPU tensor, got {x.dtype} on {x.device}")
    return (x if x.is_contiguous() else x.contiguous()), kind


def typed(op: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as a contiguous CPU tensor of `dtype`; itself if it is one."""
    if not x.is_cpu:
        wrong(op, f"expected a CPU tensor, got {x.dtype} on {x.device}")
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def floats(op: str, x: Tensor) -> Tensor:
    """`x` as a contiguous float32 CPU tensor."""
    return typed(op, x, torch.float32)


def same_dtype(op: str, keys: Tensor, q: Tensor) -> Tensor:
    """`keys` contiguous and in q's dtype; DSV4Error if that would round them."""
    if keys.dtype != q.dtype and (keys.dtype, q.dtype) != (torch.bfloat16, torch.float32):
        wrong(op, f"keys are {keys.dtype}, queries {q.dtype}")
    return typed(op, keys, q.dtype)


pack = Packs("in CPU memory", lambda tensor: tensor.is_cpu, Tensor.contiguous, wrong)
