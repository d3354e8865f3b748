"""One profile from start to end: capture, ceilings, every site, every layer whole"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site, matches, select_sites
from dsv4_bench.probes.judge import Judge
from dsv4_bench.probes.nvtx import site_range
from dsv4_bench.workbench.timing import document as documents
from dsv4_bench.workbench.timing.capturing import Pass, capture_pass
from dsv4_bench.workbench.timing.ceilings import Ceilings, ceilings
from dsv4_bench.workbench.timing.clock import Clock, make_clock
from dsv4_bench.workbench.timing.nsys import MEASURE
from dsv4_bench.workbench.timing.sites import Effort, SiteTime, time_layer, time_site

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to time: sites of `layers` (or those under `sites`), in which kind of forward pass."""

    layers: tuple[int, ...]
    sites: str
    phase: str
    effort: Effort
    fresh_ceilings: bool = False
    kernels_shown: bool = False
    counted: bool = False  # by ncu: the profiler is switched on around every call that is timed


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
    kept = capture_pass(model, wanted(model, request), tokens, request.phase, say)
    clock, judge = make_clock(model.device), Judge(model.dtype)
    rows = []
    with site_range(MEASURE):  # what nsys waits for
        for number, call in enumerate(kept.calls):
            say(f"{call.site.path} ({number + 1} of {len(kept.calls)})")
            rows.append(
                time_site(model, call, clock, ceiling, judge, request.effort, request.counted)
            )
    whole = _whole(model, kept, rows, clock, request)
    return _document(model, tokens, request, ceiling, rows, whole)


def _whole(
    model: Transformer, kept: Pass, rows: list[SiteTime], clock: Clock, request: Request
) -> list[dict[str, Any]]:
    """Every layer of which all ops were timed, run whole; with the sum of its sites' times."""
    found = []
    for given in kept.layers:
        own = [row for row in rows if row.layer == given.layer]
        used = {model.sites[row.site].impl.name for row in own}
        if len(own) != sum(f"L{given.layer}/" in path for path in model.schedule(kept.step)):
            continue  # only some of its sites were asked for
        alone = sum(row.seconds[model.sites[row.site].impl.name] for row in own)
        entry = time_layer(model, kept, given, clock, request.effort)
        found.append({"layer": given.layer, "sites": alone, "routes": sorted(used), **entry})
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
