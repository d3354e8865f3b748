"""Nsight Systems: record a run, read its report, join kernels to sites

A kernel belongs to the site whose NVTX range (domain `dsv4`) holds the call that launched it, found
by correlation id on the same thread. Tables and columns are those of `nsys export --type sqlite`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, ExitCode
from dsv4_bench.probes.nvtx import DOMAIN, LAYER

_MAJORS = (2, 3)  # export schemas whose tables are those read here
_PUSH_POP, _START_END, _DOMAIN_CREATE = 59, 60, 75
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
MEASURE = "measure"  # the range around what is recorded


# ------------------------------------------------------------------------------ recording


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
        raise _bad(report, f"nsys cannot export it: {lines[-1] if lines else done.returncode}")


# ------------------------------------------------------------------------------ reading


@dataclass
class Range:
    """One NVTX range of ours; `kernels` are those launched inside it and in none further in."""

    name: str
    start: int
    end: int
    thread: int
    payload: int | None
    parent: Range | None = None
    kernels: list[Kernel] = field(default_factory=list)


@dataclass
class Kernel:
    """One kernel on the GPU, times in ns; `launch` is the duration of the call that launched it."""

    name: str
    start: int
    end: int
    stream: int
    launch: int = 0


@dataclass
class Recording:
    """What was read: nsys's version, our ranges in order of their start, all kernels."""

    version: str
    ranges: list[Range]
    kernels: list[Kernel]
    unjoined: int  # kernels launched outside every range of ours


def _bad(path: Path, problem: str, hint: str = "") -> DSV4Error:
    return DSV4Error(f"{path}: {problem}", hint, ExitCode.BAD_INPUT)


def read(path: Path) -> Recording:
    """Read an exported database. Raises DSV4Error with exit code 4 for anything that is not one."""
    if not path.is_file():
        raise _bad(path, "no such file")
    with _open(path) as base:
        version = _version(base, path)
        ranges = _ranges(base, path)
        kernels, launched = _kernels(base)
    unjoined = _join(ranges, kernels, launched)
    return Recording(version, ranges, kernels, unjoined)


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as base:
            pages, size = (
                base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
            )
            if pages * size > path.stat().st_size or pages == 0:
                raise _bad(path, f"cut off: {path.stat().st_size} of {pages * size} bytes")
            yield base
    except sqlite3.Error as error:
        raise _bad(path, f"not a database that nsys exported ({error})") from None


def _version(base: sqlite3.Connection, path: Path) -> str:
    if "META_DATA_EXPORT" not in _tables(base):
        raise _bad(
            path, "table META_DATA_EXPORT is missing", "`nsys export --type sqlite` makes one"
        )
    meta = dict(base.execute("SELECT name, value FROM META_DATA_EXPORT"))
    schema = str(meta.get("EXPORT_SCHEMA_VERSION", ""))
    major = schema.partition(".")[0]
    if not major.isdigit() or int(major) not in _MAJORS:
        known = " and ".join(map(str, _MAJORS))
        raise _bad(path, f"export schema {schema or 'unknown'}; read here: {known}",
                   "export it with another version of nsys")  # fmt: skip
    return str(meta.get("EXPORT_PRODUCT_VERSION", "unknown"))


def _tables(base: sqlite3.Connection) -> set[str]:
    return {row[0] for row in base.execute("SELECT name FROM sqlite_master")}


def _ranges(base: sqlite3.Connection, path: Path) -> list[Range]:
    hint = (
        "record with `nsys profile --trace=nvtx,cuda`, and set NSYS_NVTX_PROFILER_REGISTER_ONLY=0"
    )
    if "NVTX_EVENTS" not in _tables(base):
        raise _bad(path, "no NVTX events were recorded", hint)
    text = "COALESCE(e.text, s.value)"
    joined = "NVTX_EVENTS e LEFT JOIN StringIds s ON e.textId = s.id"
    domains = base.execute(
        f"SELECT e.domainId, e.globalTid FROM {joined} WHERE e.eventType = ? AND {text} = ?",
        (_DOMAIN_CREATE, DOMAIN),
    ).fetchall()
    if not domains:
        raise _bad(path, f"NVTX was recorded, but nothing in the domain {DOMAIN}", hint)
    ids = tuple({row[0] for row in domains})
    marks = ",".join("?" * len(ids))
    rows = base.execute(
        f"SELECT {text}, e.start, e.end, e.globalTid, COALESCE(e.int64Value, e.uint64Value) "
        f"FROM {joined} WHERE e.eventType IN (?, ?) AND e.domainId IN ({marks}) "
        "AND e.end IS NOT NULL ORDER BY e.start, e.end DESC",
        (_PUSH_POP, _START_END, *ids),
    )
    ranges = [
        Range(str(name), start, end, thread, number) for name, start, end, thread, number in rows
    ]
    if not ranges:
        raise _bad(path, f"no range of the domain {DOMAIN} was closed while it recorded", hint)
    return _nest(ranges)


def _nest(ranges: list[Range]) -> list[Range]:
    """Give every range its parent: the innermost one around it on its thread."""
    stacks: dict[int, list[Range]] = defaultdict(list)
    for item in ranges:
        stack = stacks[item.thread]
        while stack and stack[-1].end < item.end:
            stack.pop()
        item.parent = stack[-1] if stack else None
        stack.append(item)
    return ranges


Launches = dict[int, tuple[int, int, int]]  # correlation id -> start, end, thread


def _kernels(base: sqlite3.Connection) -> tuple[list[Kernel], list[tuple[int, int, int]]]:
    """Kernels by start, each with start, end and thread of its launch (-1 where that is unknown)."""
    tables = _tables(base)
    if "CUPTI_ACTIVITY_KIND_KERNEL" not in tables:
        return [], []
    launches: Launches = {}
    if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
        query = "SELECT correlationId, start, end, globalTid FROM CUPTI_ACTIVITY_KIND_RUNTIME"
        launches = {row[0]: (row[1], row[2], row[3]) for row in base.execute(query)}
    rows = base.execute(
        "SELECT COALESCE(s.value, 'kernel'), k.start, k.end, k.streamId, k.correlationId "
        "FROM CUPTI_ACTIVITY_KIND_KERNEL k LEFT JOIN StringIds s ON k.shortName = s.id "
        "ORDER BY k.start"
    )
    kernels, places = [], []
    for name, start, end, stream, correlation in rows:
        place = launches.get(correlation, (-1, -1, -1))
        kernels.append(Kernel(str(name), start, end, stream, place[1] - place[0]))
        places.append(place)
    return kernels, places


def _join(ranges: list[Range], kernels: list[Kernel], launched: list[tuple[int, int, int]]) -> int:
    """Put every kernel into the innermost range around its launch; how many lie in none."""
    by_thread: dict[int, list[Range]] = defaultdict(list)
    for item in ranges:
        by_thread[item.thread].append(item)
    order = sorted(range(len(kernels)), key=lambda i: launched[i][0])
    cursor = dict.fromkeys(by_thread, 0)
    stacks: dict[int, list[Range]] = {thread: [] for thread in by_thread}
    unjoined = 0
    for index in order:
        start, _, thread = launched[index]
        stack, own = stacks.get(thread, []), by_thread.get(thread, [])
        while cursor.get(thread, 0) < len(own) and own[cursor[thread]].start <= start:
            stack.append(own[cursor[thread]])
            cursor[thread] += 1
        while stack and stack[-1].end < start:
            stack.pop()
        if stack:
            stack[-1].kernels.append(kernels[index])
        else:
            unjoined += 1
    return unjoined


# ------------------------------------------------------------------------------ summary


def summary(recording: Recording) -> list[dict[str, Any]]:
    """One row per site and implementation, in order of first use; times are medians in seconds.

    `host`: the range itself. `gpu`: its kernels; `gaps`: idle between them; `launch`: the calls that
    launched them; `kernels`: calls per range and seconds by name.
    """
    groups: dict[tuple[str, str], list[Range]] = defaultdict(list)
    for item in recording.ranges:
        site, route = _place(item)
        if site:
            groups[site, route].append(item)
    inner = {site for site, route in groups if route}
    chosen = {key: found for key, found in groups.items() if key[1] or key[0] not in inner}
    return [_row(site, route, found) for (site, route), found in chosen.items()]


def _place(item: Range) -> tuple[str, str]:
    """(site, implementation) of a range: a site's own range, or the one just inside it."""
    if is_site(item.name):
        return item.name, ""
    if item.parent is not None and is_site(item.parent.name):
        return item.parent.name, item.name
    return "", ""


def is_site(name: str) -> bool:
    """Whether a range is named like a site: embed, head/..., L12/..."""
    first = name.partition("/")[0]
    return first in ("embed", "head") or (first[:1] == "L" and first[1:].isdigit())


def _row(site: str, route: str, found: list[Range]) -> dict[str, Any]:
    by_name: dict[str, list[Kernel]] = defaultdict(list)
    for item in found:
        for kernel in item.kernels:
            by_name[kernel.name].append(kernel)
    kernels = [
        {
            "name": name,
            "calls": len(same) / len(found),
            "seconds": statistics.median(k.end - k.start for k in same) / 1e9,
        }
        for name, same in by_name.items()
    ]
    place = found[0].parent if route else found[0]
    payload = place.payload if place is not None else None
    return {
        "site": site,
        "route": route,
        "layer": payload // LAYER if payload is not None and payload >= 0 else None,
        "calls": len(found),
        "host": statistics.median(item.end - item.start for item in found) / 1e9,
        "gpu": statistics.median(sum(k.end - k.start for k in i.kernels) for i in found) / 1e9,
        "gaps": statistics.median(_idle(item.kernels) for item in found) / 1e9,
        "launch": statistics.median(sum(k.launch for k in i.kernels) for i in found) / 1e9,
        "kernels": sorted(kernels, key=lambda row: -row["calls"] * row["seconds"]),
    }


def _idle(kernels: list[Kernel]) -> int:
    """ns between the first kernel's start and the last one's end in which none ran."""
    if not kernels:
        return 0
    ordered = sorted(kernels, key=lambda k: k.start)
    idle, busy_until = 0, ordered[0].start
    for kernel in ordered:
        idle += max(0, kernel.start - busy_until)
        busy_until = max(busy_until, kernel.end)
    return idle
