"""What decides the bits of a result: versions, CPU and its vector units, threads, GPU"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Versions and hardware of this process, by name; plain JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "dsv4-bench": _version("dsv4-bench"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
    }


# Libraries choose the order of additions by these.
_DECIDES_BITS = ("torch", "system", "cpu", "vector_units", "threads", "gpu", "cuda")


def differences(theirs: Mapping[str, Any]) -> list[str]:
    """Why bits need not agree with those of another machine; empty if nothing speaks against it."""
    mine = machine()
    return [
        f"{name} {mine[name]} here, {theirs.get(name)} there"
        for name in _DECIDES_BITS
        if mine[name] != theirs.get(name)
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
