"""`dsv4-bench kernels`: the matrix of ops and implementations, and what each was verified on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.cli import output

if TYPE_CHECKING:
    from dsv4_bench.engine.registry import Implementation
    from dsv4_bench.engine.verified import Record

NEVER_RUN, NEVER_RUN_ON = "compiled, never run", {"sm100"}  # nobody had the device
HEADER = ("op", "implementation", "available", "code", "verified", "why not")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the activations")
    parser.add_argument("--device", choices=("cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    rows = kernel_rows(args)
    if args.json:
        output.print_json({"kernels": rows})
        return 0
    cells = [
        (
            r["op"],
            r["implementation"],
            "yes" if r["available"] else "no",
            r["hash"],
            verified_text(r["verified"]) or (NEVER_RUN if r["never_run"] else ""),
            r["reason"],
        )
        for r in rows
    ]
    print(output.table(HEADER, cells))
    return 0


def kernel_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per op and implementation, ops in data-flow order."""
    import dsv4_bench.engine.implementations  # noqa: F401  (registers them)
    from dsv4_bench.engine.registry import IMPLEMENTATIONS, OPS, Context
    from dsv4_bench.workbench.loading import load_plugins, pick_device, pick_dtype

    load_plugins(args.plugin)
    device = pick_device(args.device)
    context = Context(device.type, pick_dtype(args.dtype, device))
    records = load_records()
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
                    "never_run": name in NEVER_RUN_ON,
                    "verified": verified(records.get(f"{op}/{name}"), impl),
                    "contract": OPS[op].doc.partition("\n")[0],
                }
            )
    return rows


def load_records() -> dict[str, Record]:
    """The package's records; a damaged file costs a line on stderr, not the listing."""
    from dsv4_bench.engine import verified as records

    try:
        return records.load()
    except DSV4Error as error:
        output.narrate(f"dsv4-bench: warning: {error.message}")
        return {}


def verified(record: Record | None, impl: Implementation) -> dict[str, Any] | None:
    """The record with `standing`: whether it is about the code that is here. None: never verified."""
    return None if record is None else {**record.to_dict(), "standing": record.standing(impl)}


def verified_text(entry: dict[str, Any] | None) -> str:
    """``NVIDIA H200 2026-11-23: error 2.1e-07 of 3.0e-06, 12 tests; changed since``."""
    from dsv4_bench.engine.verified import SAME

    if entry is None:
        return ""
    error = f"error {entry['error']:.1e} of {entry['limit']:.1e}" if entry["limit"] else "same bits"
    text = f"{entry['device']} {entry['date']}: {error}, {entry['tests']} tests"
    if entry["failed"]:
        text += f", {entry['failed']} FAILED"
    return text if entry["standing"] == SAME else f"{text}; {entry['standing']}"
