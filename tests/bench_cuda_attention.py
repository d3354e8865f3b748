"""Times the CUDA kernels of attention, hyper-connections, indexer and compressor, cold.

    python tests/bench_cuda_attention.py OUT.json [NAME ...]

One launch's time is that of a CUDA graph of many, divided: random data, buffers that rotate through
more than the L2 holds, median of the regions. Bytes and FLOPs are those of the op's contract. The
floor is 1.75 us + bytes / 4.62 TB/s, or FLOPs / 690 TFLOP/s where that is more; target: what an H200
is to reach.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsv4_bench.engine.cuda  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS
from dsv4_bench.engine.step import Step

COLD = 300 << 20  # bytes that the buffers of one case hold at least
REGIONS = 9
REGION_US = 3000


@dataclass(frozen=True)
class Case:
    """`make(i)` gives positional and keyword arguments of call number i, on fresh random data."""

    op: str
    shape: str
    target: float  # us
    make: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    sets: int = 0  # how many different calls; 0: as many as COLD needs


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def hyper_cases(d: int, targets: dict[int, tuple[float, float]]) -> Iterator[Case]:
    f32 = torch.float32
    for n, (pre, post) in targets.items():

        def make_pre(_: int, n: int = n) -> tuple[tuple[Any, ...], dict[str, Any]]:
            fn = randn(24, 4 * d, dtype=f32) * (4 * d) ** -0.5
            constants = {"scale": torch.rand(3, device="cuda"), "base": randn(24, dtype=f32)}
            eps = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
            return (randn(n, 4, d),), {"fn": fn, **constants, **eps}

        def make_post(_: int, n: int = n) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (
                randn(n, d),
                randn(n, 4, d),
                randn(n, 4, dtype=f32),
                randn(n, 4, 4, dtype=f32),
            ), {}

        yield Case("hc_pre", f"n={n} d={d}", pre, make_pre)
        yield Case("hc_post", f"n={n} d={d}", post, make_post)


def attention_cases() -> Iterator[Case]:
    pools: list[Tensor] = []

    def make(n: int, heads: int, widths: tuple[int, int], rows: int) -> Any:
        def arguments(_: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if not pools:
                pools.extend(randn(rows, 512) for rows in (150_000, 400_000))
            pool = [whole[: rows or len(whole)] for whole in pools]
            index = [
                torch.randint(0, len(keys), (n, width), device="cuda", dtype=torch.int32)
                for keys, width in zip(pool, widths, strict=True)
            ]
            sink = randn(heads, dtype=torch.float32)
            q = randn(n, heads, 512)
            return (q, pool[0], index[0], pool[1], index[1]), {"sink": sink, "scale": 512**-0.5}

        return arguments

    for n, target in ((1, 16), (8, 18), (64, 52), (256, 110)):
        yield Case("attention", f"n={n} h=64 128+512", target, make(n, 64, (128, 512), 0), 48)
    for n in (1, 64):
        yield Case("attention", f"n={n} h=64 128+64", 0, make(n, 64, (128, 64), 0), 48)
        yield Case("attention", f"n={n} h=128 128+1024", 0, make(n, 128, (128, 1024), 0), 48)
    yield Case(
        "attention", "n=4096 h=64 128+512 of 5120", 1100, make(4096, 64, (128, 512), 5120), 3
    )


def indexer_cases() -> Iterator[Case]:
    def step_of(batch: int, entries: int) -> Step:
        tokens = torch.zeros(batch, dtype=torch.int64, device="cuda")
        step = Step(tokens, (4 * entries - 1,) * batch, (1,) * batch, 128)
        _ = step.sequence, step.positions  # made once a step
        return step

    for batch, entries, target in ((1, 16384, 0), (1, 262144, 0), (8, 16384, 0), (64, 16384, 0)):

        def make(_: int, batch: int = batch, entries: int = entries) -> Any:
            step = step_of(batch, entries)
            keys, q, weights = randn(batch, entries, 128), randn(batch, 64, 128), randn(batch, 64)
            return (q, keys, weights, step), {"scale": 0.01, "ratio": 4}

        yield Case("index_score", f"n={batch} T={entries}", target, make)
    for n, total, equal in (
        (1, 16384, 0),
        (1, 16384, 1),
        (1, 262144, 0),
        (1, 262144, 1),
        (64, 16384, 0),
    ):

        def make_topk(_: int, n: int = n, total: int = total, equal: int = equal) -> Any:
            score = randn(n, total, dtype=torch.float32)
            visible = torch.full((n,), total, device="cuda")
            return (score * 0 if equal else score, visible), {"k": 512}

        name = f"n={n} T={total} {'equal' if equal else 'random'}"
        yield Case("index_topk", name, 0, make_topk, 8)


def compressor_cases() -> Iterator[Case]:
    for ratio, start, n in (
        (4, 4095, 1),
        (4, 4094, 1),
        (128, 4095, 1),
        (128, 4094, 1),
        (4, 0, 4096),
    ):

        def make(_: int, ratio: int = ratio, start: int = start, n: int = n) -> Any:
            width, slots = (1024, 8) if ratio == 4 else (512, 128)
            f32 = torch.float32
            states = randn(1, slots, width, dtype=f32), randn(1, slots, width, dtype=f32)
            tokens = torch.zeros(n, dtype=torch.int64, device="cuda")
            step = Step(tokens, (start,), (n,), 128)
            inputs = randn(n, width, dtype=f32), randn(n, width, dtype=f32)
            return (*inputs, *states, step), {"ape": randn(ratio, width, dtype=f32)}

        yield Case("compressor", f"ratio={ratio} start={start} n={n}", 0, make, 48)


def all_cases() -> Iterator[Case]:
    yield from attention_cases()
    yield from indexer_cases()
    yield from compressor_cases()
    yield from hyper_cases(4096, {1: (9, 2), 64: (12, 3.5), 1024: (35, 24), 8192: (170, 165)})
    yield from hyper_cases(7168, {1: (0, 0), 1024: (0, 0)})


def median_us(calls: list[Callable[[], Any]]) -> float:
    """Time of one call in a graph of many, the median over regions."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()

    def graph_of(count: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(count):
                calls[i % len(calls)]()
        return graph

    def elapsed(graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1000 * begin.elapsed_time(end)

    count = max(4, len(calls))
    probe = graph_of(count)
    elapsed(probe)
    each = elapsed(probe) / count
    count = len(calls) * max(1, round(REGION_US / each / len(calls)))
    graph = graph_of(min(max(count, 4), 3000))
    count = min(max(count, 4), 3000)
    elapsed(graph)
    return statistics.median(elapsed(graph) / count for _ in range(REGIONS))


def measure(case: Case) -> dict[str, Any]:
    function, spec = IMPLEMENTATIONS[case.op]["sm90"].function, OPS[case.op]
    args, params = case.make(0)
    cost = spec.cost(args, params, function(*args, **params))
    sets = case.sets or min(256, max(4, -(-COLD // cost.bytes)))
    made = [(args, params), *(case.make(i) for i in range(1, sets))]
    us = median_us([lambda a=a, p=p: function(*a, **p) for a, p in made])
    floor = max(1.75 + cost.bytes / 4.62e6, cost.flops / 690e6)
    numbers = {"us": us, "bytes": cost.bytes, "flops": cost.flops, "floor_us": floor}
    return {"op": case.op, "shape": case.shape, "sets": sets, "target_us": case.target, **numbers}


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    torch.manual_seed(1)
    rows = []
    print(
        f"{'op':12} {'shape':32} {'us':>9} {'floor':>8} {'share':>6} {'target':>7}  TB/s  TFLOP/s"
    )
    for case in all_cases():
        if names and case.op not in names:
            continue
        row = measure(case)
        rows.append(row)
        us, floor = row["us"], row["floor_us"]
        print(
            f"{case.op:12} {case.shape:32} {us:9.2f} {floor:8.2f} {floor / us:6.2f} {case.target:7}  "
            f"{row['bytes'] / us / 1e6:5.2f} {row['flops'] / us / 1e6:7.1f}",
            flush=True,
        )
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": rows}
        out.write_text(json.dumps(report, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
