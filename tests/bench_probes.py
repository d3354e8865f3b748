"""Times probes on a GPU: in the graph of a V4-Flash decode layer, op by op, and the reduction alone.

    python tests/bench_probes.py [--kinds CSA] [--batch 1,64] [--context 4096] [--copies 4,1]
        [--observers stats,reduced,default,exponents,clock] [--rows layer,model,eager,tensor] [--json OUT.json]

`default` are all default probes that work in a graph, `reduced` those without the softmax probe, which has
a launch of its own; `unfused` is the graph without an observer whose sites have a launch each.
Method: `layer` rows replay the same layers captured with and without an observer, in turns, random
weights and caches, as bench_cuda_layer.py does, in regions over which every window closes; ratio = time
of the layers with / without. A graph of one layer waits for its last statistics, as the last of several
does; those of the others run beside the next layer. The `model` row is a token of all 43 layers with
embedding and head at batch 1; eight sets of experts serve them. `eager` rows are wall time of the same
layers launched one by one. `tensor` rows are one tensor: a graph of copies over buffers that rotate
beyond the L2; torch's own isnan, isinf, amax, square().mean() with .item() each are wall time.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cuda import describe_device
from bench_cuda_layer import KINDS, REPLAYS, milliseconds, time_graph
from gpu_weights import filled_cache, layers_of, random_model
from torch import Tensor

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda
from dsv4_bench.engine.config import FLASH
from dsv4_bench.engine.graph import DecodeGraph
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.probes.base import make_probes
from dsv4_bench.probes.graph_clock import SiteClock, stamp_cost
from dsv4_bench.probes.graph_watch import GraphWatch, split
from dsv4_bench.probes.observation import Watch
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.session import DEFAULT_PROBES

MOST = 1.05  # of the graph's time, for the default probes
TURNS_MS = 1500  # of all regions, unless three take longer
GRAPH_PROBES = [probe.name for probe in split(make_probes(DEFAULT_PROBES))[0]]


# ------------------------------------------------------------------------------ in the graph


def replays_for(kind: str, batch: int) -> int:
    """Of a region; every window closes in it, and launching the first is little of its time."""
    return max(KINDS[kind], REPLAYS if batch <= 8 else REPLAYS // 4)


def in_turns(graphs: dict[str, DecodeGraph], replays: int) -> dict[str, float]:
    """Microseconds of a replay of each, median of three to seven regions taken in turns."""
    once = sum(milliseconds(graph, 8) / 8 for graph in graphs.values())
    rounds = max(3, min(7, int(TURNS_MS / once / replays)))
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            found[name].append(1000 * milliseconds(graph, replays) / replays)
    return {name: statistics.median(times) for name, times in found.items()}


def layer_row(
    model: Transformer, kind: str, batch: int, context: int, wanted: Sequence[str]
) -> dict[str, Any]:
    layers = range(len(model.layers))
    reduced = [name for name in GRAPH_PROBES if name != "softmax"]
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "stats": lambda: {"observer": watch(model, ["stats", "nonfinite"], batch)},
        "reduced": lambda: {"observer": watch(model, reduced, batch)},
        "default": lambda: {"observer": watch(model, GRAPH_PROBES, batch)},
        "exponents": lambda: {"observer": watch(model, [*GRAPH_PROBES, "exponents"], batch)},
        "clock": lambda: {"clock": SiteClock(len(model.sites), model.device)},
        "unfused": lambda: {"fuse": False},
    }
    observers = {"without": {}, **{name: makers[name]() for name in wanted}}
    cache = filled_cache(model, batch, context, 640)
    graphs = {name: DecodeGraph(model, cache, layers, **keys) for name, keys in observers.items()}
    between = time_graph(DecodeGraph(model, cache, range(0)))[0]
    for graph in graphs.values():
        graph._x.normal_()
    times = in_turns(graphs, replays_for(kind, batch))
    each = {name: (us - between) / len(layers) for name, us in times.items()}
    without = each.pop("without")
    observer = observers["default"]["observer"]
    readings, fetch = fetched(graphs["default"], observer)
    return {
        **{"what": "layer", "layer": kind, "batch": batch, "context": context},
        **{"layers": len(layers), "us": round(without, 2)},
        **{"with_us": {name: round(us, 2) for name, us in each.items()}},
        **{"ratio": {name: round(us / without, 4) for name, us in each.items()}},
        **{
            "most": {"default": MOST},
            "probes": GRAPH_PROBES,
            "answers": len(observer._slots) // len(layers),
        },
        **{"readings": readings // len(layers), "fetch_us": round(fetch, 1)},
        **{"sites": len(graphs["without"].sites()) // len(layers)},
    }


def model_row(context: int) -> dict[str, Any]:
    model = random_model(FLASH, banks=8)
    model.set_route(parse_route(["kernel"]))
    cache, observer = filled_cache(model, 1, context, 640), watch(model, GRAPH_PROBES, 1)
    graphs = {"without": DecodeGraph(model, cache)}
    graphs["default"] = DecodeGraph(model, cache, observer=observer)
    times = in_turns(graphs, REPLAYS)
    readings, fetch = fetched(graphs["default"], observer)
    return {
        **{"what": "model", "layers": len(model.layers), "batch": 1, "context": context},
        **{name: round(us, 1) for name, us in times.items()},
        **{"ratio": round(times["default"] / times["without"], 4), "most": MOST},
        **{"readings": readings, "fetch_us": round(fetch, 1)},
    }


def fetched(graph: DecodeGraph, observer: GraphWatch) -> tuple[int, float]:
    """Readings of a step, and the microseconds that fetching and explaining them takes."""
    observer.readings()
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    readings = observer.readings()
    return len(readings), 1e6 * (time.perf_counter() - began)


def watch(model: Transformer, names: Sequence[str], batch: int) -> GraphWatch:
    return GraphWatch(make_probes(names), len(model.sites), model.device, batch)


# ------------------------------------------------------------------------------ op by op


@torch.inference_mode()
def eager_row(model: Transformer, kind: str, batch: int, context: int) -> dict[str, Any]:
    """Wall microseconds a layer, launched one by one, with readings fetched at the end."""
    found = {}
    for name, probes in (("without", []), ("graph's", GRAPH_PROBES), ("default", DEFAULT_PROBES)):
        cache = filled_cache(model, batch, context, 256)
        observer = Watch(make_probes(probes)) if probes else None
        set_taps(model.sites.values(), observer)
        times = []
        for _ in range(10):
            x = torch.randn(batch, 4, model.config.hidden_size, device="cuda", dtype=model.dtype)
            step = cache.step([[1]] * batch)
            _ = step.positions, step.ring_slots, step.ring_rows
            torch.cuda.synchronize()
            began = time.perf_counter()
            for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
                x = layer(x, layer_cache, step)
            if observer is not None:
                observer.flush()
            torch.cuda.synchronize()
            times.append(1e6 * (time.perf_counter() - began) / len(model.layers))
            cache.advance(step)
        found[name] = round(statistics.median(times[3:]), 1)
        set_taps(model.sites.values(), None)
    without = found.pop("without")
    ratio = {name: round(us / without, 2) for name, us in found.items()}
    row = {"what": "eager", "layer": kind, "batch": batch, "context": context}
    return {**row, "us": without, "with_us": found, "ratio": ratio}


# ------------------------------------------------------------------------------ one tensor


def graph_us(run: Callable[[int], None], copies: int, replays: int = 50) -> float:
    """Microseconds of one of `copies` calls in a graph."""
    run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(copies):
            run(number)
    found = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        found.append(1000 * start.elapsed_time(stop) / replays / copies)
    return statistics.median(found)


def by_torch(x: Tensor) -> list[float]:
    return [
        x.isnan().sum().item(),
        x.isinf().sum().item(),
        x.abs().amax().item(),
        x.float().square().mean().item(),
    ]


def wall_us(run: Callable[[], Any], times: int = 20) -> float:
    for _ in range(5):
        run()
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - began))
    return statistics.median(found)


def tensor_row(shape: tuple[int, ...], exponents: bool = False) -> dict[str, Any]:
    """The fused reduction of one bfloat16 tensor."""
    size = 2 * torch.Size(shape).numel()
    copies = max(8, min(256, (120 << 20) // size))
    tensors = [torch.randn(shape, device="cuda").bfloat16() for _ in range(copies)]
    views = [view for tensor in tensors if (view := cuda.stats.moments_view(tensor)) is not None]
    ring = cuda.stats.Ring(torch.device("cuda"), 1, exponents=exponents)
    alone = graph_us(lambda i: ring.launch([views[i]]), copies)

    def eager() -> list[float]:
        ring.forget()
        ring.launch(views[:1])
        values: list[float] = ring.values[0].tolist()
        return values

    name = "x".join(map(str, shape)) + (" with exponents" if exponents else "")
    bandwidth = size / alone / 1e6
    return {
        **{"what": "tensor", "shape": name, "us": round(alone, 2)},
        **{"terabytes_per_s": round(bandwidth, 3), "launch_and_fetch_us": round(wall_us(eager), 1)},
        **{"torch_us": round(wall_us(lambda: by_torch(tensors[0])), 1)},
    }


def line(row: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value}" for name, value in row.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default="CSA")
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--context", default="4096")
    parser.add_argument("--copies", default="4,1")
    parser.add_argument("--observers", default="reduced,default,unfused,clock")
    parser.add_argument("--rows", default="layer,eager,tensor", help="which kinds of rows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_probes: torch sees no CUDA device", file=sys.stderr)
        return 3
    report: dict[str, Any] = {**describe_device(), "rows": []}

    def add(row: dict[str, Any]) -> None:
        print(line(row), flush=True)
        report["rows"].append(row)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    add({"what": "stamp", "us": round(stamp_cost(torch.device("cuda")), 3)})
    wanted = args.rows.split(",")
    for kind, copies in itertools.product(args.kinds.split(","), args.copies.split(",")):
        if not {"layer", "eager"} & set(wanted):
            break
        model = random_model(layers_of((KINDS[kind],) * int(copies)))
        model.set_route(parse_route(["kernel"]))
        for context, batch in itertools.product(args.context.split(","), args.batch.split(",")):
            sizes = (model, kind, int(batch), int(context))
            if "layer" in wanted:
                add(layer_row(*sizes, args.observers.split(",")))
            if "eager" in wanted and batch == "1":
                add(eager_row(*sizes))
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if "model" in wanted:
        add(model_row(4096))
    for shape in ((1, 4096), (64, 4096), (4096, 4096), (4096, 32768)) if "tensor" in wanted else ():
        add(tensor_row(shape))
    if "tensor" in wanted:
        add(tensor_row((4096, 4096), exponents=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
