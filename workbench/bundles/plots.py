"""Plots of a bundle, as PNG and SVG: residual growth, error by layer, scales, attention mass, load"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

INK, GRID = "#1f2933", "#d9dfe5"
BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d98c26", "#3a8f5c", "#c0392b", "#9aa5b1"
_STREAMS = (BLUE, ORANGE, GREEN, "#8059a6")
_WIDTH, _HEIGHT, _DPI = 8.0, 3.2, 130
_SMALLEST = 1e-10  # an error of 0 is drawn here


@dataclass(frozen=True)
class Plot:
    """One picture: its file name, what it shows in a sentence, and both files."""

    name: str
    caption: str
    png: bytes
    svg: bytes


def draw_plots(readings: Sequence[Row], calls: Sequence[Row], layers: int) -> list[Plot]:
    """The plots that these readings and calls (as in calls.json) have data for.

    Empty where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    by_name = defaultdict(list)
    for row in readings:
        if row.get("layer") is None or 0 <= row["layer"] < layers:
            by_name[row["probe"], row["name"]].append(row)
    drawn: list[Plot] = []
    for name, caption, draw in (
        ("residual", "RMS of each residual stream after every layer", _residual),
        ("error", "Own error of every captured op, its limit, and the error carried along", _error),
        (
            "attention",
            "Where the attention's mass goes, mean over heads and sampled queries",
            _mass,
        ),
        ("experts", "Share of the tokens that each expert got", _load),
        ("scales", "Block scales of the quantised weights, by power of two", _scales),
    ):
        drawn += _drawn(name, caption, draw, (by_name, calls, layers))
    return drawn


def _drawn(
    name: str, caption: str, draw: Callable[..., bool], data: tuple[Any, ...]
) -> Iterator[Plot]:
    """The plot, unless `draw` finds no data and says False."""
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 9,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "svg.hashsalt": name,  # ids stay apart when several are put into one page
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        try:
            if draw(axes, *data):
                files = []
                for kind in ("png", "svg"):
                    buffer = io.BytesIO()
                    metadata = (
                        {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
                    )
                    figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
                    files.append(buffer.getvalue())
                yield Plot(name, caption, *files)
        finally:
            plt.close(figure)


# ------------------------------------------------------------------------------ the plots

Readings = Mapping[tuple[str, str], list[Row]]


def _residual(axes: Any, readings: Readings, calls: Sequence[Row], layers: int) -> bool:
    rows = [r for r in readings["residual", "norm"] if not str(r["site"]).endswith("attn/hc_post")]
    passes = sorted({r["forward"] for r in rows})
    for forward in {*passes[:1], *passes[-1:]}:
        mine = sorted((_x(r), _list(r["value"])) for r in rows if r["forward"] == forward)
        streams = min((len(values) for _, values in mine), default=0)
        for stream in range(streams):
            axes.plot(
                [x for x, _ in mine],
                [max(values[stream], _SMALLEST) for _, values in mine],
                color=_STREAMS[stream % len(_STREAMS)],
                linestyle="-" if forward == passes[0] else ":",
                marker="o",
                markersize=2.5,
                linewidth=1.2,
                label=f"stream {stream}, pass {forward}",
            )
    if not axes.lines:
        return False
    axes.set_yscale("log")
    axes.set_ylabel("rms")
    _layer_axis(axes, layers)
    _legend(axes, 2 if len(passes) > 1 else 1)
    return True


def _error(axes: Any, readings: Readings, calls: Sequence[Row], layers: int) -> bool:
    points = [point for call in calls for point in _points(call, layers)]
    for verdict, color, label in (
        ("ok", BLUE, "own error"),
        ("over", RED, "own error, over its limit"),
    ):
        mine = [(x, error) for x, error, _, found, _ in points if found == verdict]
        if mine:
            xs, ys = zip(*mine, strict=True)
            axes.scatter(xs, ys, s=9, color=color, label=label, zorder=3, linewidths=0)
    limits = [(x, limit) for x, _, limit, _, _ in points if limit > 0]
    if limits:
        xs, ys = zip(*limits, strict=True)
        axes.scatter(xs, ys, s=9, color=GREY, marker="_", label="limit", zorder=2)
    carried = defaultdict(list)
    for row in readings["dump", "carried_error"]:
        carried[_x(row, layers)].append(float(row["value"]))
    if carried:
        line = sorted((x, max(*values, _SMALLEST)) for x, values in carried.items())
        axes.plot(*zip(*line, strict=True), color=ORANGE, linewidth=1.2, label="carried error")
    if not points and not carried:
        return False
    over = {p[4]: p for p in sorted(points, key=lambda p: p[1]) if p[3] == "over"}
    for x, error, _, _, site in list(over.values())[-4:]:
        axes.annotate(
            site, (x, error), xytext=(4, 4), textcoords="offset points", fontsize=7, color=RED
        )
    axes.set_yscale("log")
    axes.set_ylabel("relative L2")
    _layer_axis(axes, layers)
    _legend(axes)
    return True


def _points(call: Row, layers: int) -> Iterator[tuple[float, float, float, str, str]]:
    """(x, error, limit, verdict, site) of every judged output; infinite errors are drawn at 10."""
    for check in call["checks"].values():
        if check["verdict"] == "unjudged":
            continue
        error = float(check["own_error"])
        shown = min(max(error, _SMALLEST), 10.0) if math.isfinite(error) else 10.0
        site = str(call["site"])
        x = _site_x(site, layers) + (0.4 if "/ffn/" in site else 0.0)
        yield x, shown, float(check["limit"]), check["verdict"], site


def _mass(axes: Any, readings: Readings, calls: Sequence[Row], layers: int) -> bool:
    first = _of_first_pass(readings["softmax", "sink_mass"])
    shares = {
        name: {r["layer"]: float(r["value"]) for r in _of_first_pass(readings["softmax", name])}
        for name in ("sink_mass", "window_mass", "entry_mass")
    }
    if not first:
        return False
    xs = sorted(shares["sink_mass"])
    bottom = [0.0] * len(xs)
    for name, color, label in (
        ("sink_mass", GREY, "sink"),
        ("window_mass", BLUE, "window"),
        ("entry_mass", ORANGE, "compressed entries"),
    ):
        heights = [shares[name].get(x, 0.0) for x in xs]
        axes.bar(xs, heights, 0.75, bottom=bottom, color=color, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set_ylabel("share of the softmax")
    axes.set_ylim(0, max(1.02, *bottom))
    _layer_axis(axes, layers)
    _legend(axes)
    return True


def _load(axes: Any, readings: Readings, calls: Sequence[Row], layers: int) -> bool:
    rows = {r["layer"]: _list(r["value"]) for r in _of_first_pass(readings["load", "load"])}
    count = max((len(values) for values in rows.values()), default=0)
    if not count:
        return False
    grid = [[math.nan] * layers for _ in range(count)]
    for layer, values in rows.items():
        total = sum(values) or 1.0
        for expert, value in enumerate(values):
            grid[expert][layer] = value / total
    _image(axes, grid, (-0.5, layers - 0.5, count - 0.5, -0.5), "share of the tokens")
    axes.set_ylabel("expert")
    _layer_axis(axes, layers)
    return True


def _scales(axes: Any, readings: Readings, calls: Sequence[Row], layers: int) -> bool:
    counts: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in _of_first_pass(readings["microscope", "exponents"]):
        values = _list(row["value"])
        if row["layer"] is not None:
            for exponent, count in zip(values[::2], values[1::2], strict=False):
                counts[row["layer"]][int(exponent)] += count
    exponents = sorted({e for layer in counts.values() for e in layer})
    if not exponents:
        return False
    low, high = exponents[0], exponents[-1]
    grid = [[math.nan] * layers for _ in range(high - low + 1)]
    for layer, found in counts.items():
        total = sum(found.values()) or 1.0
        for exponent, count in found.items():
            grid[exponent - low][layer] = count / total
    _image(axes, grid, (-0.5, layers - 0.5, low - 0.5, high + 0.5), "share of the blocks", "lower")
    axes.set_ylabel("log2 of the scale")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _layer_axis(axes, layers)
    return True


# ------------------------------------------------------------------------------ helpers


def _of_first_pass(rows: Iterable[Row]) -> list[Row]:
    """The rows of the first forward pass that has any: the prefill, usually."""
    rows = list(rows)
    first = min((row["forward"] for row in rows), default=0)
    return [row for row in rows if row["forward"] == first]


def _list(value: Any) -> list[float]:
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)]


def _x(row: Row, layers: int | None = None) -> float:
    """The layer; -1 for the embedding, and `layers` for the head."""
    if row["layer"] is not None:
        return float(row["layer"])
    return float(layers) if layers is not None and str(row["site"]).startswith("head") else -1.0


def _site_x(site: str, layers: int) -> float:
    head, _, _ = site.partition("/")
    if head.startswith("L") and head[1:].isdecimal():
        return float(head[1:])
    return float(layers) if head == "head" else -1.0


def _layer_axis(axes: Any, layers: int) -> None:
    every = max(1, -(-layers // 16))
    axes.set_xticks(range(0, layers, every))
    axes.set_xlim(-1.4, layers + 0.4)
    axes.set_xlabel("layer")
    if axes.images:
        axes.set_xlim(-0.5, layers - 0.5)
    else:
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)


def _legend(axes: Any, columns: int = 1) -> None:
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, ncols=columns
    )


def _image(
    axes: Any, grid: Any, extent: tuple[float, ...], label: str, origin: str = "upper"
) -> None:
    shown = axes.imshow(
        grid,
        aspect="auto",
        extent=extent,
        origin=origin,
        cmap="Blues",
        vmin=0,
        interpolation="nearest",
    )
    axes.figure.colorbar(shown, ax=axes, label=label)
