"""The environment report: what a bug report needs to say about a machine, and nothing private.

Extends torch.utils.collect_env. Everything that leaves this module went through `scrub`: secrets are
redacted, GPU UUIDs stripped, the home folder is written as ``~``.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OK, WARN, FAIL, NOT_CONFIGURED = "ok", "warn", "fail", "not configured"

REDACTED = "[redacted]"
_SECRET_WORDS = "KEY|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL"  # but not tokenizers==0.23
# Variables worth reporting: whoever else sets one of ours, torch's or CUDA's, changes what we do.
_VARIABLES = re.compile(
    r"^(DSV4_|CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|TORCH|PYTORCH|TRITON|CUTE_DSL|OMP_|MKL_|KMP_|HF_|NSYS|"
    r"LD_LIBRARY_PATH$|LD_PRELOAD$|PYTHONPATH$|VIRTUAL_ENV$|CONDA_PREFIX$|CC$|CXX$|NO_COLOR$|"
    r"TERM|COLORTERM$|TMUX$|STY$|SSH_CONNECTION$|LANG$|LC_)"
)
_PATTERNS = (
    # NAME_WITH_TOKEN=value, "apiKey": "value", --password value
    (
        re.compile(rf"(?i)([\w-]*(?:{_SECRET_WORDS})[\w-]*[\"']?\s*[=:]\s*[\"']?)([^\s\"',;]+)"),
        r"\1",
    ),
    (re.compile(rf"(?i)(--[\w-]*(?:{_SECRET_WORDS})[\w-]*\s+)(\S+)"), r"\1"),
    (re.compile(r"(?i)(://)[^/\s@]+(?=@)"), r"\1"),  # user:password@host
    (re.compile(r"(?i)(\bbearer\s+)\S+"), r"\1"),
)
_UUID = re.compile(
    r"(?i)\b(?:GPU|MIG)-(?:GPU-)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?:/\d+)*"
)

REQUIRED = ("torch", "safetensors", "tokenizers", "textual", "numpy", "rich", "platformdirs")
OPTIONAL = {
    "nvidia-cutlass-dsl": "CuTe-DSL kernels need it: pip install nvidia-cutlass-dsl",
    "textual-plot": "plots in the terminal UI need it",
    "matplotlib": "plots in reports need it",
    "nvtx": "ranges in nsys timelines need it",
    "transformers": "only the tests need it",
}


@dataclass(frozen=True)
class Check:
    """One line of the report; `hint` says what to do, or what is lost without it."""

    name: str
    status: str
    value: str
    hint: str = ""


# ------------------------------------------------------------------------------ privacy


def is_secret(name: str) -> bool:
    """Whether a variable of this name may hold a secret."""
    return re.search(_SECRET_WORDS, name.upper()) is not None


def scrub(value: Any, home: str | None = None) -> Any:
    """`value` without secrets, GPU UUIDs and the home path; containers are gone through."""
    home = str(Path.home()) if home is None else home
    if isinstance(value, Mapping):
        return {
            key: REDACTED if is_secret(str(key)) and item else scrub(item, home)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrub(item, home) for item in value]
    if not isinstance(value, str):
        return value
    for pattern, kept in _PATTERNS:
        value = pattern.sub(kept + REDACTED, value)
    value = _UUID.sub("[uuid]", value)
    if len(home) > 1:
        value = re.sub(re.escape(home.rstrip("/")) + r"(?=[/\s:'\",;]|$)", "~", value)
    return re.sub(r"(/home|/Users)/[^/\s:'\",;]+", r"\1/[user]", value)


def reported_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that can change what we do, secrets redacted."""
    chosen = {name: text for name, text in environment.items() if _VARIABLES.match(name)}
    return dict(scrub(dict(sorted(chosen.items()))))


# ------------------------------------------------------------------------------ checks


def _output(command: list[str], folder: Path | None = None) -> str | None:
    """What a command prints, or None if it cannot be run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, cwd=folder
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ours() -> Iterator[Check]:
    """Our version, and the commit of a checkout."""
    own = _version("dsv4-bench")
    yield Check("dsv4-bench", OK, own or "run from a source tree, not installed")
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        yield Check("git", NOT_CONFIGURED, "not a checkout")
        return
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"], root)
    changed = _output(["git", "status", "--porcelain"], root)
    if commit is None:
        yield Check("git", WARN, "the commit is unknown", "git is missing, or distrusts the folder")
        return
    count = len((changed or "").splitlines())
    yield Check("git", OK, commit + (f" + {count} changed files" if count else ""))


def python() -> Iterator[Check]:
    version = platform.python_version()
    status = OK if sys.version_info >= (3, 11) else FAIL
    yield Check(
        "python", status, f"{version} ({sys.executable})", "" if status == OK else "need 3.11"
    )
    yield Check("system", OK, platform.platform())


def packages() -> Iterator[Check]:
    for name in REQUIRED:
        found = _version(name)
        hint = "" if found else f"pip install {name}"
        yield Check(name, OK if found else FAIL, found or "missing", hint)
    for name, hint in OPTIONAL.items():
        found = _version(name)
        yield Check(
            name, OK if found else NOT_CONFIGURED, found or "not installed", "" if found else hint
        )


def gpu() -> Iterator[Check]:
    """torch, its CUDA, the driver and each device's architecture."""
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways
        yield Check("import torch", FAIL, f"{type(error).__name__}: {error}", "reinstall torch")
        return
    cuda = torch.version.cuda
    yield Check("torch CUDA", OK if cuda else NOT_CONFIGURED, cuda or "built for the CPU only")
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    first = driver.splitlines()[0] if driver else ""
    yield Check("driver", OK if first else NOT_CONFIGURED, first or "no nvidia-smi")
    if not torch.cuda.is_available():
        reference = "the reference and the CPU kernels run everywhere"
        if cuda and first:
            yield Check("GPU", WARN, "torch sees none", "driver and torch's CUDA may not fit")
        else:
            yield Check("GPU", NOT_CONFIGURED, "none", reference)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        arch = f"sm_{device.major}{device.minor}"
        known = device.major in (9, 10)
        hint = "" if known else "kernels exist for sm_90 and sm_100; the reference runs here"
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        yield Check(f"GPU {index}", OK if known else WARN, f"{device.name}, {arch}, {memory}", hint)


def compilers() -> Iterator[Check]:
    """nvcc and the host compiler, where they are and what they call themselves."""
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(toolkit) / "bin"))
    if nvcc:
        text = _output([nvcc, "--version"]) or ""
        release = re.search(r"release ([\d.]+)", text)
        yield Check("nvcc", OK, f"{release[1] if release else 'unknown version'} ({nvcc})")
    else:
        yield Check("nvcc", NOT_CONFIGURED, "not found", "CUDA kernels cannot be built here")
    named = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    found = next((path for name in named if (path := shutil.which(name.split()[0]))), None)
    if found:
        first = (_output([found, "--version"]) or "unknown version").splitlines()[0]
        yield Check("host compiler", OK, f"{first} ({found})")
    else:
        hint = "CPU kernels cannot be built: install g++, or set CXX"
        yield Check("host compiler", WARN, f"none of {', '.join(named)}", hint)


CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512vbmi")  # as Linux spells them


def processor() -> Iterator[Check]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        yield Check("CPU", OK, f"{platform.machine()}, {os.cpu_count()} cores")
        return
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("CPU", OK, f"{model[1] if model else platform.machine()}, {usable} cores usable")
    have = [flag for flag in CPU_FLAGS if flag in flags]
    lack = [flag for flag in CPU_FLAGS if flag not in flags]
    text = (" ".join(have) or "none of the known ones") + (
        f"; not {' '.join(lack)}" if lack else ""
    )
    status = OK if "avx2" in flags else WARN
    yield Check("CPU flags", status, text, "" if status == OK else "the CPU kernels use plain C++")


def caches() -> Iterator[Check]:
    """The cache folder: writable, how much is built, how much room."""
    from dsv4_bench.engine.demo import cache_folder

    folder = cache_folder()
    kernels = folder / "kernels"
    built = sum(1 for _ in kernels.glob("*/*.so")) if kernels.is_dir() else 0
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    writable = place.is_dir() and os.access(place, os.W_OK)
    hint = "" if writable else "set DSV4_CACHE to a writable folder"
    yield Check("cache", OK if writable else FAIL, f"{folder}, {built} kernels built", hint)
    if place.is_dir():
        free = shutil.disk_usage(place).free
        low = free < 2e9
        yield Check("free disk", WARN if low else OK, f"{free / 1e9:.1f} GB", "nearly full" * low)
    chosen = os.environ.get("DSV4_CKPT")
    if chosen:
        there = Path(chosen).expanduser().is_dir()
        yield Check("DSV4_CKPT", OK if there else FAIL, chosen, "" if there else "no such folder")


def memory() -> Iterator[Check]:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return
    sizes = {m[1]: int(m[2]) / 2**20 for m in re.finditer(r"(\w+):\s+(\d+) kB", text)}
    total, free = sizes.get("MemTotal", 0.0), sizes.get("MemAvailable", 0.0)
    low = free < 2
    yield Check(
        "memory",
        WARN if low else OK,
        f"{free:.1f} GiB available of {total:.1f} GiB",
        "a layer of V4-Flash needs about 2 GiB" if low else "",
    )


def terminal() -> Iterator[Check]:
    term = os.environ.get("TERM", "")
    if not sys.stderr.isatty():
        yield Check("terminal", NOT_CONFIGURED, f"not a terminal (TERM={term or 'unset'})")
        return
    size = shutil.get_terminal_size()
    deep = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    inside = " inside tmux" if os.environ.get("TMUX") else ""
    text = f"{term or 'TERM unset'}, {size.columns}x{size.lines}{inside}"
    small = size.columns < 80 or size.lines < 24
    if small:
        yield Check("terminal", WARN, text, "the terminal UI wants 80x24 or more")
    elif not deep:
        yield Check("terminal", WARN, text, "COLORTERM is not truecolor: fewer colours")
    else:
        yield Check("terminal", OK, text)


def profilers() -> Iterator[Check]:
    for name, hint in (("nsys", "profile --nsys needs it"), ("ncu", "profile --ncu needs it")):
        path = shutil.which(name)
        if not path:
            yield Check(name, NOT_CONFIGURED, "not found", hint)
            continue
        lines = (_output([path, "--version"]) or "unknown version").splitlines()
        yield Check(name, OK, f"{lines[-1]} ({path})")


SECTIONS: dict[str, Callable[[], Iterator[Check]]] = {
    "dsv4-bench": ours,
    "python": python,
    "packages": packages,
    "GPU": gpu,
    "compilers": compilers,
    "CPU": processor,
    "cache": caches,
    "memory": memory,
    "terminal": terminal,
    "profilers": profilers,
}


def torch_environment() -> dict[str, Any]:
    """torch.utils.collect_env as a dictionary; empty if torch is broken."""
    try:
        from torch.utils.collect_env import get_env_info

        info = get_env_info()._asdict()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {name: value for name, value in info.items() if value not in (None, "", "N/A", [])}


def examine() -> dict[str, Any]:
    """The whole report, scrubbed. A section that fails becomes a failed check, never a crash."""
    sections: dict[str, list[dict[str, str]]] = {}
    for title, section in SECTIONS.items():
        checks: list[Check] = []
        try:
            checks.extend(section())
        except Exception as error:
            checks.append(Check(title, FAIL, f"{type(error).__name__}: {error}", "report this"))
        sections[title] = [vars(check) for check in checks]
    statuses = [check["status"] for checks in sections.values() for check in checks]
    return dict(
        scrub(
            {
                "status": next((s for s in (FAIL, WARN) if s in statuses), OK),
                "sections": sections,
                "variables": reported_variables(os.environ),
                "torch_environment": torch_environment(),
            }
        )
    )
