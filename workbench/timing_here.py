"""`timing` and `history` in a session: ops of the layer it stands in, timed now, and earlier times"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.bundle_here import capture_layer
from dsv4_bench.workbench.debugger import Debugger
from dsv4_bench.workbench.timing import history
from dsv4_bench.workbench.timing.ceilings import ceilings, device_name
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
    calls = capture_layer(debugger, layer, pattern, "timing")
    clock, judge, rows = make_clock(model.device), debugger.shadow.judge, []
    for number, call in enumerate(calls, 1):
        if debugger.pause:
            raise DSV4Error(f"timing: paused at op {number} of {len(calls)}")
        debugger.tell_running(call.site, call.site.impl)
        row = time_site(model, call, clock, ceiling, judge, _EFFORT, with_kernels=False)
        rows.append({k: v for k, v in row.to_dict().items() if k != "kernels"})
    remember(debugger, "timing", [entry for row in rows for entry in history.of_row(row)])
    site = calls[0].site
    kind = "" if site.layer is None else model.config.attention_kind(site.layer)
    return {
        "group": site.path.partition("/")[0],
        "kind": kind,
        "tokens": list(debugger.span),
        "device": str(model.device),
        "sites": rows,
    }


def remember(debugger: Debugger, what: str, entries: Iterable[history.Entry]) -> None:
    """Add what was measured at the session's position to the history of runs."""
    model, step = debugger.model, debugger.step
    assert step is not None
    phase = "decode" if step.is_decode else "prefill"
    dtype = str(model.dtype).removeprefix("torch.")
    tokens = step.starts[0] + step.lengths[0]
    conditions = f"{phase}, {len(step.starts)} x {tokens} tokens, {dtype}"
    name = device_name(model.device)
    history.keep(what, str(model.checkpoint.folder), name, conditions, entries)
