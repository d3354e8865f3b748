"""Turns pytest's JUnit report of a run on a GPU into the record kept in docs/bench.

python tests/gpu_record.py junit.xml gpu_tests_h200.json
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path
from typing import Any

from bench_cuda import describe_device


def record(report: Path) -> dict[str, Any]:
    """Device, date, and per test file how many passed, failed and were skipped, failures by name."""
    files: dict[str, Counter[str]] = {}
    failed = []
    for case in xml.parse(report).iter("testcase"):
        outcome = "passed"
        for child in case:
            outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}.get(
                child.tag, outcome
            )
        module = (case.get("classname") or "").rpartition(".")[2]
        files.setdefault(module, Counter())[outcome] += 1
        if outcome == "failed":
            failed.append(f"{module}::{case.get('name')}")
    return {**describe_device(), "files": {k: dict(v) for k, v in files.items()}, "failed": failed}


if __name__ == "__main__":
    result = record(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["files"]), f"{len(result['failed'])} failed")
