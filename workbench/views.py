"""What the protocol shows of the engine: plain dictionaries, made from live objects."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Context, Site, matches
from dsv4_bench.probes.stats import tensor_stats
from dsv4_bench.probes.tensor import expected_nonfinite
from dsv4_bench.workbench.debugger import Debugger
from dsv4_bench.workbench.records import Held, Record


def state_view(debugger: Debugger, text: dict[str, Any]) -> dict[str, Any]:
    """The STATE document: position, route and settings. `text` adds what the worker knows."""
    site = debugger.model.sites.get(debugger.site or "")
    return {
        "state": debugger.state,
        "site": debugger.site,
        "op": site.op if site else None,
        "layer": site.layer if site else None,
        "index": debugger.index,
        "of": len(debugger.order) or len(debugger.model.sites),
        "forward": debugger.forward,
        "forwards": debugger.forwards(),
        "phase": "prefill" if debugger.span[1] <= len(debugger.plan.tokens) else "decode",
        "tokens": list(debugger.span),
        "why": debugger.why,
        "ran": debugger.ran,
        "route": [str(entry) for entry in debugger.model.route],
        "shadow": debugger.shadow.pattern or "off",
        "carried": debugger.shadow.carried,
        "calibration": debugger.shadow.cost(),
        "probes": [probe.name for probe in debugger.probes],
        "breaks": [point.to_dict() for point in debugger.breaks],
        "generated": debugger.generated,
        "snapshot_error": debugger.store.error,
        "memory": {"rss": resident_bytes()},
        **text,
    }


def resident_bytes() -> int:
    """Memory of this process now; where /proc is missing, the most it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tensor_view(
    name: str, value: Tensor, site: Site | None = None, stats: bool = True
) -> dict[str, Any]:
    """Shape, dtype, device and statistics of one tensor."""
    found = tensor_stats(value) if stats else None
    return {
        "name": name,
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": str(value.device),
        "bytes": value.nbytes,
        "stats": found.to_dict() if found else None,
        "format": None,
        "expected_nonfinite": site is not None and expected_nonfinite(site, name),
    }


def _weight_view(name: str, weight: Weight) -> dict[str, Any]:
    view = tensor_view(name, weight.data, stats=False)
    return {
        **view,
        "shape": list(weight.shape),
        "bytes": weight.nbytes,
        "format": weight.format,
        "tensor": weight.name,
        "global_scale": weight.global_scale if weight.format == "nvfp4" else None,
    }


def params_view(site: Site) -> list[dict[str, Any]]:
    """The constant arguments of a site: weights with their format, tables, plain values."""
    views: list[dict[str, Any]] = []
    for name, value in site.params.items():
        if isinstance(value, Weight):
            views.append(_weight_view(name, value))
        elif isinstance(value, Expert):
            views += [_weight_view(f"{name}.{leaf}", w) for leaf, w in value._asdict().items()]
        elif isinstance(value, Tensor):
            views.append(tensor_view(name, value, stats=False))
        elif name == "bank":
            first = value[0]
            views += [
                {**_weight_view(f"{name}[0].{leaf}", w), "count": len(value)}
                for leaf, w in first._asdict().items()
            ]
        else:
            views.append({"name": name, "value": str(value)})
    return views


def alternatives_view(op: str, context: Context) -> list[dict[str, Any]]:
    """Every implementation of an op, with the reason if it cannot run here; faults are left out."""
    rows = []
    for name, impl in IMPLEMENTATIONS[op].items():
        if name.startswith("fault/"):
            continue
        reason = impl.unavailable(context)
        rows.append({"name": name, "available": reason is None, "reason": reason or ""})
    return rows


def op_view(debugger: Debugger, path: str) -> dict[str, Any]:
    """The OPVIEW document of one site; tensors only if the session stands there."""
    site = debugger.model.sites[path]
    record: Record = debugger.records[path]
    held = debugger.held if debugger.held and debugger.held.call.site is site else None
    readings = [r.to_dict() for r in debugger.readings.values() if r.site == path]
    error = record.own_error
    return {
        "site": path,
        "op": site.op,
        "layer": site.layer,
        "doc": site.spec.doc,
        "inputs": _inputs(held) if held else [],
        "params": params_view(site),
        "outputs": _outputs(held) if held else [],
        "route": site.stamp.implementation,
        "stamp": site.stamp.to_dict(),
        "alternatives": alternatives_view(site.op, debugger.model.context),
        "times": dict(record.seconds),
        "own_error": None if error is None else error.to_dict(),
        "signature": record.signature.to_dict() if record.signature else None,
        "carried_error": record.carried_error,
        "effect": held.effect if held else "",
        "readings": readings,
        "held": held is not None,
        "state": record.state,
        "alarm": record.alarm,
        "anomaly": record.anomaly,
    }


def _inputs(held: Held) -> list[dict[str, Any]]:
    """Run-time arguments; one that was written in place is shown as it was before."""
    call, site = held.call, held.call.site
    values = {n: v for n, v in call.inputs.items() if n not in site.params}
    views = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            views.append(tensor_view(name, call.before.get(name, value), site))
        elif value is not None:
            views.append({"name": name, "value": type(value).__name__})
    return views


def _outputs(held: Held) -> list[dict[str, Any]]:
    site = held.call.site
    return [tensor_view(name, value, site) for name, value in held.call.outputs.items()]


def sites_view(debugger: Debugger) -> list[dict[str, Any]]:
    """One row a site, in order: state, route, time, error, breakpoint."""
    plain = [point.pattern for point in debugger.breaks if not point.name]
    rows = []
    for path, site in debugger.model.sites.items():
        record = debugger.records[path]
        rows.append(
            {
                "path": path,
                "op": site.op,
                "layer": site.layer,
                "route": site.stamp.implementation,
                "note": site.stamp.note,
                "state": record.state,
                "seconds": record.seconds.get(site.stamp.implementation),
                "own_error": record.own_error.relative_l2 if record.own_error else None,
                "times": record.own_error.times if record.own_error else None,
                "carried_error": record.carried_error,
                "alarm": record.alarm,
                "anomaly": record.anomaly,
                "break": any(matches(path, pattern) for pattern in plain),
            }
        )
    return rows
