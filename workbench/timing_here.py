"""`timing` in a session: every op of the layer it stands in, reference beside kernel, on its own inputs"""

from __future__ import annotations

from typing import Any

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.bundle_here import capture_layer
from dsv4_bench.workbench.debugger import Debugger
from dsv4_bench.workbench.timing.ceilings import ceilings
from dsv4_bench.workbench.timing.clock import make_clock
from dsv4_bench.workbench.timing.sites import Effort, time_site

_EFFORT = Effort(seconds=0.1, least=3, most=30)  # an op; a layer is timed in a few seconds


def time_here(debugger: Debugger, pattern: str) -> dict[str, Any]:
    """Times of the sites under `pattern` in the current layer, in the order they run.

    No probe and no shadow looks on while they are taken. Raises DSV4Error for a session that has not
    begun, a layer that raises, or a pause.
    """
    if debugger.index < 0:
        raise DSV4Error("nothing has run yet", "`step` runs the first op")
    model, layer = debugger.model, debugger.layer_at(debugger.index)

    def say(text: str) -> None:
        debugger.emit({"event": "log", "stream": "worker", "text": text + "\n"})

    ceiling = ceilings(model.device, say)
    calls = capture_layer(debugger, layer, pattern)
    clock, judge, rows = make_clock(model.device), debugger.shadow.judge, []
    for number, call in enumerate(calls, 1):
        if debugger.pause:
            raise DSV4Error(f"timing: paused at op {number} of {len(calls)}")
        debugger.tell_running(call.site, call.site.impl)
        row = time_site(model, call, clock, ceiling, judge, _EFFORT, with_kernels=False)
        rows.append({k: v for k, v in row.to_dict().items() if k != "kernels"})
    site = calls[0].site
    kind = "" if site.layer is None else model.config.attention_kind(site.layer)
    return {
        "group": site.path.partition("/")[0],
        "kind": kind,
        "tokens": list(debugger.span),
        "device": str(model.device),
        "sites": rows,
    }
