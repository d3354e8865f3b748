"""`dsv4-bench logits`: teacher-forced logits of every position."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.workbench.cli import common, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_engine_arguments(parser)
    common.add_memory_arguments(parser)
    parser.add_argument("--tokens", metavar="FILE", required=True, help="a JSON list of token ids")
    parser.add_argument(
        "--chunks", metavar="N,N,...", help="feed in these pieces; the last repeats"
    )
    common.add_graph_argument(parser)
    parser.add_argument("-o", "--output", metavar="OUT.safetensors", required=True)


def run(args: argparse.Namespace) -> int:
    tokens = common.read_tokens(args.tokens)
    assert tokens is not None
    chunks = common.parse_chunks(args.chunks)
    target = Path(args.output)
    check_target(target)

    from dsv4_bench.engine.generate import teacher_forced_logits
    from dsv4_bench.workbench.loading import load_model

    loaded = load_model(common.engine_options(args), output.loading)
    for note in loaded.notes:
        output.narrate(f"note: {note}")
    notes = list(loaded.notes)

    def tell(text: str) -> None:
        notes.append(text)
        output.narrate(f"note: {text}")

    started = time.perf_counter()
    logits = teacher_forced_logits(
        loaded.model,
        tokens,
        chunks,
        lambda done, total: output.progress("token", done, total),
        graph=not args.no_graph,
        note=tell,
    )
    seconds = time.perf_counter() - started
    _save(target, logits)
    summary = {
        "output": str(target),
        "shape": list(logits.shape),
        "finite": bool(logits.isfinite().all()),
        "seconds": seconds,
        "route": [str(entry) for entry in loaded.model.route],
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "notes": notes,
    }
    if args.json:
        output.print_json(summary)
    else:
        output.narrate(f"wrote {target}: logits {summary['shape']} in {seconds:.1f} s")
    return 0


def check_target(target: Path) -> None:
    """Raise DSV4Error now if `target` could not be written later."""
    if not target.parent.is_dir():
        raise DSV4Error(
            f"no such folder: {target.parent}", "-o names a file in a folder that exists"
        )
    if target.is_dir():
        raise DSV4Error(f"{target} is a folder", "-o names a file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise CannotAnswer(
            f"cannot write into {target.parent}: {error.strerror}", "-o elsewhere"
        ) from None


def _save(target: Path, logits: object) -> None:
    """Write beside the target and rename, so that no half file is left."""
    from safetensors.torch import save_file

    scratch = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file({"logits": logits}, scratch)  # type: ignore[dict-item]
        os.replace(scratch, target)
    except Exception as error:  # safetensors raises its own class for a full disk
        raise CannotAnswer(f"cannot write {target}: {error}", "is the disk full?") from None
    finally:
        scratch.unlink(missing_ok=True)
