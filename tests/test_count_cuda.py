"""Counters of benchmark rows: which rows are asked for, and which kernels are whose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from count_cuda import line, missed, named


def test_rows_that_missed_their_aim(tmp_path: Path) -> None:
    rows = [
        {"op": "linear", "shape": "a", "us": 8.0, "aim_us": 7.5},
        {"op": "linear", "shape": "b", "us": 7.0, "aim_us": 7.5},
        {"op": "rope", "shape": "c", "us": 7.0, "aim_us": None},
        {"layer": "CSA", "us": 120.0, "aim_us": 110},  # of many ops
    ]
    record = tmp_path / "cuda_x.json"
    record.write_text(json.dumps({"rows": rows}))
    assert missed([record]) == ["linear a"]


def test_kernels_belong_to_the_case_of_their_range() -> None:
    counted = {"seconds": 1e-6, "cold": 2e-6, "dram": 50.0, "compute": None, "occupancy": 9.5}
    rows = [
        {"site": site, "kernel": kernel, "stalls": {"barrier": 0.5}, **counted}
        for site, kernel in (
            ("L1/attention", "k"),
            ("", "copy"),
            ("L0/linear", "few"),
            ("L7/x", "y"),
        )
    ]
    found = named(rows, ["linear a", "attention b"])
    assert [(row["case"], row["kernel"]) for row in found] == [
        ("attention b", "k"),
        ("linear a", "few"),
    ]
    assert "2.00 us" in line(found[0]) and "barrier 0.50" in line(found[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    script = Path(__file__).with_name("count_cuda.py")
    done = subprocess.run([sys.executable, script, "aims"], capture_output=True, text=True)
    assert done.returncode == 3 and "no CUDA device" in done.stderr
