"""`dsv4-bench inspect`: the census of a checkpoint, as a report or as JSON."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dsv4_bench.engine.errors import BadCheckpoint, DSV4Error, ExitCode
from dsv4_bench.workbench.cli.output import bytes_text, narrate, print_json, progress, table

if TYPE_CHECKING:
    from dsv4_bench.engine.census import Census
    from dsv4_bench.engine.checkpoint import Checkpoint

_SHOWN = 40  # problems and extra tensors in the report; JSON has all of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--all",
        action="store_true",
        help="read every block scale, however many (default: a sample of the experts)",
    )
    parser.add_argument(
        "--microscope",
        metavar="GLOB",
        nargs="?",
        const="*",
        help="how well the blocks of the matrices GLOB use scales and codes (default: of all)",
    )
    parser.add_argument(
        "--against", metavar="CKPT", help="with --microscope: the original, to measure the noise"
    )
    parser.add_argument(
        "--plot", metavar="OUT", help="with --microscope: draw it into OUT.png or OUT.svg"
    )


def run(args: argparse.Namespace) -> int:
    from dsv4_bench.engine.census import take_census
    from dsv4_bench.engine.checkpoint import Checkpoint
    from dsv4_bench.engine.demo import resolve_checkpoint

    folder = resolve_checkpoint(args.checkpoint)
    if not args.checkpoint:
        narrate(f"inspecting {folder}")
    if args.microscope is not None:
        return _microscope(args, Checkpoint(folder))
    if args.plot or args.against:
        raise DSV4Error("--plot and --against belong to --microscope", "add --microscope")
    census = take_census(Checkpoint(folder), args.all, progress)
    if args.json:
        print_json(census.to_dict())
    else:
        print(report(census))
    if census.problems:
        raise BadCheckpoint(
            f"{folder}: {len(census.problems)} problems, first: {census.problems[0]}",
            "the report on stdout lists them" + ("" if args.json else "; --json lists all"),
        )
    return ExitCode.OK


def _microscope(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    from dsv4_bench.engine.block_census import take_block_census
    from dsv4_bench.engine.checkpoint import Checkpoint
    from dsv4_bench.workbench.cli import microscope

    plot = microscope.plot_path(args.plot) if args.plot else None
    original = Checkpoint(args.against) if args.against else None
    census = take_block_census(checkpoint, args.microscope, args.all, original, progress)
    if plot is not None:
        microscope.write_plot(census, plot)
        narrate(f"plot written to {plot}")
    if args.json:
        print_json(census.to_dict())
    else:
        print(microscope.report(census))
    if census.problems:
        text = f"{census.folder}: {len(census.problems)} problems, first: {census.problems[0]}"
        raise BadCheckpoint(text, "the report on stdout lists them")
    return ExitCode.OK


def report(census: Census) -> str:
    """The report for people."""
    parts = [_summary(census), _formats(census), _roles(census)]
    if census.scales:
        parts += [_scales(census), _coverage(census)]
    parts += [_list("notes", census.notes), _list("tensors not used", census.extra)]
    parts.append(_list("problems", census.problems) or "no problems")
    return "\n\n".join(part for part in parts if part)


def _summary(census: Census) -> str:
    model = census.model
    kinds = ", ".join(f"{count} {kind}" for kind, count in model["attention"].items())
    return (
        f"{census.folder}\n"
        f"layout:  {census.layout}\n"
        f"model:   {model['layers']} layers ({kinds}; {model['hash_layers']} hash-routed), "
        f"width {model['hidden_size']}, {model['heads']} heads, "
        f"{model['experts']} experts, {model['experts_per_token']} a token\n"
        f"stored:  {census.tensors} tensors, {bytes_text(census.bytes)} in {census.files} files"
    )


def _formats(census: Census) -> str:
    rows = [
        (name, tally.tensors, f"{tally.values / 1e6:.2f}", bytes_text(tally.bytes))
        for name, tally in census.formats.items()
    ]
    return table(("format", "tensors", "million values", "bytes"), rows)


def _roles(census: Census) -> str:
    rows = []
    for role in census.roles:
        forms = ", ".join(
            form if len(role.formats) == 1 else f"{form} x{count}"
            for form, count in role.formats.items()
        )
        shapes = " or ".join("x".join(map(str, shape)) for shape in sorted(role.shapes))
        rows.append((role.role, role.count, forms, shapes, bytes_text(role.bytes)))
    return table(("role", "count", "format", "shape", "bytes"), rows)


def _scales(census: Census) -> str:
    rows = []
    for scale in census.scales:
        data = scale.to_dict()
        rows.append(
            (
                data["where"],
                "/".join(data["scale_dtypes"]).lower(),
                _span(data["min"], data["max"]),
                *(_percent(data[f"share_{what}"]) for what in ("at_448", "subnormal", "zero")),
                _span(data["global_min"], data["global_max"]),
                "" if data["gate_up_ratio"] is None else f"{data['gate_up_ratio']:.3g}",
            )
        )
    header = ("scales of", "stored as", "block scales", "at 448", "subnormal", "zero")
    return table((*header, "global scales", "gate:up at most"), rows)


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{low:.3g}" if low == high else f"{low:.3g} ... {high:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2g}%"


def _coverage(census: Census) -> str:
    cover = census.coverage
    if cover["experts"] == "all":
        return "block scales: all were read"
    experts = ", ".join(map(str, cover["experts"]))
    return (
        f"block scales: {100 * cover['share']:.2g}% were read: all of the other linears, and experts "
        f"{experts} of every layer; --all reads the rest. Global scales: all were read."
    )


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    more = len(lines) - _SHOWN
    tail = [f"  ... and {more} more (--json lists all)"] if more > 0 else []
    return "\n".join([f"{title} ({len(lines)}):", *(f"  {line}" for line in lines[:_SHOWN]), *tail])
