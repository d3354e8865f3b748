"""Times whole decode layers of V4-Flash's sizes in a CUDA graph, beside the eager route and transformers.

    python tests/bench_cuda_layer.py [--kinds CSA,HCA,SWA] [--batch 1,8,64] [--context 4096,65536]
        [--layout nvfp4] [--copies 3] [--sites] [--peers] [--model] [--json OUT.json]

Method: a model of `copies` layers of one kind with random weights (a layer reads at least 120 MB, the
L2 holds 60), its cache filled as after `context` tokens, captured as one graph from residual streams to
residual streams. A region is 128 replays, so that every window closes as often as in use; median
of three to seven regions over the layers, less a graph that only advances the step. `chain` is the same graph with the sites one after another. With --sites the
profiler's times of that chain are given to the sites: from the end of the site before to its own. With
--peers transformers' layer of the first kind is timed at batch 1, context 4096, launch by launch as is the
eager route.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_cuda import describe_device
from gpu_weights import filled_cache, layers_of, random_model

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.config import CSA_RATIO, FLASH, HCA_RATIO
from dsv4_bench.engine.graph import DecodeGraph
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route

KINDS = {"SWA": 0, "CSA": CSA_RATIO, "HCA": HCA_RATIO}
LEAST_US, AIM_US = 180, 110  # CSA, batch 1, context 4096
REPLAYS = 128
HOLD = 6_000_000  # cycles, 3 ms: until all replays of a region are queued


def milliseconds(graph: DecodeGraph, times: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.step.positions.copy_(torch.tensor(graph.cache.lengths) - 1)
    torch.cuda._sleep(HOLD)  # else the host sets the pace of a graph of one kernel
    start.record()
    for _ in range(times):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def time_graph(graph: DecodeGraph) -> tuple[float, float]:
    """Median and spread of a replay's microseconds, of three to seven regions."""
    regions = int(1500 / milliseconds(graph, REPLAYS))
    found = [1000 * milliseconds(graph, REPLAYS) / REPLAYS for _ in range(max(3, min(7, regions)))]
    middle = statistics.median(found)
    return middle, (max(found) - min(found)) / middle


@torch.inference_mode()
def time_eager(model: Transformer, batch: int, context: int, times: int = 12) -> float:
    """Wall microseconds a layer of the same kernels launched one by one."""
    cache = filled_cache(model, batch, context, 256)
    x = torch.randn(batch, 4, model.config.hidden_size, device="cuda", dtype=model.dtype)
    found = []
    for _ in range(times):
        step = cache.step([[1]] * batch)
        _ = step.positions, step.ring_slots, step.ring_rows
        torch.cuda.synchronize()
        began = time.perf_counter()
        y = x
        for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
            y = layer(y, layer_cache, step)
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - began) / len(model.layers))
        cache.advance(step)
    return statistics.median(found[2:])


def site_times(graph: DecodeGraph, layers: int, replays: int = 8) -> dict[str, float]:
    """Device microseconds by site of a chain, mean over layers and replays."""
    from torch.profiler import ProfilerActivity, profile

    milliseconds(graph, 4)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        milliseconds(graph, replays)
    events = [
        e for e in recorded.profiler.kineto_results.events() if e.device_type().name == "CUDA"
    ]
    kernels = [e for e in events if "Memcpy HtoD" not in e.name()]
    spans = sorted(e.start_ns() + e.duration_ns() for e in kernels)
    per_replay = len(graph.nodes())
    if len(spans) != replays * per_replay:
        raise RuntimeError(f"{len(spans)} device events, not {replays} x {per_replay} nodes")
    totals: dict[str, float] = {}
    owner = ["(between)"] * per_replay
    for path, first, count in graph.sites():
        owner[first : first + count] = [path.split("/", 1)[1]] * count
    for replay in range(replays):
        ends = spans[replay * per_replay : (replay + 1) * per_replay]
        for node in range(1, per_replay):
            name = owner[node]
            totals[name] = totals.get(name, 0) + (ends[node] - ends[node - 1]) / 1000
    return {name: round(total / replays / layers, 2) for name, total in totals.items()}


def measure(model: Transformer, kind: str, batch: int, context: int, args: Any) -> dict[str, Any]:
    layers = len(model.layers)
    cache = filled_cache(model, batch, context, 640)
    between = time_graph(DecodeGraph(model, cache, range(0)))[0]  # a step's own index tensors
    row: dict[str, Any] = {"layer": kind, "batch": batch, "context": context}
    for name, branches in (("us", True), ("chain_us", False)):
        graph = DecodeGraph(model, cache, range(layers), branches=branches)
        graph._x.normal_()
        whole, spread = time_graph(graph)
        row[name] = round((whole - between) / layers, 2)
        row.setdefault("spread", round(spread, 4))
    row["nodes"] = round(len(graph.nodes()) / layers, 1)
    row["step_us"] = round(between, 1)
    if args.sites:
        try:
            row["sites_us"] = site_times(graph, layers)
        except Exception as error:
            row["sites_us"] = {"failed": str(error)}
    del graph
    row["eager_us"] = round(time_eager(model, batch, context), 1)
    if (kind, batch, context) == ("CSA", 1, 4096):
        row["least_us"], row["aim_us"] = LEAST_US, AIM_US
    return row


@torch.inference_mode()
def transformers_layer(kind: str, batch: int, context: int) -> dict[str, float]:
    """Wall microseconds of transformers' decoder layer in bfloat16, eager, decoding one token."""
    from oracle import transformers_config
    from transformers import DeepseekV4ForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            theirs = DeepseekV4ForCausalLM(transformers_config(layers_of((KINDS[kind],)))).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.02)
    found: list[float] = []
    began = 0.0

    def before(*_: Any) -> None:
        nonlocal began
        torch.cuda.synchronize()
        began = time.perf_counter()

    def after(*_: Any) -> None:
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - began))

    layer = theirs.model.layers[0]
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
    ids = torch.randint(4096, (batch, context), device="cuda")
    past = theirs(ids, use_cache=True, logits_to_keep=1).past_key_values
    for _ in range(12):
        theirs(ids[:, :1], past_key_values=past, use_cache=True)
    return {"transformers eager": round(statistics.median(found[3:]), 1)}


def whole_model(layout: str, context: int) -> dict[str, Any]:
    """A token of the 43 layers with embedding and head, batch 1; eight sets of experts serve them all."""
    model = random_model(FLASH, layout, banks=8)
    model.set_route(parse_route(["kernel"]))
    graph = DecodeGraph(model, filled_cache(model, 1, context, 640))
    microseconds, spread = time_graph(graph)
    return {
        "layer": "all 43, embedding and head",
        "batch": 1,
        "context": context,
        "us": round(microseconds, 1),
        "spread": round(spread, 4),
        "nodes": len(graph.nodes()),
        "tokens_per_s": round(1e6 / microseconds, 1),
    }


def line(row: dict[str, Any]) -> str:
    peers = "  ".join(f"{name} {us}" for name, us in row.get("peers_us", {}).items())
    return (
        f"{row['layer']} b{row['batch']:<3} {row['context']:>6}  {row['us']:>8.1f} us"
        f"  chain {row.get('chain_us', '-'):>8}  eager {row.get('eager_us', '-'):>8}"
        f"  {row['nodes']} nodes  {peers}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default="CSA,HCA,SWA")
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", default="4096,65536")
    parser.add_argument("--layout", default="nvfp4")
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--sites", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument(
        "--model", action="store_true", help="all 43 layers with embedding and head"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda_layer: torch sees no CUDA device", file=sys.stderr)
        return 3
    report = {**describe_device(), "layout": args.layout, "rows": []}
    if args.model:
        report["rows"].append(whole_model(args.layout, 4096))
        print(line(report["rows"][0]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        return 0
    for kind in args.kinds.split(","):
        model = random_model(layers_of((KINDS[kind],) * args.copies), args.layout)
        model.set_route(parse_route(["kernel"]))
        rows = []
        for context in map(int, args.context.split(",")):
            for batch in map(int, args.batch.split(",")):
                rows.append(measure(model, kind, batch, context, args))
                print(line(rows[-1]), flush=True)
                for name, us in rows[-1].get("sites_us", {}).items():
                    print(f"    {name:<32} {us}")
                gc.collect()
                torch.cuda.empty_cache()
                report["rows"] += rows[-1:]
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()
        if args.peers and kind == args.kinds.split(",")[0]:
            try:
                rows[0]["peers_us"] = transformers_layer(kind, 1, 4096)
            except Exception as error:
                text = (str(error).splitlines() or [""])[0]
                rows[0]["peers_us"] = {"transformers eager": f"failed: {text[:160]}"}
            print(kind, rows[0]["peers_us"], flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
            gc.collect()
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
