"""Puts the benchmarks of one tests/gpu_run.sh into the records that the repository keeps (docs/bench).

    python tests/bench_record.py OUT --commit COMMIT [--records docs/bench]

Records carry the device's short name; each says the commit. What OUT lacks stays as it was, and so
do the keys of a record that a run does not write (`tiles` of cutedsl, `tensors` of the probes).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RECORDS = Path(__file__).parents[1] / "docs" / "bench"
# Name of the record -> files of the run, whose rows it holds one after another.
FILES = {
    **{f"cuda_{table}": [f"cuda_{table}"] for table in ("attention", "experts", "linear", "kv")},
    "cuda_dsl": ["cuda_dsl"],
    "cuda_layer": ["layer", "layer_kinds", "model"],
    "cuda_counters": ["counters"],
    "probes": ["probes"],
}


def with_peers(rows: Iterable[Row], others: Iterable[Row], named: tuple[str, ...]) -> None:
    """Add to each row the peers that another run of the same case has: `named` says what makes a case."""
    found = {tuple(row.get(name) for name in named): row.get("peers_us", {}) for row in others}
    for row in rows:
        extra = found.get(tuple(row.get(name) for name in named))
        if extra:
            row["peers_us"] = {**extra, **row.get("peers_us", {})}


def record(out: Path, files: Sequence[Path], commit: str, before: dict[str, Any]) -> dict[str, Any]:
    """What becomes of the record `before` by the reports `files` of the run in `out`."""
    reports = [json.loads(file.read_text()) for file in files]
    rows = [row for report in reports for row in report["rows"]]
    for file, named in (
        ("cuda_humming", ("op", "shape")),
        ("layer_peers", ("layer", "batch", "context")),
    ):
        others = out / f"{file}.json"
        if others.exists() and named[0] in rows[0]:
            with_peers(rows, json.loads(others.read_text())["rows"], named)
    head = {key: value for key, value in reports[0].items() if key != "rows"}
    return {**before, **head, "commit": commit, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--device", default="h200")
    args = parser.parse_args()
    written = 0
    for name, stems in FILES.items():
        path = args.records / f"{name}_{args.device}.json"
        files = [file for stem in stems if (file := args.out / f"{stem}.json").exists()]
        if not files:
            continue
        before = json.loads(path.read_text()) if path.exists() else {}
        made = record(args.out, files, args.commit, before)
        path.write_text(json.dumps(made, indent=1) + "\n")
        print(f"{path.name}: {len(made['rows'])} rows")
        written += 1
    if not written:
        print(f"bench_record: {args.out} holds no report of gpu_run.sh", file=sys.stderr)
    return 0 if written else 4


if __name__ == "__main__":
    sys.exit(main())
