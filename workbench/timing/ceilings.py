"""What this machine can do at most: bandwidth and matrix rate, measured once and kept

A site's floor is the larger of its bytes over the read bandwidth and its operations over the matrix
rate of its dtype, plus what any kernel costs. Nothing here is a data sheet's number.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine.demo import cache_folder
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.timing.clock import make_clock

SCHEMA_VERSION = 1
_CPU_BYTES, _GPU_BYTES = 256 << 20, 2 << 30
_ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """`read`, `copy` in bytes per second (a copy's reads and writes both counted); `matrix` in
    floating-point operations per second by dtype; `launch` seconds of a kernel that does nothing."""

    device: str
    threads: int
    torch: str
    read: float
    copy: float
    launch: float
    matrix: dict[str, float] = field(default_factory=dict)
    measured: str = ""

    def floor(self, nbytes: int, flops: int, dtype: str) -> float:
        """Seconds below which no kernel for this work can stay on this machine."""
        rate = self.matrix.get(dtype) or max(self.matrix.values())
        return self.launch + max(nbytes / self.read, flops / rate)

    def bound(self, nbytes: int, flops: int, dtype: str) -> str:
        """Which of the two the floor comes from: memory or compute."""
        rate = self.matrix.get(dtype) or max(self.matrix.values())
        return "memory" if nbytes / self.read >= flops / rate else "compute"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def device_name(device: torch.device) -> str:
    """What the ceilings belong to: the GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def ceilings(device: torch.device, say: Callable[[str], None], fresh: bool = False) -> Ceilings:
    """The ceilings of this machine: from the cache, else measured now (some seconds) and kept.

    They are measured anew for another device, number of threads or torch, or when `fresh`.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    identity = (SCHEMA_VERSION, device_name(device), threads, torch.__version__)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    path = cache_folder() / "ceilings" / f"{key}.json"
    found = None if fresh else _read(path)
    if found is None:
        say("measuring what this machine can do")
        found = measure(device)
        _write(path, found)
    return found


def _read(path: Path) -> Ceilings | None:
    try:
        found = Ceilings(**json.loads(path.read_text()))
        positive = (found.read, found.copy, *found.matrix.values())
        return found if found.matrix and all(value > 0 for value in positive) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # none yet, or not ours: measured again


def _write(path: Path, found: Ceilings) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        part.replace(path)
    except OSError:
        pass  # a full or read-only cache only means measuring again next time


def measure(device: torch.device) -> Ceilings:
    """Measure now: best of a few rounds, since whatever else runs can only slow a round down."""
    gpu = device.type == "cuda"
    size = _GPU_BYTES if gpu else _CPU_BYTES
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    clock = make_clock(device)

    def best(call: Callable[[], Any]) -> float:
        timed = clock.prepare(lambda: call)
        return min(timed.sample() for _ in range(_ROUNDS))

    read = size / best(_reader(source))
    # Not copy_, which in a CUDA graph is a copy engine's work and half as fast.
    copy = 2 * size / best(lambda: torch.mul(source, 1, out=target))
    one = torch.zeros(1, device=device)
    node = clock.prepare(lambda: lambda: one.add_(1), [one])
    launch = statistics.median(node.sample() for _ in range(20)) if gpu else 0.0
    return Ceilings(
        device=device_name(device),
        threads=0 if gpu else torch.get_num_threads(),
        torch=torch.__version__,
        read=read,
        copy=copy,
        launch=launch,
        matrix=_matrix_rates(device, best),
        measured=time.strftime("%Y-%m-%d"),
    )


def _reader(source: torch.Tensor) -> Callable[[], Any]:
    """A pass that reads `source`: our own read loop, else a sum."""
    if source.device.type == "cuda":
        from dsv4_bench.engine import cuda

        if cuda.timing.available():
            sink = torch.zeros(1, dtype=torch.int32, device=source.device)
            return lambda: cuda.timing.read_pass(source, sink)
    else:
        import dsv4_bench.engine.cpu as cpu

        try:
            cpu.read_bandwidth_pass(source)
            return lambda: cpu.read_bandwidth_pass(source)
        except DSV4Error:
            pass  # no compiler here
    return source.sum


def _matrix_rates(
    device: torch.device, best: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """FLOP/s of square products; random values, since zeros run faster than real data."""
    n = 8192 if device.type == "cuda" else 1024
    rates = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(n, n, device=device).to(getattr(torch, name))
        rates[name] = 2 * n**3 / best(lambda a=a: a @ a)  # type: ignore[misc]
    if device.type == "cuda":
        rates["float8"] = 2 * n**3 / best(_fp8_product(n, device))
    return rates


def _fp8_product(n: int, device: torch.device) -> Callable[[], Any]:
    a = torch.randn(n, n, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, a.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
