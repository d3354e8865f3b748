"""Times the CUDA kernels beside torch's own, per op and shape, as a share of the memory or MMA floor.

    python tests/bench_cuda.py [GLOB ...] [--json OUT.json] [--compile] [--engines[=GLOB]] [--table NAME ...]

Each row also times what else computes it: torch's kernels and, with --engines, those of serving engines
where they are found (docs/peers.md). Figures in brackets were measured before, with the same method.

Method: every case is a list of calls on different buffers, more than 256 MB together (the L2 holds
60), random data, captured as one CUDA graph; time of a replay over its calls, median of nine. A call
is thus cold and includes its node's launch. floor = 1.75 us + bytes / 4.62 TB/s, the fit of one
cold-reading node on the H200, or FLOPs / 690 TFLOP/s where that is larger.

Cases come from the modules in TABLES, each with a function `cases() -> Iterator[Case]`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

TABLES = [
    "bench_cuda_linear",
    "bench_cuda_experts",
    "bench_cuda_attention",
    "bench_cuda_kv",
    "bench_cuda_dsl",
]
NODE_US, BYTES_PER_US, FLOPS_PER_US = 1.75, 4.62e6, 690e6
COLD_BYTES = 256 << 20
COMPILED = "compiled"  # in the name of a peer that torch.compile takes seconds to make: --compile

Call = Callable[[], Any]


@dataclass
class Case:
    """One op at one shape. `make(i)` returns a call with buffers of its own; so do the peers'.

    `bytes` and `flops` are of one call. `published` are figures measured elsewhere, in microseconds,
    by label; `least` and `aim` are the project's targets.
    """

    op: str
    shape: str
    bytes: int
    flops: int
    make: Callable[[int], Call]
    peers: dict[str, Callable[[int], Call]] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    least: float | None = None
    aim: float | None = None
    copies: int | None = None  # how many different calls; None: enough to be cold

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    @property
    def floor(self) -> float:
        return max(NODE_US + self.bytes / BYTES_PER_US, self.flops / FLOPS_PER_US)

    def count(self) -> int:
        return self.copies or max(4, min(256, -(-COLD_BYTES // max(self.bytes, 1))))


def time_calls(calls: Sequence[Call], regions: int = 9) -> tuple[float, float]:
    """Median and spread ((max - min) / median) of microseconds a call, in a graph."""
    for call in calls:  # also what a first call sets up: builds, tables
        call()
    torch.cuda.synchronize()
    launches = max(1, 48 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(launches) for call in calls]
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1000 / times

    replay(1)
    times = max(1, int(3000 / max(replay(2), 1)))
    found = [replay(times) / len(kept) for _ in range(regions)]
    middle = statistics.median(found)
    return middle, (max(found) - min(found)) / middle


def measure(case: Case) -> dict[str, Any]:
    """One row of the table; a peer that fails is named with its error."""
    count = case.count()
    calls = [case.make(i) for i in range(count)]
    microseconds, spread = time_calls(calls)
    del calls
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "us": round(microseconds, 2),
        "spread": round(spread, 3),
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_us": round(case.floor, 2),
        "share_of_floor": round(case.floor / microseconds, 3),
        "terabytes_per_s": round(case.bytes / microseconds / 1e6, 2),
        "peers_us": {},
        "published_us": case.published,
        "least_us": case.least,
        "aim_us": case.aim,
    }
    for name, make in case.peers.items():
        try:
            row["peers_us"][name] = round(time_calls([make(i) for i in range(count)])[0], 2)
        except Exception as error:
            row["peers_us"][name] = f"failed: {str(error).splitlines()[0][:120]}"
    gc.collect()
    torch.cuda.empty_cache()
    return row


def cases(patterns: Sequence[str], tables: Sequence[str] = TABLES) -> list[Case]:
    """The cases of `tables` whose name matches one of the patterns; all without patterns."""
    found: list[Case] = []
    for table in tables:
        if importlib.util.find_spec(table) is not None:
            found += importlib.import_module(table).cases()
    return [c for c in found if not patterns or any(fnmatch(c.name, p) for p in patterns)]


def describe_device() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.date.today().isoformat(),
    }


def line(row: dict[str, Any]) -> str:
    here = [f"{k} {v}" for k, v in row["peers_us"].items()]
    peers = "  ".join([*here, *(f"({k} {v})" for k, v in row["published_us"].items())])
    goal = f"{row['least_us'] or '-'}/{row['aim_us'] or '-'}"
    return (
        f"{row['op']:<14} {row['shape']:<34} {row['us']:>9.2f} us  floor {row['floor_us']:>8.2f}"
        f" {100 * row['share_of_floor']:>4.0f}%  {row['terabytes_per_s']:>5.2f} TB/s"
        f"  goal {goal:<10} {peers}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="globs of '<op> <shape>'")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile", action="store_true", help="peers under torch.compile too")
    engines = "peers of serving engines too, those whose label matches GLOB (write --engines=GLOB)"
    parser.add_argument("--engines", nargs="?", const="*", metavar="GLOB", help=engines)
    parser.add_argument("--table", action="append", choices=TABLES, help="only these cases")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda: torch sees no CUDA device", file=sys.stderr)
        return 3
    found = cases(args.patterns, args.table or TABLES)
    report = {**describe_device(), "rows": []}
    if args.engines:
        peers = importlib.import_module("bench_peers")
        report["left_out"] = peers.attach(found, args.engines)
        report["peer_errors"] = peers.ERRORS  # relative, of each peer's first call
        for label, reason in report["left_out"].items():
            print(f"without {label}: {reason}", file=sys.stderr)
    for case in found:
        if not args.compile:
            case.peers = {k: v for k, v in case.peers.items() if COMPILED not in k}
        try:
            row = measure(case)
        except Exception as error:  # one broken case must not cost the others
            print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr)
            if "CUDA error" in str(error):
                return 5
            continue
        report["rows"].append(row)
        print(line(row), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
