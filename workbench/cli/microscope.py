"""`dsv4-bench inspect --microscope`: the block census as a report and as a plot"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.workbench.cli.output import table

if TYPE_CHECKING:
    from dsv4_bench.engine.block_census import BlockCensus
    from dsv4_bench.engine.microscope import Blocks

_WORST = 8  # matrices that a better choice of scales would help most


def report(census: BlockCensus) -> str:
    """The report for people."""
    parts = [_roles(census), _gain(census), _measured(census), _pairs(census), _coverage(census)]
    if census.problems:
        shown = [f"  {line}" for line in census.problems[:40]]
        parts.append("\n".join([f"problems ({len(census.problems)}):", *shown]))
    return "\n\n".join(part for part in parts if part)


def _roles(census: BlockCensus) -> str:
    rows = []
    for role, seen in census.by_role().items():
        powers = [power for blocks in seen for power in blocks.exponents]
        span = f"2^{min(powers)} ... 2^{max(powers)}" if powers else ""
        shares = [_mean(seen, name) for name in ("at_max", "subnormal", "at_top", "zeros", "slack")]
        noise, best = _mean(seen, "noise"), _mean(seen, "best_noise")
        rows.append(
            (
                role,
                len(seen),
                seen[0].format,
                span,
                *map(_percent, shares),
                _small(noise),
                _small(best),
            )
        )
    header = ("matrices", "count", "format", "block scales", "at 448", "subnormal")
    codes = ("codes at top", "codes 0", "slack", "noise", "best noise")
    return table((*header, *codes), rows)


def _mean(seen: Sequence[Blocks], name: str) -> float | None:
    values = [value for blocks in seen if (value := getattr(blocks, name)) is not None]
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _gain(census: BlockCensus) -> str:
    """The matrices whose stored scales are furthest from the best ones."""
    ratios = [
        (blocks.noise / blocks.best_noise, blocks)
        for blocks in census.matrices
        if blocks.noise and blocks.best_noise
    ]
    ratios.sort(key=lambda pair: -pair[0])
    rows = [
        (b.name, f"{ratio:.3g}x", _small(b.noise), _small(b.best_noise), _percent(b.slack))
        for ratio, b in ratios[:_WORST]
    ]
    if not rows:
        return ""
    title = "most to gain from other block scales (estimated from the codes):"
    return f"{title}\n\n" + table(("matrix", "noise/best", "noise", "best noise", "slack"), rows)


def _measured(census: BlockCensus) -> str:
    rows = [
        (name, _small(actual), _small(best), f"{actual / best:.3g}x" if best else "")
        for name, (actual, best) in census.measured.items()
    ]
    rows.sort(key=lambda row: -float(row[1]))
    if not rows:
        return ""
    title = "noise against the original (mean square error over mean square), largest first:"
    return f"{title}\n\n" + table(("matrix", "as stored", "best", "ratio"), rows[:_WORST])


def _pairs(census: BlockCensus) -> str:
    """How often gate and up have scales of their own, and by how much at most."""
    lines = []
    for what, ratios in (
        ("global", [p.global_ratio for p in census.pairs]),
        ("input", [p.input_ratio for p in census.pairs]),
    ):
        known = [(max(r, 1 / r), p.expert) for r, p in zip(ratios, census.pairs, strict=True) if r]
        unequal = [pair for pair in known if pair[0] != 1]
        if unequal:
            worst, expert = max(unequal)
            lines.append(
                f"gate and up differ in the {what} scale in {len(unequal)} of {len(known)} experts, "
                f"by {worst:.4g}x in {expert}: a fused kernel must not use one for both"
            )
        elif known:
            lines.append(f"gate and up share the {what} scale in all {len(known)} experts")
    return "\n".join(lines)


def _coverage(census: BlockCensus) -> str:
    looked = f"{len(census.matrices)} of {census.matched} quantised matrices examined"
    if census.experts != "all":
        looked += f" (experts {', '.join(map(str, census.experts))} of every layer)"
    sampled = next((b.sampling for b in census.matrices if b.sampling), "")
    rest = f"; all scales of each, but {sampled} at most" if sampled else "; all scales and codes"
    return f"{looked}{rest}" + (
        "; --all reads the rest" if sampled or census.experts != "all" else ""
    )


# ------------------------------------------------------------------------------ plot


def plot_path(name: str) -> Path:
    """Where a plot shall go. Raises DSV4Error for a name of another kind of file."""
    path = Path(name)
    if path.suffix not in (".png", ".svg"):
        raise DSV4Error(f"--plot {path}: cannot write {path.suffix!r}", "end it in .png or .svg")
    return path


def write_plot(census: BlockCensus, path: Path) -> None:
    """Four panels, as the file's name says. Raises CannotAnswer without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CannotAnswer("--plot needs matplotlib", "pip install matplotlib") from None
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    roles = census.by_role()
    for role, seen in roles.items():
        counts: dict[int, int] = {}
        for blocks in seen:
            for power, count in blocks.exponents.items():
                counts[power] = counts.get(power, 0) + count
        total = sum(counts.values())
        powers = sorted(counts)
        (line,) = axes[0].plot(
            powers, [counts[p] / total for p in powers], ".-", label=_short(role)
        )
        colour = line.get_color()
        if seen[0].codes:
            shares = [sum(b.codes[i] for b in seen) / len(seen) for i in range(8)]
            axes[1].plot(("0", ".5", "1", "1.5", "2", "3", "4", "6"), shares, ".-", color=colour)
        _over_matrices(axes[2], colour, seen, lambda b: (b.noise or 0) / (b.best_noise or 1))
        _over_matrices(axes[3], colour, seen, lambda b: b.at_max or 0)
    titles = (
        "block scales by power of two",
        "e2m1 codes",
        "noise over best noise",
        "scales at 448",
    )
    for axis, title, label in zip(
        axes, titles, ("log2 scale", "magnitude", "matrix", "matrix"), strict=True
    ):
        axis.set_title(title)
        axis.set_xlabel(label)
    axes[0].legend(fontsize="x-small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise DSV4Error(
            f"--plot {path}: {error.strerror or error}", "choose another place"
        ) from None


def _over_matrices(
    axis: Any, colour: str, seen: Sequence[Blocks], value: Callable[[Blocks], float]
) -> None:
    """One dot a 4-bit matrix, in the order of layers and experts."""
    known = [blocks for blocks in seen if blocks.noise is not None]
    axis.plot(
        range(len(known)), [value(blocks) for blocks in known], ".", color=colour, markersize=3
    )


def _short(role: str) -> str:
    return role.removeprefix("layers.*.")
