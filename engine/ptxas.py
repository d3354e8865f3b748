"""What ptxas says about each kernel of a build: registers, shared memory, stack, spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Any white space: CuTe-DSL wraps the lines of a report that it has something to say about.
_ENTRY = re.compile(r"Compiling\s+entry\s+function\s+'(\w+)'")
_STACK = re.compile(
    r"(\d+)\s+bytes\s+stack\s+frame,\s+(\d+)\s+bytes\s+spill\s+stores,\s+(\d+)\s+bytes\s+spill\s+loads"
)
_USED = re.compile(r"Used\s+(\d+)\s+registers")
_SHARED = re.compile(r"(\d+)\s+bytes\s+smem")
_SERIALIZED = re.compile(
    r"instructions\s+are\s+serialized.{0,100}?in\s+(?:the\s+)?function\s+'(\w+)'", re.S
)


@dataclass(frozen=True)
class Resources:
    """One kernel's needs, a thread but for `shared`, which is the block's static bytes."""

    kernel: str
    registers: int
    stack: int  # bytes of local memory
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.spill_stores > 0 or self.spill_loads > 0


def resources(log: str) -> list[Resources]:
    """Every entry function in the output of ``nvcc -Xptxas=-v``, in the order of the log."""
    found = []
    parts = _ENTRY.split(log)[1:]  # name, text, name, text, ...
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        stack, used, shared = _STACK.search(text), _USED.search(text), _SHARED.search(text)
        if stack is None or used is None:
            continue
        frame, stores, loads = (int(group) for group in stack.groups())
        static = int(shared.group(1)) if shared else 0
        found.append(Resources(name, int(used.group(1)), frame, stores, loads, static))
    return found


def serialized(log: str) -> list[str]:
    """Functions in which every wgmma waits for the one before, as ptxas could not let them overlap."""
    return _SERIALIZED.findall(log)


def log_of(library: Path) -> str:
    """What the compiler said when it made `library`; it lies beside it."""
    return (library.parent / "build.log").read_text(errors="replace")


def resources_of(library: Path) -> list[Resources]:
    """Every entry function of a built library."""
    return resources(log_of(library))


def demangled(names: list[str]) -> list[str]:
    """C++ names as written in the source, without their arguments; as they are without c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return [without_arguments(line) for line in done.stdout.splitlines()]


def without_arguments(name: str) -> str:
    """``void f<3>(int, g<4>)`` -> ``f<3>``."""
    depth = 0
    for i in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[i], 0)
        if name[i] == "(" and depth == 0 and not name.startswith("(anonymous", i):
            return name[:i].removeprefix("void ")
    return name
