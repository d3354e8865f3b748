"""`dsv4-bench dump`: captured ops, readings, plots and a report, in one file for a bug report"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.cli import common, output

_PROBES = "stats,residual,softmax,hyper,load,nonfinite,scales,microscope"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_engine_arguments(parser)
    common.add_prompt_arguments(parser)
    parser.add_argument(
        "-o", "--out", required=True, metavar="OUT[.zip]", help="the bundle: a folder or a zip"
    )
    parser.add_argument("--layers", metavar="3-5,8", help="only these layers (default: all)")
    parser.add_argument("--sites", metavar="GLOB", help="only these sites, e.g. '*/attn/core'")
    parser.add_argument("--forward", metavar="N,N", help="only these forward passes, from 0")
    parser.add_argument(
        "--probes", default=_PROBES, metavar="a,b", help="all, none, or names (default: most)"
    )
    parser.add_argument(
        "--max-size", default="25", metavar="MB", help="of the bundle (default 25; 0: no bound)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="do not measure slow-down and carried error"
    )


def run(args: argparse.Namespace) -> int:
    tokens = common.read_tokens(args.tokens, args.prompt)
    chunks = common.parse_chunks(args.chunks)
    max_bytes = parse_size(args.max_size)
    forwards = parse_forwards(args.forward)

    from dsv4_bench.probes.base import make_probes
    from dsv4_bench.workbench.bundles.dumping import Dumper, Selection, parse_layers
    from dsv4_bench.workbench.bundles.reporting import left_out_line
    from dsv4_bench.workbench.loading import load_model, prompt_tokens

    loaded = load_model(common.engine_options(args))
    model = loaded.model
    prompt = prompt_tokens(loaded, args.prompt, tokens)
    if not chunks and len(prompt) > 1:
        chunks = (len(prompt) - 1, 1)  # one prefill and one decode step
    names = [] if args.probes == "none" else args.probes.replace(",", " ").split()
    layers = None if args.layers is None else parse_layers(args.layers, len(model.layers))
    selection = Selection(layers, args.sites, forwards)
    dumper = Dumper(model, prompt, chunks, selection, make_probes(names), max_bytes, args.quick)
    plan = dumper.plan
    output.narrate(
        f"{len(plan.chosen)} ops of {plan.selected} sites, at most {output.bytes_text(plan.bytes)}"
        + (f", capped at {output.bytes_text(max_bytes)}" if max_bytes else "")
    )
    written = dumper.run(Path(args.out), loaded.layout, output.progress)
    document = written.to_dict()
    if document["left_out"]:
        output.narrate(f"left out: {left_out_line(document['left_out'])}")
        output.narrate("narrow it with --sites, --layers or --forward, or raise --max-size")
    if args.json:
        output.print_json(document)
    else:
        print(f"{written.path}: {written.calls} ops, {output.bytes_text(written.bytes)}")
        if written.first:
            print(f"first over its limit: {written.first['sentence']} ({written.first['kind']})")
    return int(ExitCode.OK)


def parse_size(text: str) -> int | None:
    """Megabytes -> bytes; 0 is no bound. Raises DSV4Error."""
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = -1.0
    if not (math.isfinite(megabytes) and megabytes >= 0):
        raise DSV4Error(f"--max-size {text!r} is no size in MB", "e.g. --max-size 25; 0: no bound")
    return int(megabytes * 1_000_000) or None


def parse_forwards(text: str | None) -> tuple[int, ...] | None:
    """``0,3`` -> (0, 3). Raises DSV4Error."""
    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise DSV4Error(f"--forward {text!r}: numbers from 0", "e.g. --forward 0,1") from None
