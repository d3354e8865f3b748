"""Runs compute-sanitizer's tools over every CUDA kernel, side by side, and records what they found.

    python tests/sanitize.py OUT [--tools memcheck,racecheck] [--parts 'linear*'] [--jobs 14] [--within 110]
    compute-sanitizer --tool memcheck --kernel-regex kns=dsv4 python tests/sanitize.py --part topk

A part is a group of cases in one process (PARTS of the sanitize_cuda*.py files); a case only runs kernels, the
tool says whether all went well. Beside the tools all parts run once under torch's profiler: what they launched
must be all kernels that the compiler reported for their sources. OUT/sanitize.json is written after every
result: {"device", ..., "commit", "results": [{"tool", "part", "errors", "seconds"}], "missing"}; errors are null
where a process did not end well or in time, `missing` are kernels that no part launched (null: not known).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import children

TOOLS = ("synccheck", "memcheck", "initcheck", "racecheck")  # by far the slowest last
_SUMMARY = re.compile(r"SUMMARY: (\d+) (?:error|hazard)")
_LAUNCHED = "LAUNCHED "  # begins the line with what the parts launched


class Result(NamedTuple):
    tool: str
    part: str
    errors: int | None
    seconds: float


# ------------------------------------------------------------------------------ in a process of its own


def run_part(name: str) -> None:
    import torch
    from sanitize_parts import PARTS

    torch.manual_seed(1)
    began = time.monotonic()
    PARTS[name].run()
    torch.cuda.synchronize()
    print(f"ran in {time.monotonic() - began:.1f} s")


def print_launches(names: list[str]) -> None:
    """Run parts under the profiler, and print which kernels of ours each launched, as JSON."""
    import torch
    from sanitize_parts import PARTS
    from torch.profiler import ProfilerActivity, profile

    from dsv4_bench.engine import ptxas

    found = {}
    for name in names:
        torch.manual_seed(1)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            try:
                PARTS[name].run()
                torch.cuda.synchronize()
            except Exception:  # what it did not launch will be missing
                traceback.print_exc()
        kernels = {event.key for event in recorded.key_averages() if "dsv4" in event.key}
        found[name] = sorted(ptxas.without_arguments(kernel) for kernel in kernels)
        print(f"{name}: {len(found[name])} kernels", flush=True)
    print(_LAUNCHED + json.dumps(found))


def missing_kernels(launched: dict[str, list[str]]) -> list[str]:
    """ "source: kernel" of every kernel of the parts' sources that none of its parts launched."""
    from sanitize_parts import PARTS

    from dsv4_bench.engine import cuda, ptxas

    missing = []
    for source in sorted({source for part in launched for source in PARTS[part].sources}):
        seen = {k for part in launched if source in PARTS[part].sources for k in launched[part]}
        built = ptxas.resources_of(cuda.library.library_path(source))
        kernels = ptxas.demangled([entry.kernel for entry in built])
        missing += [f"{source}: {kernel}" for kernel in kernels if kernel not in seen]
    return missing


# ------------------------------------------------------------------------------ beside each other


class Runner:
    """Processes that all end within `seconds` from now; their output goes to files in `out`."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out = out
        self.end = time.monotonic() + seconds

    def log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def ran(self, name: str, command: list[str]) -> bool:
        """Whether the command ended with status 0."""
        return children.ended(command, self.log(name), self.end - time.monotonic()) == 0

    def check(self, tool: str, part: str) -> Result:
        began, name = time.monotonic(), f"{tool}.{part}"
        options = ["--tool", tool, "--kernel-regex", "kns=dsv4", "--print-limit", "20"]
        script = [sys.executable, __file__, "--part", part]
        ended = self.ran(name, ["compute-sanitizer", *options, *script])
        found = _SUMMARY.findall(self.log(name).read_text(errors="replace"))
        errors = int(found[0]) if found else None
        well = ended or errors
        return Result(tool, part, errors if well else None, round(time.monotonic() - began, 1))

    def missing(self, parts: list[str]) -> list[str] | None:
        command = [sys.executable, __file__, "--launches", "--parts", ",".join(parts)]
        if not self.ran("launches", command):
            return None
        lines = self.log("launches").read_text(errors="replace").splitlines()
        last = next(line for line in reversed(lines) if line.startswith(_LAUNCHED))
        return missing_kernels(json.loads(last.removeprefix(_LAUNCHED)))


def check_all(
    runner: Runner, tools: list[str], parts: list[str], jobs: int, header: dict[str, Any]
) -> bool:
    """Every tool over every part; whether all are clean. Prints and records results as they come."""
    results: list[Result] = []
    record: dict[str, Any] = {**header, "results": [], "missing": None}

    def write() -> None:
        record["results"] = [result._asdict() for result in sorted(results, key=lambda r: r[:2])]
        (runner.out / "sanitize.json").write_text(json.dumps(record, indent=1) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        launches = pool.submit(runner.missing, parts)
        waiting = [pool.submit(runner.check, tool, part) for tool in tools for part in parts]
        for done in as_completed(waiting):
            result = done.result()
            results.append(result)
            words = "did not end well" if result.errors is None else f"{result.errors} errors"
            print(f"{result.tool} {result.part}: {words}, {result.seconds} s", flush=True)
            write()
    missing = record["missing"] = launches.result()
    write()
    if missing is None:
        print("launches: did not end well")
    for kernel in missing or ():
        print(f"launched by no part: {kernel}")
    clean = sum(result.errors == 0 for result in results)
    print(f"sanitize: {clean} of {len(results)} runs clean")
    return clean == len(results) and missing == []


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder for logs and sanitize.json")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--parts", default="*", help="globs, with commas")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    parser.add_argument("--within", type=float, default=600, help="seconds for everything")
    parser.add_argument("--commit", default="", help="of the tree that is checked")
    parser.add_argument("--part", help="run its cases in this process")
    parser.add_argument("--launches", action="store_true", help="print what the parts launch")
    args = parser.parse_args()
    if args.part:
        run_part(args.part)
        return 0
    runner = args.out and Runner(args.out, args.within)
    from sanitize_parts import PARTS

    globs = args.parts.split(",")
    parts = [name for name in PARTS if any(fnmatchcase(name, glob) for glob in globs)]
    if args.launches:
        print_launches(parts)
        return 0
    if runner is None:
        parser.error("give OUT, a folder, or --part")
    if shutil.which("compute-sanitizer") is None:
        print("sanitize: there is no compute-sanitizer in the path", file=sys.stderr)
        return 3
    from bench_cuda import describe_device

    children.end_with_this_process()
    args.out.mkdir(parents=True, exist_ok=True)
    header = {**describe_device(), "commit": args.commit}
    return 0 if check_all(runner, args.tools.split(","), parts, args.jobs, header) else 1


if __name__ == "__main__":
    sys.exit(main())
