"""One profile from start to end: capture, ceilings, every site, every layer whole"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4_bench.engine.cache import Cache
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site, matches, select_sites
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.judge import Judge
from dsv4_bench.probes.nvtx import site_range
from dsv4_bench.workbench.timing import document as documents
from dsv4_bench.workbench.timing.capturing import Pass, capture_pass
from dsv4_bench.workbench.timing.ceilings import Ceilings, ceilings
from dsv4_bench.workbench.timing.clock import Clock, make_clock
from dsv4_bench.workbench.timing.cuda_clock import CudaClock
from dsv4_bench.workbench.timing.graphs import decode_step, record_graph, time_graph
from dsv4_bench.workbench.timing.layers import time_layer
from dsv4_bench.workbench.timing.nsys import MEASURE
from dsv4_bench.workbench.timing.sites import (
    Effort,
    SiteTime,
    learn,
    run_counted,
    run_recorded,
    time_site,
)

Say = Callable[[str], None]
_RECORDED = 5  # runs of every op that nsys records


@dataclass(frozen=True)
class Request:
    """What to time: sites of `layers` (or those under `sites`), in which kind of forward pass."""

    layers: tuple[int, ...]
    sites: str
    phase: str
    effort: Effort
    fresh_ceilings: bool = False
    kernels_shown: bool = False
    graph: bool = False  # the step of a CUDA graph, and the graph of every layer
    recorded: bool = False  # by nsys, which gets runs of every op for itself


def wanted(model: Transformer, request: Request) -> Callable[[Site], bool]:
    """The sites a request means. Raises DSV4Error when there are none."""
    under = {site.path for site in select_sites(model.sites.values(), request.sites or "*")}

    def test(site: Site) -> bool:
        in_layers = not request.layers or site.layer in request.layers
        return in_layers and site.path in under

    if not any(map(test, model.sites.values())):
        some = next(p for p in model.sites if matches(p, request.sites))
        raise DSV4Error(
            f"no site of {request.sites!r} lies in the layers asked for", f"there is {some}"
        )
    return test


def profile(
    model: Transformer, tokens: list[list[int]], request: Request, say: Say
) -> dict[str, Any]:
    """Time the sites of `request` on `tokens` (one list a sequence); see document.report.

    Raises CannotAnswer while something else observes the model: its time would be counted.
    """
    if any(site.tap is not None for site in model.sites.values()):
        raise CannotAnswer(
            "probes or a recorder are on: they would be timed", "turn them off first"
        )
    ceiling = ceilings(model.device, say, request.fresh_ceilings)
    kept = _capture(model, tokens, request, say)
    clock, judge = make_clock(model.device), Judge(model.dtype)
    rows = []
    say("limits of the errors")
    for call in kept.calls:
        learn(model, call, judge)
    for number, call in enumerate(kept.calls):
        say(f"{call.site.path} ({number + 1} of {len(kept.calls)})")
        alone = not request.recorded  # one profiler at a time
        rows.append(time_site(model, call, clock, ceiling, judge, request.effort, alone))
    whole = _whole(model, kept, rows, clock, request)
    if request.recorded:
        with torch.inference_mode(), site_range(MEASURE):  # what nsys waits for
            run_recorded(model, kept.calls, _RECORDED)
            for given in kept.layers if request.graph else ():
                record_graph(model, kept, given, _RECORDED)
    return _document(model, tokens, request, ceiling, rows, whole)


def count(model: Transformer, tokens: list[list[int]], request: Request, say: Say) -> int:
    """Run the ops of `request` for ncu, which looks on; how many ops. Nothing is timed."""
    kept = _capture(model, tokens, request, say)
    with torch.inference_mode():
        run_counted(model, kept.calls, CudaClock())
    return len(kept.calls)


def _capture(model: Transformer, tokens: list[list[int]], request: Request, say: Say) -> Pass:
    def adapt(step: Step, cache: Cache) -> Step:
        return decode_step(model, step, cache) if request.graph else step

    return capture_pass(model, wanted(model, request), tokens, request.phase, say, adapt)


def _whole(
    model: Transformer, kept: Pass, rows: list[SiteTime], clock: Clock, request: Request
) -> list[dict[str, Any]]:
    """Every layer of which all ops were timed, run whole; with the sum of its sites' times.

    `comparable`: all of them were timed in the same way, so that the sum means something.
    """
    found = []
    for given in kept.layers:
        own = [row for row in rows if row.layer == given.layer]
        if len(own) != sum(f"L{given.layer}/" in path for path in model.schedule(kept.step)):
            continue  # only some of its sites were asked for
        names = [model.sites[row.site].impl.name for row in own]
        alone = sum(row.seconds[name] for row, name in zip(own, names, strict=True))
        entry = time_layer(model, kept, given, clock, request.effort)
        ways = {row.how[name] for row, name in zip(own, names, strict=True)}
        comparable = ways == {entry["how"]} == {entry["between_how"]}
        routes = sorted(set(names))
        found.append(
            {"layer": given.layer, "sites": alone, "routes": routes, **entry}
            | {"comparable": comparable}
        )
        if request.graph and isinstance(clock, CudaClock):
            found[-1]["graph"] = time_graph(model, kept, given, clock)
    return found


def _document(
    model: Transformer,
    tokens: list[list[int]],
    request: Request,
    ceiling: Ceilings,
    rows: list[SiteTime],
    whole: list[dict[str, Any]],
) -> dict[str, Any]:
    layers = sorted({row.layer for row in rows if row.layer is not None})
    return {
        "schema_version": documents.SCHEMA_VERSION,
        "checkpoint": str(model.checkpoint.folder),
        "layers": {str(n): model.config.attention_kind(n) for n in layers},
        "phase": request.phase,
        "context": len(tokens[0]),
        "batch": len(tokens),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "route": [str(entry) for entry in model.route],
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        "ceilings": ceiling.to_dict(),
        "sites": [row.to_dict() for row in rows],
        "total": documents.totals(rows),
        "whole": whole,
        "kernels_shown": request.kernels_shown,
    }
