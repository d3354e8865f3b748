"""Records of benchmarks: rows of several files of one run, peers timed apart, and what a run leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "bench_record.py"


def report(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text(json.dumps({"device": "A", "date": "2026-01-01", "rows": rows}))


def run(out: Path, records: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), "--commit", "abc", "--records", str(records)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_becomes_records(tmp_path: Path) -> None:
    out, records = tmp_path / "out", tmp_path / "bench"
    out.mkdir()
    records.mkdir()
    linear = {"op": "linear", "shape": "m1", "us": 2.0, "peers_us": {"Marlin": 3.0}}
    report(out / "cuda_linear.json", linear, {"op": "linear", "shape": "m8", "us": 3.0})
    report(
        out / "cuda_humming.json",
        {**linear, "us": 9.0, "peers_us": {"Humming": 4.0, "Marlin": 9.0}},
    )
    report(out / "layer.json", {"layer": "CSA", "batch": 1, "context": 4096, "us": 100.0})
    report(out / "model.json", {"layer": "all", "batch": 1, "context": 4096, "us": 5000.0})
    peers = {"layer": "CSA", "batch": 1, "context": 4096, "peers_us": {"transformers": 6000.0}}
    report(out / "layer_peers.json", peers)
    (records / "cuda_linear_h200.json").write_text(
        json.dumps({"commit": "old", "joint": 1, "rows": []})
    )
    (records / "probes_h200.json").write_text("as it was")

    assert run(out, records).returncode == 0
    kept = json.loads((records / "cuda_linear_h200.json").read_text())
    assert kept["commit"] == "abc" and kept["joint"] == 1 and kept["device"] == "A"
    first, second = kept["rows"]
    assert first["us"] == 2.0 and first["peers_us"] == {"Humming": 4.0, "Marlin": 3.0}
    assert "peers_us" not in second
    layers = json.loads((records / "cuda_layer_h200.json").read_text())["rows"]
    assert [row["us"] for row in layers] == [100.0, 5000.0]
    assert layers[0]["peers_us"] == {"transformers": 6000.0} and "peers_us" not in layers[1]
    assert (records / "probes_h200.json").read_text() == "as it was"


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path)
    assert done.returncode == 4 and "no report" in done.stderr
