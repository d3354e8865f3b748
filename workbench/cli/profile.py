"""`dsv4-bench profile`: where the time of one layer goes, reference beside kernel."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.workbench.cli import common, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", type=int, required=True, metavar="N")
    parser.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    parser.add_argument(
        "--context", type=int, metavar="T", help="tokens in all (default: the prompt's)"
    )
    common.add_engine_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--tokens", metavar="FILE", help="a JSON list of token ids")
    parser.add_argument("--nsys", action="store_true", help="under Nsight Systems (not built yet)")
    parser.add_argument("--ncu", action="store_true", help="under Nsight Compute (not built yet)")


def run(args: argparse.Namespace) -> int:
    for tool in ("nsys", "ncu"):
        if getattr(args, tool):
            raise CannotAnswer(
                f"--{tool} is not built yet",
                f"without it this prints times; NVTX ranges in domain dsv4 are emitted, so "
                f"`{tool}` can be run around this command by hand",
            )
    if args.context is not None and args.context < 1:
        raise DSV4Error(f"--context {args.context}: at least 1 token is needed", "e.g. 256")
    tokens = common.read_tokens(args.tokens, args.prompt)

    from dsv4_bench.probes.judge import Judge
    from dsv4_bench.workbench.loading import load_model, prompt_tokens
    from dsv4_bench.workbench.profiling import capture_layer, time_site

    loaded = load_model(common.engine_options(args))
    prompt = prompt_tokens(loaded, args.prompt, tokens)
    if args.context is not None:  # repeat the prompt, or cut it
        prompt = (prompt * -(-args.context // len(prompt)))[: args.context]
    tty = sys.stderr.isatty()
    calls = capture_layer(
        loaded.model, args.layer, prompt, args.phase, lambda text: _narrate(text) if tty else None
    )
    rows, judge = [], Judge(loaded.model.dtype)
    for number, call in enumerate(calls):
        rows.append(time_site(loaded.model, call, judge))
        output.progress("site", number + 1, len(calls))
    document = {
        "checkpoint": str(loaded.folder),
        "layer": args.layer,
        "attention": loaded.model.config.attention_kind(args.layer),
        "phase": args.phase,
        "context": len(prompt),
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "route": [str(entry) for entry in loaded.model.route],
        "notes": loaded.notes,
        "sites": [row.to_dict() for row in rows],
        "total": _totals(rows),
    }
    if args.json:
        output.print_json(document)
    else:
        print(report(document))
    return 0


def _narrate(text: str) -> None:
    print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _totals(rows: list[Any]) -> dict[str, float]:
    return {
        "reference": sum(row.seconds["reference"] for row in rows),
        "kernel": sum(row.seconds[row.kernel] for row in rows),
    }


def report(document: dict[str, Any]) -> str:
    """Markdown: one row a site, fit to paste into an issue."""
    head = (
        f"Layer {document['layer']} ({document['attention']}), {document['phase']}, "
        f"{document['context']} tokens, {document['dtype']} on {document['device']}; "
        "microseconds, median of interleaved warm runs on captured inputs"
    )
    rows = []
    for site in document["sites"]:
        kernel = site["kernel"]
        compared = kernel != "reference"
        rows.append(
            (
                site["site"].partition("/")[2],
                f"{1e6 * site['seconds']['reference']:.1f}",
                f"{1e6 * site['seconds'][kernel]:.1f}" if compared else "",
                kernel if compared else "",
                f"{site['speedup']:.2f}x" if site["speedup"] else "",
                "" if site["own_error"] is None else f"{site['own_error']:.1e}",
                site["verdict"],
                output.bytes_text(site["bytes"]),
            )
        )
    total = document["total"]
    rows.append(
        (
            "all sites",
            f"{1e6 * total['reference']:.1f}",
            f"{1e6 * total['kernel']:.1f}",
            "",
            f"{total['reference'] / total['kernel']:.2f}x",
            "",
            "",
            "",
        )
    )
    header = ("site", "reference", "kernel", "route", "speed-up", "own error", "verdict", "bytes")
    return f"{head}\n\n{output.table(header, rows)}"
