"""Times streamed weights on a GPU: host to device bandwidth, and how well copies hide behind layers.

    python tests/bench_streaming.py [--json OUT.json] [--megabytes 512]

Streamed layers of random bytes go through the engine's own `Streamer`; their computation is a chain of
matrix products, tuned to take a chosen share of a copy. Ideal is max(copy, computation) a layer.
Times are of the host's clock around two passes that end synchronised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine.streaming import CudaCopies, HostLayer, Streamer, pinned

LAYERS, PASSES = 4, 2


def seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Median of the wall time of `work` with what it launches."""
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def streamer_of(size: int, allocate: Callable[[int], torch.Tensor | None]) -> Streamer:
    copies = CudaCopies(torch.device("cuda", torch.cuda.current_device()))
    buffers, layers = copies.buffers(size), []
    random = torch.randint(0, 255, (1 << 20,), dtype=torch.uint8).repeat(-(-size // (1 << 20)))
    for number in range(LAYERS):
        layer = HostLayer()
        layer.put(buffers[number % 2])(random[:size])
        layer.gather(allocate)
        layers.append(layer)
    return Streamer(layers, buffers, copies)


def computation(duration: float) -> Callable[[], None]:
    """A chain of matrix products that takes about `duration` seconds."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    b, out = torch.randn_like(a), torch.empty_like(a)
    torch.mm(a, b, out=out)
    one = seconds(lambda: [torch.mm(a, b, out=out) for _ in range(20)]) / 20
    count = max(1, round(duration / one))
    return lambda: [torch.mm(a, b, out=out) for _ in range(count)] and None


def measure(size: int, kind: str, allocate: Callable[[int], torch.Tensor | None]) -> dict[str, Any]:
    streamer = streamer_of(size, allocate)
    copy = seconds(lambda: streamer.layers[0].copy_to(streamer.buffers[0]))
    row: dict[str, Any] = {
        "memory": kind,
        "bytes": size,
        "copy_ms": round(copy * 1e3, 3),
        "gigabytes_per_s": round(size / copy / 1e9, 2),
        "overlap": [],
    }
    for share in (0.25, 1.0, 2.0):
        compute = computation(share * copy)
        alone = seconds(compute)

        def passes(compute: Callable[[], None] = compute) -> None:
            for _ in range(PASSES):
                for number in range(LAYERS):
                    with streamer.loaded(number):
                        compute()

        layer = seconds(passes, 3) / (PASSES * LAYERS)
        ideal = max(copy, alone)
        found = {"compute_ms": alone, "layer_ms": layer, "ideal_ms": ideal, "sum_ms": copy + alone}
        row["overlap"].append({name: round(value * 1e3, 3) for name, value in found.items()})
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--megabytes", type=int, default=512)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_streaming: torch sees no CUDA device", file=sys.stderr)
        return 3
    rows = []
    for kind, allocate in (("pinned", pinned), ("pageable", lambda size: None)):
        row = measure(args.megabytes << 20, kind, allocate)
        rows.append(row)
        print(f"{kind}: {row['copy_ms']} ms a copy, {row['gigabytes_per_s']} GB/s")
        for one in row["overlap"]:
            print("  " + "  ".join(f"{name} {value}" for name, value in one.items()), flush=True)
    if args.json:
        document = {"device": torch.cuda.get_device_name(), "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
