"""A decode layer as its CUDA graph runs it: whole, in one chain, and site by site from device time stamps"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.graph import DecodeGraph, fixed_step, limit_for
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.graph_clock import SiteClock
from dsv4_bench.probes.nvtx import site_range
from dsv4_bench.workbench.timing.capturing import LayerInput, Pass
from dsv4_bench.workbench.timing.cuda_clock import CudaClock

_ROUNDS, _REPLAYS = 4, 8  # positions go on with every replay, and are put back after a round
RANGE = "graph"  # the NVTX range around the launch of a graph


def decode_step(model: Transformer, step: Step, cache: Any) -> Step:
    """`step`, one token a sequence, as a CUDA graph is captured with it: shapes for what may come.

    Raises CannotAnswer off a GPU.
    """
    if model.device.type != "cuda":
        raise CannotAnswer(
            f"--graph times CUDA graphs, and the model is on {model.device}", "leave it out"
        )
    fixed = fixed_step(model, cache, limit_for(max(cache.lengths) + 1), step.tokens)
    fixed.advance()
    return fixed


@torch.inference_mode()
def time_graph(
    model: Transformer, kept: Pass, given: LayerInput, clock: CudaClock
) -> dict[str, Any]:
    """One layer's part of the decode graph.

    `seconds`: a replay with independent sites side by side, as `generate` runs it; `chain`: one after
    the other; `kernels` of it; `sites`: seconds of each in the chain, between time stamps on the
    device, less what a stamp takes. Weights and cache come from memory.
    """
    cache = kept.cache
    cache.layers[given.layer].restore(given.cache)
    layers = range(given.layer, given.layer + 1)
    tokens = kept.step.tokens.tolist()

    def replays(graph: DecodeGraph) -> list[float]:
        found = []
        for _ in range(_ROUNDS):
            graph.run(given.x, tokens)
            found += [clock.replay_seconds(graph.replay) for _ in range(_REPLAYS)]
        return found

    side_by_side = DecodeGraph(model, cache, layers)
    chain = DecodeGraph(model, cache, layers, branches=False)
    stamps = SiteClock(len(model.sites), model.device, _ROUNDS * (_REPLAYS + 1))
    stamped = DecodeGraph(model, cache, layers, clock=stamps, branches=False)
    replays(stamped)
    return {
        "layer": given.layer,
        "seconds": statistics.median(replays(side_by_side)),
        "chain": statistics.median(replays(chain)),
        "kernels": sum(map(bool, chain.nodes())),
        "sites": [
            {
                "site": t.path,
                "seconds": t.microseconds / 1e6,
                "spread": (t.high - t.low) / 1e6,
                "kernels": list(t.kernels),
            }
            for t in stamps.times(stamped)
        ],
    }


@torch.inference_mode()
def record_graph(model: Transformer, kept: Pass, given: LayerInput, repeats: int) -> None:
    """Capture and replay the layer for a profiler that records both."""
    kept.cache.layers[given.layer].restore(given.cache)
    graph = DecodeGraph(model, kept.cache, range(given.layer, given.layer + 1))
    tokens = kept.step.tokens.tolist()
    for _ in range(repeats):
        with site_range(RANGE):
            graph.run(given.x, tokens)
    torch.cuda.synchronize()
