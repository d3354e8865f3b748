"""`dsv4-bench make-checkpoint`: a synthetic checkpoint in a published layout."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dsv4_bench.engine.errors import DSV4Error, ExitCode, did_you_mean
from dsv4_bench.workbench.cli.output import bytes_text, narrate, print_json, progress

_MAX_LAYERS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    parser.add_argument("--preset", default="tiny", help="tiny, flash or pro (default: tiny)")
    parser.add_argument(
        "--layout",
        default="nvfp4",
        help="nvfp4, nvfp4-dense, deepseek, compressed-tensors, bf16 or transformers "
        "(default: nvfp4)",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="number of layers (default: the preset's)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")


def run(args: argparse.Namespace) -> int:
    from dsv4_bench.engine.config import PRESETS, with_layers
    from dsv4_bench.engine.synthetic import estimated_bytes, write_checkpoint

    if args.preset not in PRESETS:
        raise DSV4Error(f"unknown preset {args.preset!r}", did_you_mean(args.preset, PRESETS))
    config = PRESETS[args.preset]
    if args.layers is not None:
        if not 1 <= args.layers <= _MAX_LAYERS:
            raise DSV4Error(f"--layers {args.layers}: from 1 to {_MAX_LAYERS}")
        config = with_layers(config, args.layers)
    folder = Path(args.out).expanduser()
    started = time.perf_counter()
    _check_layout(args.layout)
    size = estimated_bytes(config, args.layout)
    narrate(f"writing {args.preset}, {config.num_hidden_layers} layers, {bytes_text(size)}")
    write_checkpoint(folder, config, args.layout, args.seed, progress)
    stored = sum(path.stat().st_size for path in folder.iterdir())
    seconds = time.perf_counter() - started
    if args.json:
        print_json(
            {
                "folder": str(folder),
                "preset": args.preset,
                "layout": args.layout,
                "layers": config.num_hidden_layers,
                "seed": args.seed,
                "bytes": stored,
                "files": sorted(path.name for path in folder.iterdir()),
                "seconds": seconds,
            }
        )
    else:
        print(f"{folder}: {bytes_text(stored)} in {seconds:.1f} s")
    return ExitCode.OK


def _check_layout(layout: str) -> None:
    from dsv4_bench.engine.synthetic import LAYOUTS

    if layout not in LAYOUTS:
        raise DSV4Error(f"unknown layout {layout!r}", did_you_mean(layout, LAYOUTS))
