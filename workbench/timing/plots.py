"""A profile as pictures: the roofline, time by layer, reference against kernel (PNG, SVG or PDF)"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error

_FORMATS = {".png", ".svg", ".pdf"}
_NAMED = 10  # sites with their names in the roofline


def check_path(path: Path) -> None:
    """Raise DSV4Error for a picture that could not be written at the end."""
    if path.suffix.lower() not in _FORMATS:
        raise DSV4Error(f"--plot {path}: not a picture", f"one of {', '.join(sorted(_FORMATS))}")
    if not path.parent.is_dir():
        raise DSV4Error(f"no such folder: {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise CannotAnswer("--plot needs matplotlib, which is not installed here")


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the three pictures as one file, its format by the name's ending."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    layers = len(document["layers"])
    rows = (4.5, 1.3 + 0.3 * layers, 5.0)  # inches
    figure = Figure(figsize=(11, sum(rows)), layout="constrained")
    roofline, by_layer, routes = figure.subplots(3, 1, height_ratios=rows)
    _roofline(roofline, document)
    _by_layer(by_layer, document)
    _routes(routes, document)
    kinds = ", ".join(f"L{n} {kind}" for n, kind in document["layers"].items()) or "no layer"
    batch = f"{document['batch']} x " if document["batch"] > 1 else ""
    figure.suptitle(
        f"{kinds}: {document['phase']}, {batch}{document['context']} tokens, {document['dtype']} on "
        f"{document['ceilings']['device']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def _roofline(axes: Any, document: dict[str, Any]) -> None:
    """Operations per second over operations per byte; the roof is what this machine was measured at."""
    ceilings = document["ceilings"]
    peak = ceilings["matrix"].get(document["dtype"]) or max(ceilings["matrix"].values())
    sites = [site for site in document["sites"] if site["bytes"] and site["flops"]]
    intensity = [site["flops"] / site["bytes"] for site in sites]
    edge = [min([0.05, *intensity]), max([2 * peak / ceilings["read"], *intensity])]
    knee = peak / ceilings["read"]
    axes.plot([edge[0], knee, edge[1]], [edge[0] * ceilings["read"], peak, peak], "k-", lw=1)
    for route, mark in (("reference", "x"), ("kernel", "o")):
        names = [site["kernel"] if route == "kernel" else "reference" for site in sites]
        rates = [s["flops"] / s["seconds"][n] for s, n in zip(sites, names, strict=True)]
        axes.plot(intensity, rates, mark, label=route, alpha=0.8, fillstyle="none")
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second"
    )
    axes.set_title("roofline: each site against this machine's measured ceilings", fontsize=9)
    axes.legend(fontsize=8)
    _name_slowest(axes, sites)


def _name_slowest(axes: Any, sites: list[dict[str, Any]]) -> None:
    """Names of the sites that take longest, in a column at the right, each with a line to its point."""

    def rate(site: dict[str, Any]) -> float:
        return float(site["flops"] / site["seconds"][site["kernel"]])

    slowest = sorted(sites, key=lambda s: -s["seconds"][s["kernel"]])[:_NAMED]
    for number, site in enumerate(sorted(slowest, key=rate, reverse=True)):
        axes.annotate(
            site["site"],
            (site["flops"] / site["bytes"], rate(site)),
            xytext=(1.02, 0.95 - 0.9 * number / _NAMED),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey", "relpos": (0, 0.5)},
        )


def _by_layer(axes: Any, document: dict[str, Any]) -> None:
    """Time of every layer, stacked by op, on the kernel route."""
    from matplotlib import colormaps

    layers = [str(layer) for layer in document["layers"]]
    ops = list(dict.fromkeys(site["op"] for site in document["sites"]))
    colours = colormaps["tab20"]
    bottom = [0.0] * len(layers)
    for number, op in enumerate(ops):
        heights = [
            1e6 * sum(s["seconds"][s["kernel"]] for s in document["sites"]
                      if s["op"] == op and str(s["layer"]) == layer)
            for layer in layers
        ]  # fmt: skip
        axes.barh(
            [f"L{n}" for n in layers], heights, left=bottom, label=op, color=colours(number % 20)
        )
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set_title("time by layer and op, kernel route (us)", fontsize=9)
    axes.legend(
        fontsize=7, ncols=8, loc="upper center", bbox_to_anchor=(0.5, -0.25 / len(layers) - 0.1)
    )
    axes.invert_yaxis()


def _routes(axes: Any, document: dict[str, Any]) -> None:
    """The slowest sites: reference, kernel and floor side by side."""
    sites = sorted(document["sites"], key=lambda s: -s["seconds"][s["kernel"]])[:16]
    names = [site["site"] for site in sites]
    places = range(len(sites))
    for offset, label, values in (
        (-0.27, "reference", [s["seconds"]["reference"] for s in sites]),
        (0.0, "kernel", [s["seconds"][s["kernel"]] for s in sites]),
        (0.27, "floor", [s["floor"] for s in sites]),
    ):
        axes.barh([p + offset for p in places], [1e6 * v for v in values], 0.27, label=label)
    axes.set_yticks(list(places), names, fontsize=7)
    axes.set(xscale="log")
    axes.invert_yaxis()
    axes.set_title("slowest sites (us)", fontsize=9)
    axes.legend(fontsize=8)
