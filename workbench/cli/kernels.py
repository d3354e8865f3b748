"""`dsv4-bench kernels`: the matrix of ops and implementations."""

from __future__ import annotations

import argparse
from typing import Any

from dsv4_bench.workbench.cli import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the activations")
    parser.add_argument("--device", choices=("cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    rows = kernel_rows(args)
    if args.json:
        output.print_json({"kernels": rows})
        return 0
    cells = [
        (r["op"], r["implementation"], "yes" if r["available"] else "no", r["hash"], r["reason"])
        for r in rows
    ]
    print(output.table(("op", "implementation", "available", "code", "why not"), cells))
    return 0


def kernel_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per op and implementation, ops in data-flow order."""
    import dsv4_bench.engine.cpu
    import dsv4_bench.engine.cuda
    import dsv4_bench.engine.ops  # noqa: F401
    from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS, Context
    from dsv4_bench.workbench.loading import load_plugins, pick_device, pick_dtype

    load_plugins(args.plugin)
    device = pick_device(args.device)
    context = Context(device.type, pick_dtype(args.dtype, device))
    rows = []
    for op in OPS:
        for name, impl in IMPLEMENTATIONS[op].items():
            reason = impl.unavailable(context)
            rows.append(
                {
                    "op": op,
                    "implementation": name,
                    "available": reason is None,
                    "reason": reason or "",
                    "hash": impl.hash if reason is None else "",
                    "contract": OPS[op].doc.partition("\n")[0],
                }
            )
    return rows
