"""The result of a profile as one document: assembled, printed as markdown, compared with a base"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, ExitCode
from dsv4_bench.workbench.cli import output
from dsv4_bench.workbench.timing.ceilings import Ceilings
from dsv4_bench.workbench.timing.sites import SiteTime

SCHEMA_VERSION = 1
_SAME = ("phase", "context", "batch", "dtype", "layers")  # of two documents that may be compared
_NAMESPACES = re.compile(r"dsv4::|at::native::|\(anonymous namespace\)::|<unnamed>::|unnamed>::")
_PARAMETERS = re.compile(r"(?<=[\w>])\((?!anonymous).*$")
_WAITS = {"waits": " w"}  # marks a time that has launches and waits for the GPU in it
_BESIDE = 1.05  # of a layer: from here on its sites' sum is said to be more than the layer
_ERROR_FLOOR = 1e-7  # relative L2 below which an error is float32 rounding, not a regression


def totals(rows: list[SiteTime]) -> dict[str, float]:
    """Sums over the sites, in seconds."""
    return {
        "reference": sum(row.seconds["reference"] for row in rows),
        "kernel": sum(row.seconds[row.kernel] for row in rows),
        "floor": sum(row.floor for row in rows),
    }


# ------------------------------------------------------------------------------ markdown


def report(document: dict[str, Any]) -> str:
    """Markdown: the machine's ceilings, one row a site, the layers whole; fit for an issue."""
    parts = [_head(document), "", _ceilings(Ceilings(**document["ceilings"])), "", _table(document)]
    if any("waits" in site["how"].values() for site in document["sites"]):
        parts.append(
            "w: waits for the GPU on its way, so that launches from Python are in its time"
        )
    if document["whole"]:
        parts += ["", *map(_whole, document["whole"])]
    if document["kernels_shown"]:
        parts += ["", _kernels(document)]
    if "recorded" in document:
        parts += ["", recorded_report(document["recorded"])]
    return "\n".join(parts)


def _head(document: dict[str, Any]) -> str:
    layers = ", ".join(f"L{n} ({kind})" for n, kind in document["layers"].items()) or "no layer"
    batch = f"{document['batch']} x " if document["batch"] > 1 else ""
    where = "inside a CUDA graph, " if _in_graphs(document) else ""
    return (
        f"{layers}, {document['phase']}, {batch}{document['context']} tokens, {document['dtype']} on "
        f"{document['ceilings']['device']}; microseconds {where}median of interleaved runs on captured "
        "inputs, weights and KV cache from memory"
    )


def _in_graphs(document: dict[str, Any]) -> bool:
    return any("graph" in site["how"].values() for site in document["sites"])


def _ceilings(found: Ceilings) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in found.matrix.items())
    threads = f", {found.threads} threads" if found.threads else ""
    launch = f"; a launch {1e6 * found.launch:.2f} us" if found.launch else ""
    return (
        f"ceilings (measured {found.measured}{threads}): read {found.read / 1e9:.1f} GB/s, copy "
        f"{found.copy / 1e9:.1f} GB/s, matrix products {rates} TFLOP/s{launch}"
    )


def _table(document: dict[str, Any]) -> str:
    one = len(document["layers"]) == 1
    rows = [_row(site, one) for site in document["sites"]]
    total = document["total"]
    rows.append(
        (
            "all sites",
            _us(total["reference"]),
            _us(total["kernel"]),
            "",
            "",
            f"{total['reference'] / total['kernel']:.2f}x",
            _us(total["floor"]),
            f"{total['floor'] / total['kernel']:.0%}",
            "",
            "",
        )
    )
    header = ("site", "reference", "kernel", "+-", "route", "speed-up", "floor", "of floor",
              "own error", "verdict")  # fmt: skip
    return output.table(header, rows)


def _row(site: dict[str, Any], one_layer: bool) -> tuple[str, ...]:
    kernel = site["kernel"]
    compared = kernel != "reference"
    path = (
        site["site"].partition("/")[2] if one_layer and site["layer"] is not None else site["site"]
    )
    return (
        path,
        _us(site["seconds"]["reference"]) + _WAITS.get(site["how"]["reference"], ""),
        _us(site["seconds"][kernel]) + _WAITS.get(site["how"][kernel], "") if compared else "",
        f"{site['spread'][kernel] / site['seconds'][kernel]:.0%}",
        kernel if compared else "",
        f"{site['speedup']:.2f}x" if site["speedup"] else "",
        _us(site["floor"]),
        f"{site['of_floor']:.0%}" if site["of_floor"] else "",
        "" if site["own_error"] is None else f"{site['own_error']:.1e}",
        site["verdict"],
    )


def _whole(entry: dict[str, Any]) -> str:
    parts = entry["sites"] + entry["between"]
    text = (
        f"L{entry['layer']} run whole on its route: {_us(entry['seconds'])} us "
        f"(+-{entry['spread'] / entry['seconds']:.0%}); its sites add up to {_us(entry['sites'])} us "
        f"and the code between them to {_us(entry['between'])}, together "
        f"{parts / entry['seconds']:.1%} of it"
    )
    if not entry["comparable"]:
        why = entry["problem"] or "some of it waits for the GPU"
        text += f" (not timed in the same way: {why})"
    if entry["how"] == "wall":
        text += " (each of them, and the layer, begins with empty caches)"
    if entry["how"] == "graph":
        if parts > _BESIDE * entry["seconds"]:
            text += " (in the layer a kernel may start while the one before it ends)"
        text += f"; launched from Python, {_us(entry['eager'])} us"
    return text + (f"\n{_graph(entry['graph'])}" if "graph" in entry else "")


def _graph(graph: dict[str, Any]) -> str:
    stamped = sum(site["seconds"] for site in graph["sites"])
    return (
        f"L{graph['layer']} from the decode graph, {graph['kernels']} kernels: {_us(graph['seconds'])} "
        f"us with independent sites side by side, {_us(graph['chain'])} us in one chain; its sites "
        f"between time stamps on the device add up to {_us(stamped)} us"
    )


def _kernels(document: dict[str, Any]) -> str:
    rows = []
    for site in document["sites"]:
        for name in dict.fromkeys((site["kernel"], "reference")):
            for kernel in site["kernels"].get(name, [])[:4]:
                rows.append(
                    (
                        site["site"],
                        name,
                        short_name(kernel["name"])[:60],
                        kernel["calls"],
                        _us(kernel["seconds"]),
                    )
                )
    return output.table(("site", "route", "kernel or operator", "calls", "us"), rows)


def recorded_report(recorded: dict[str, Any]) -> str:
    """What nsys saw, by site and implementation."""
    rows = [
        (
            site["site"],
            site["route"],
            site["calls"],
            _us(site["host"]) if site["host"] else "",
            _us(site["gpu"]) if site["kernels"] else "",
            _us(site["gaps"]) if site["kernels"] else "",
            _us(site["launch"]) if site["launch"] else "",
            ", ".join(f"{k['name']} x{k['calls']:g}" for k in site["kernels"][:3]),
        )
        for site in recorded["sites"]
    ]
    seen = f"{recorded['kernels']} GPU kernels" if recorded["kernels"] else "no GPU kernels"
    outside = recorded["kernels_outside"]
    lost = f", {outside} of them outside every site" if outside else ""
    header = ("site", "route", "calls", "host", "gpu", "gaps", "launch", "kernels")
    shown = len(header) if recorded["kernels"] else 4  # the others are a GPU's
    return (
        f"nsys {recorded['nsys']}: {seen}{lost}; microseconds, medians over a site's calls\n\n"
        f"{output.table(header[:shown], [row[:shown] for row in rows])}"
    )


def ncu_report(rows: list[dict[str, Any]]) -> str:
    """Counters of every kernel, by site."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0f} %"

    def us(value: float | None) -> str:
        return "" if value is None else _us(value)

    table = [
        (
            row["site"],
            short_name(row["kernel"])[:48],
            us(row["seconds"]),
            us(row["cold"]),
            share(row["dram"]),
            share(row["compute"]),
            share(row["occupancy"]),
            "" if row["registers"] is None else f"{row['registers']:.0f}",
            ", ".join(f"{name} {value:.1f}" for name, value in row["stalls"].items()),
        )
        for row in rows
    ]
    header = ("site", "kernel", "us", "cold", "DRAM", "compute", "occupancy", "registers",
              "worst stalls")  # fmt: skip
    return (
        f"{output.table(header, table)}\n"
        "us: caches as in a forward pass; cold and all that follows: caches emptied before every kernel"
    )


def short_name(kernel: str) -> str:
    """A kernel's name without its result, our and torch's namespaces, and its parameters."""
    name = _NAMESPACES.sub("", kernel.removeprefix("void "))
    return _PARAMETERS.sub("", name)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


# ------------------------------------------------------------------------------ gate


@dataclass(frozen=True)
class Regression:
    """One site that got slower or wronger than the gates allow."""

    site: str
    what: str  # time or error
    base: float
    now: float
    limit: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        if self.what == "time":
            return f"{self.site}: {_us(self.base)} us -> {_us(self.now)} us (+{self.now / self.base - 1:.1%})"
        return f"{self.site}: own error {self.base:.1e} -> {self.now:.1e}"


def parse_gate(text: str, kind: str) -> float:
    """``3%`` -> 1.03, ``2x`` -> 2.0: how much larger a value may be. Raises DSV4Error."""
    try:
        if text.endswith("%"):
            factor = 1 + float(text[:-1]) / 100
        else:
            factor = float(text.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 1 <= factor < float("inf"):
        raise DSV4Error(f"--gate-{kind} {text!r} is neither N% nor Nx", "e.g. 3% or 2x")
    return factor


def read_document(path: Path) -> dict[str, Any]:
    """A document that `profile --json` wrote. Raises DSV4Error with exit code 4."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise DSV4Error(f"{path}: {error.strerror}", exit_code=ExitCode.BAD_INPUT) from None
    except ValueError as error:
        raise DSV4Error(f"{path} is not JSON: {error}", exit_code=ExitCode.BAD_INPUT) from None
    known = isinstance(document, dict) and document.get("schema_version") == SCHEMA_VERSION
    if not known or not isinstance(document.get("sites"), list):
        raise DSV4Error(
            f"{path} is not a profile of schema {SCHEMA_VERSION}",
            "write one with `dsv4-bench profile --json > BASE.json`",
            exit_code=ExitCode.BAD_INPUT,
        )
    return document


def regressions(
    base: dict[str, Any], now: dict[str, Any], gate_time: float, gate_error: float
) -> list[Regression]:
    """Sites of `now` that are over a gate. Raises CannotAnswer where comparing would mislead.

    Time: over the gate, and further off than both spreads together. Error: over the gate times the
    base's error, which counts as float32 rounding at least.
    """
    differ = [key for key in _SAME if base.get(key) != now[key]]
    if base.get("ceilings", {}).get("device") != now["ceilings"]["device"]:
        differ.append("device")
    before = {site["site"]: site for site in base["sites"]}
    after = {site["site"]: site for site in now["sites"]}
    if before.keys() != after.keys():
        differ.append("sites")
    if differ:
        raise CannotAnswer(
            f"the base cannot be compared: another {', '.join(differ)}",
            "measure the base again with the same options on this machine",
        )
    found = []
    for path, site in after.items():
        found += _time_regression(before[path], site, gate_time)
        found += _error_regression(before[path], site, gate_error)
    return found


def _time_regression(
    before: dict[str, Any], after: dict[str, Any], gate: float
) -> list[Regression]:
    old, new = (site["seconds"][site["kernel"]] for site in (before, after))
    noise = sum(site["spread"][site["kernel"]] for site in (before, after))
    if new > gate * old and new - old > noise:
        return [Regression(after["site"], "time", old, new, gate * old)]
    return []


def _error_regression(
    before: dict[str, Any], after: dict[str, Any], gate: float
) -> list[Regression]:
    if after["own_error"] is None:
        return []
    old, new = float(before["own_error"] or 0), float(after["own_error"])
    allowed = gate * max(old, _ERROR_FLOOR)
    return [] if new <= allowed else [Regression(after["site"], "error", old, new, allowed)]
