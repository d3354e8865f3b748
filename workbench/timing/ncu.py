"""Nsight Compute: counters of every kernel of a layer, joined to its site

ncu replays each kernel many times with empty caches, so a run under it is never timed. It profiles what
lies between cudaProfilerStart and Stop, and prints the NVTX ranges around each kernel. How long a kernel
takes is asked in a run of its own, where nothing is replayed and the caches are as we fill them: those
that read what the op before has written take up to twice as long with empty ones.
"""

from __future__ import annotations

import csv
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, ExitCode
from dsv4_bench.workbench.cli import output
from dsv4_bench.workbench.timing.recording import is_site

_STALL = "smsp__average_warps_issue_stalled_"
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "compute": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "dram_bytes": "dram__bytes.sum",
}


def command(log: Path, child: Sequence[str], timed: bool = False) -> list[str]:
    """The ncu command for `child`, which starts and stops the profiler itself; `timed`: durations alone."""
    stalls = f"regex:{_STALL}.*_per_issue_active.ratio"
    metrics = METRICS["seconds"] if timed else ",".join([*METRICS.values(), stalls])
    return [
        "ncu", "--clock-control", "none", "--cache-control", "none" if timed else "all",
        "--profile-from-start", "off", "--nvtx", "--csv", "--page", "raw", "--print-units", "base",
        "--metrics", metrics, "--log-file", str(log), *child,
    ]  # fmt: skip


def record(log: Path, child: Sequence[str]) -> list[dict[str, Any]]:
    """Run `child` under ncu twice; one row a kernel (see `read`), with `cold`: seconds with empty caches.

    `seconds` are those with caches as in a forward pass, None where the runs launched other kernels.
    Raises CannotAnswer without ncu, DSV4Error with the child's code if it failed.
    """
    if shutil.which("ncu") is None:
        words = shlex.join(command(log, child))
        raise CannotAnswer("ncu is not installed here", f"where it is: {words}")
    output.narrate(f"counting under ncu into {log.name}; every kernel is replayed, this takes long")
    rows = _run(command(log, child), log)
    times = log.with_name(f"{log.stem}.times.csv")
    timed = _run(command(times, child, timed=True), times)
    same = [row["kernel"] for row in rows] == [row["kernel"] for row in timed]
    seconds = [row["seconds"] for row in timed] if same else [None] * len(rows)
    return [
        {**row, "seconds": warm, "cold": row["seconds"]}
        for row, warm in zip(rows, seconds, strict=True)
    ]


def _run(words: list[str], log: Path) -> list[dict[str, Any]]:
    """The rows that a run of ncu leaves in `log`."""
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise DSV4Error(f"under ncu: {' / '.join(lines)}", exit_code=done.returncode)
    return read(log)


def read(log: Path) -> list[dict[str, Any]]:
    """Rows of an ncu csv: site, kernel, seconds, percentages, registers, stalls (worst three).

    Raises DSV4Error (exit code 4) for a file that is no ncu csv.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        raise DSV4Error(f"{log}: {error.strerror}", exit_code=ExitCode.BAD_INPUT) from None
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        said = [line for line in lines if line.startswith("==")][-2:]
        raise DSV4Error(
            f"{log} holds no table of kernels", " / ".join(said), exit_code=ExitCode.BAD_INPUT
        )
    table = list(csv.DictReader(io.StringIO("\n".join(lines[first:]))))
    return [_row(entry) for entry in table if (entry.get("ID") or "").isdigit()]


def _row(entry: dict[str, str]) -> dict[str, Any]:
    ranges = " ".join(str(value) for name, value in entry.items() if name and "Range" in name)
    words = [word.strip("\"'") for word in re.split(r"[\s,;:<>]+", ranges)]
    site = next((n for n, word in enumerate(words) if is_site(word)), None)
    row: dict[str, Any] = {
        "site": words[site] if site is not None else "",
        "kernel": entry.get("Kernel Name", ""),
    }
    for name, metric in METRICS.items():
        value = _number(entry.get(metric))
        row[name] = value / 1e9 if name == "seconds" and value is not None else value
    stalls = {
        name.removeprefix(_STALL).removesuffix("_per_issue_active.ratio"): _number(value) or 0.0
        for name, value in entry.items()
        if name and name.startswith(_STALL)
    }
    row["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:3])
    return row


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
