"""Counters of the kernels behind rows of bench_cuda, from Nsight Compute: what limits a row.

    python tests/count_cuda.py GLOB ... [--json OUT.json]

Each call is cold, as ncu empties the caches before every kernel. `aims` instead of globs: every row whose aim
is in the records of docs/bench and was missed there. Needs ncu and a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_cuda import cases, describe_device

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.timing import ncu

RECORDS = Path(__file__).parents[1] / "docs" / "bench"


def missed(records: Iterable[Path]) -> list[str]:
    """ "<op> <shape>" of the recorded rows that are slower than their aim."""
    rows = [row for record in records for row in json.loads(record.read_text())["rows"]]
    slower = (r for r in rows if "op" in r and r.get("aim_us") and r["us"] > r["aim_us"])
    return [f"{row['op']} {row['shape']}" for row in slower]


def call_each(patterns: Sequence[str]) -> None:
    """What runs under ncu: one call of each case, in a range that is named by the case's number."""
    for number, case in enumerate(cases(patterns)):
        call = case.make(0)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        with torch.cuda.nvtx.range(f"L{number}/{case.op}"):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def named(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """ncu's rows with `case` in place of the range's name; those outside of all ranges are left out."""
    found = []
    for row in rows:
        number = row["site"].partition("/")[0].removeprefix("L")
        if number.isdigit() and int(number) < len(names):
            rest = {key: value for key, value in row.items() if key != "site"}
            found.append({"case": names[int(number)], **rest})
    return found


def line(row: dict[str, Any]) -> str:
    stalls = "  ".join(f"{name} {value:.2f}" for name, value in row["stalls"].items())
    share = "  ".join(f"{name} {row[name] or 0:.0f} %" for name in ("dram", "compute", "occupancy"))
    return (
        f"{row['case']:<44} {1e6 * row['cold']:>9.2f} us  {share}  {stalls}  {row['kernel'][:60]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("patterns", nargs="+", help="globs of '<op> <shape>', or: aims")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--called", action="store_true", help=argparse.SUPPRESS)  # under ncu
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("count_cuda: torch sees no CUDA device", file=sys.stderr)
        return 3
    patterns = args.patterns
    if patterns == ["aims"]:
        patterns = missed(sorted(RECORDS.glob("cuda_*_h200.json")))
    if args.called:
        call_each(patterns)
        return 0
    names = [case.name for case in cases(patterns)]
    torch.cuda.empty_cache()
    try:
        with tempfile.TemporaryDirectory() as folder:
            child = [sys.executable, __file__, "--called", *patterns]
            rows = named(ncu.record(Path(folder) / "ncu.csv", child), names)
    except DSV4Error as error:
        print(f"count_cuda: {error}\nhint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    for row in rows:
        print(line(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps({**describe_device(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
