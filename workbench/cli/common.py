"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """--route, --dtype, --device, --numerics: how the engine runs."""
    parser.add_argument(
        "--route",
        action="append",
        metavar="R",
        help="SITE_GLOB=IMPL or IMPL (kernel, reference, cpu, ...); repeatable, later wins",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the activations")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument(
        "--numerics",
        choices=("plain", "official"),
        default="plain",
        help="official simulates the release's quantisation of activations and KV (not built yet)",
    )


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """--gpu-memory and --kv: what is kept where, for commands that run the model from end to end."""
    parser.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="of weights on the GPU, e.g. 80GB; layers beyond it are streamed from host memory "
        "(default: what is free, less an eighth)",
    )
    parser.add_argument(
        "--kv",
        choices=("dtype", "fp8"),
        default="dtype",
        help="cached keys as the activations are (default), or fp8 entries of 584 bytes",
    )


def add_graph_argument(parser: argparse.ArgumentParser) -> None:
    """--no-graph, for commands that decode."""
    parser.add_argument(
        "--no-graph", action="store_true", help="on a GPU: decode op by op, not from a CUDA graph"
    )


def check_numerics(args: argparse.Namespace) -> None:
    """Raise CannotAnswer for numerics the engine does not have."""
    if args.numerics != "plain":
        raise CannotAnswer(
            f"--numerics {args.numerics} is not built yet",
            "plain, the default, leaves out the simulated quantisation of activations and KV",
        )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """--prompt or --tokens, and --chunks."""
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--tokens", metavar="FILE", help="a JSON list of token ids")
    parser.add_argument(
        "--chunks", metavar="N,N,...", help="feed the prompt in these pieces; the last size repeats"
    )


def parse_chunks(text: str | None) -> tuple[int, ...]:
    """``128,1,1`` -> (128, 1, 1). Raises DSV4Error."""
    if text is None:
        return ()
    try:
        sizes = tuple(int(part) for part in text.removesuffix("...").rstrip(",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(size < 1 for size in sizes):
        raise DSV4Error(f"--chunks {text!r}: sizes are positive integers", "e.g. --chunks 128,1,1")
    return sizes


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The dictionary `load_model` takes. Raises CannotAnswer for numerics that are not built."""
    check_numerics(args)
    memory = {"gpu_memory": args.gpu_memory, "kv": args.kv} if hasattr(args, "kv") else {}
    return {
        **memory,
        "checkpoint": args.checkpoint,
        "route": args.route or ["kernel"],
        "dtype": args.dtype,
        "device": args.device,
        "plugins": args.plugin,
    }


def read_tokens(path: str | None, prompt: str | None = None) -> list[int] | None:
    """The ids in FILE, without importing the engine. Raises DSV4Error if there is a prompt too."""
    if path is None:
        return None
    if prompt is not None:
        raise DSV4Error("--prompt and --tokens are both given", "one of them says what is fed")
    from dsv4_bench.engine.tokens import read_token_file

    return read_token_file(path)


def add_session_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything a session can be opened with."""
    add_engine_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=8, metavar="N")
    parser.add_argument("--probes", metavar="a,b", help="all, none, or names (default: most)")
    parser.add_argument("--shadow", metavar="GLOB", help="run the other route too: on, or a glob")
    parser.add_argument(
        "--connect",
        metavar="CMD",
        help='start the worker by this, e.g. "ssh gpubox dsv4-bench worker"',
    )


def session_options(args: argparse.Namespace) -> Any:
    """SessionOptions from parsed arguments."""
    from dsv4_bench.workbench.session import SessionOptions

    check_numerics(args)
    if args.max_new_tokens < 0:
        raise DSV4Error(f"--max-new-tokens {args.max_new_tokens} is negative", "0 or more")
    fields: dict[str, Any] = {}
    if args.probes is not None:
        names = args.probes.replace(",", " ").split()
        fields["probes"] = () if names == ["none"] else tuple(names)
    return SessionOptions(
        checkpoint=args.checkpoint,
        prompt=args.prompt,
        tokens=read_tokens(args.tokens, args.prompt),
        chunks=parse_chunks(args.chunks),
        max_new_tokens=args.max_new_tokens,
        route=tuple(args.route or ["kernel"]),
        dtype=args.dtype,
        device=args.device,
        plugins=tuple(args.plugin),
        shadow=args.shadow or "",
        connect=args.connect,
        **fields,
    )
