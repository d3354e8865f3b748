"""Nsight Systems: record a run of this program, and export its report"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, ExitCode
from dsv4_bench.probes.nvtx import DOMAIN
from dsv4_bench.workbench.cli import output

_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
MEASURE = "measure"  # the range around what is recorded


def command(report: Path, child: Sequence[str], cuda: bool) -> list[str]:
    """The nsys command that records `child` while its range `measure` is open."""
    traces = "nvtx,cuda" if cuda else "nvtx"
    return [
        "nsys", "profile", f"--trace={traces}", "--sample=none", "--cpuctxsw=none",
        "--capture-range=nvtx", f"--nvtx-capture={MEASURE}@{DOMAIN}", "--capture-range-end=stop",
        "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0", "--force-overwrite=true",
        *(["--cuda-graph-trace=node"] if cuda else []),
        f"--output={report.with_suffix('')}", *child,
    ]  # fmt: skip


def record(report: Path, child: Sequence[str], cuda: bool) -> str:
    """Run `child` under nsys; its stdout. The report is kept as `report`.

    Raises CannotAnswer without nsys or when it made no report, DSV4Error with the child's own code
    when that failed. A report holds the environment of the process: variables that look like
    secrets are taken out of it first.
    """
    words = command(report, child, cuda)
    if shutil.which("nsys") is None:
        raise CannotAnswer("nsys is not installed here", f"where it is: {shlex.join(words)}")
    output.narrate(f"recording under nsys into {report.name}")
    public = {k: v for k, v in os.environ.items() if not any(word in k.upper() for word in _SECRET)}
    done = subprocess.run(words, capture_output=True, env=public, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise DSV4Error(f"under nsys: {' / '.join(lines)}", exit_code=done.returncode)
    if not report.exists():
        lines = [line for line in done.stdout.splitlines() if line.strip()][-3:]
        raise CannotAnswer(f"nsys made no report {report}", " / ".join(lines))
    return done.stdout


def export(report: Path, database: Path) -> None:
    """A report as sqlite. Raises CannotAnswer without nsys, DSV4Error (exit code 4) if it fails."""
    if shutil.which("nsys") is None:
        raise CannotAnswer(
            f"{report} must be exported first, and nsys is not installed here",
            f"where it is: nsys export --type sqlite -o {database.name} {report.name}",
        )
    words = ["nsys", "export", "--type", "sqlite", "--force-overwrite", "true", "-o",
             str(database), str(report)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0 or not database.exists():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise DSV4Error(
            f"{report}: nsys cannot export it: {lines[-1] if lines else done.returncode}",
            exit_code=ExitCode.BAD_INPUT,
        )
