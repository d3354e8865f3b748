"""Turns pytest's JUnit reports of a run on a GPU into the records that the repository keeps.

    python tests/gpu_record.py JUNIT.xml ... --commit COMMIT [--tests OUT.json] [--verified OUT.json]

--tests: per test file how many passed, failed and were skipped, and the failures by name.
--verified (engine/verified.json, which `dsv4-bench kernels` reads): per op and implementation
{"device", "date", "commit", "hash", "code", "error", "limit", "tests", "failed"}: the error nearest
to its limit over all passed tests, and how many tests there were. Entries of what the reports do not
mention stay. The reports carry the machine and the hashes, so this may run anywhere.
"""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from verified import MACHINE, PROPERTY, used

OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def outcome_of(case: xml.Element) -> str:
    found = [OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES]
    return "failed" if "failed" in found else found[0] if found else "passed"


def properties(case: xml.Element, name: str) -> list[dict[str, Any]]:
    found = (p for p in case.iter("property") if p.get("name") == name)
    return [json.loads(p.get("value") or "") for p in found]


def cases(reports: Iterable[Path]) -> Iterator[xml.Element]:
    for report in reports:
        yield from xml.parse(report).iter("testcase")


def machine_of(reports: Iterable[Path]) -> dict[str, Any]:
    """Device, driver, versions and date; SystemExit if two reports differ or none says."""
    found = {json.dumps(m, sort_keys=True) for c in cases(reports) for m in properties(c, MACHINE)}
    if len(found) != 1:
        raise SystemExit(f"gpu_record: {len(found)} machines in these reports, expected one")
    return dict(json.loads(found.pop()))


def tests_record(reports: Iterable[Path]) -> dict[str, Any]:
    files: dict[str, Counter[str]] = {}
    failed = []
    for case in cases(reports):
        module, outcome = (case.get("classname") or "").rpartition(".")[2], outcome_of(case)
        files.setdefault(module, Counter())[outcome] += 1
        if outcome == "failed":
            failed.append(f"{module}::{case.get('name')}")
    return {"files": {k: dict(v) for k, v in files.items()}, "failed": failed}


def verified_record(reports: Iterable[Path], run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By "op/implementation"; `run` is what all entries share."""
    table: dict[str, dict[str, Any]] = {}
    for case in cases(reports):
        passed = outcome_of(case) == "passed"
        for new in properties(case, PROPERTY):
            key = f"{new['op']}/{new['implementation']}"
            start = {"hash": new["hash"], "code": new["code"], "error": 0.0, "limit": 0.0}
            entry = table.setdefault(key, {**run, **start, "tests": 0, "failed": 0})
            if entry["hash"] != new["hash"]:
                raise SystemExit(f"gpu_record: {key} has two hashes in these reports")
            if not passed:
                entry["failed"] += 1
                continue
            entry["tests"] += 1
            if used(new["error"], new["limit"]) >= used(entry["error"], entry["limit"]):
                entry["error"], entry["limit"] = new["error"], new["limit"]
    return table


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--commit", required=True, help="of the tree that was tested")
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--verified", type=Path)
    args = parser.parse_args()
    machine = {**machine_of(args.reports), "commit": args.commit}
    tests = tests_record(args.reports)
    if args.tests:
        write(args.tests, {**machine, **tests})
    if args.verified:
        before = json.loads(args.verified.read_text()) if args.verified.exists() else {}
        run = {name: machine[name] for name in ("device", "date", "commit")}
        table = {**before, **verified_record(args.reports, run)}
        write(args.verified, dict(sorted(table.items())))
    print(json.dumps(tests["files"]), f"{len(tests['failed'])} failed")


if __name__ == "__main__":
    main()
