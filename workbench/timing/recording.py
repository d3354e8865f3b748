"""What Nsight Systems recorded: kernels joined to sites, read from an exported database

A kernel belongs to the site whose NVTX range (domain `dsv4`) holds the call that launched it, found
by correlation id on the same thread. One that a CUDA graph launched belongs to the range in which its
node was captured: the node that ran is a copy of that one, and CUDA_GRAPH_NODE_EVENTS says when
and on which thread each was made. Tables and columns are those of `nsys export --type sqlite`.
"""

from __future__ import annotations

import sqlite3
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.probes.nvtx import DOMAIN, LAYER

_MAJORS = (2, 3)  # export schemas whose tables are those read here
_PUSH_POP, _START_END, _DOMAIN_CREATE = 59, 60, 75


@dataclass
class Range:
    """One NVTX range of ours; `kernels` are those launched inside it and in none further in.

    What was captured in a range is replayed later: `replays` has its kernels by graph launch.
    """

    name: str
    start: int
    end: int
    thread: int
    payload: int | None
    parent: Range | None = None
    kernels: list[Kernel] = field(default_factory=list)
    replays: dict[int, list[Kernel]] = field(default_factory=dict)


@dataclass
class Kernel:
    """One kernel on the GPU, times in ns; `launch` is the duration of the call that launched it.

    `replay` is the correlation id of the graph launch that it was part of; None outside graphs.
    """

    name: str
    start: int
    end: int
    stream: int
    launch: int = 0
    replay: int | None = None


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


Place = tuple[int, int, int]  # start, end and thread of a call
_UNKNOWN: Place = (-1, -1, -1)


def _kernels(base: sqlite3.Connection) -> tuple[list[Kernel], list[Place]]:
    """Kernels by start, each with its place: the call that launched it, or that captured its node."""
    tables = _tables(base)
    if "CUPTI_ACTIVITY_KIND_KERNEL" not in tables:
        return [], []
    launches: dict[int, Place] = {}
    if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
        query = "SELECT correlationId, start, end, globalTid FROM CUPTI_ACTIVITY_KIND_RUNTIME"
        launches = {row[0]: (row[1], row[2], row[3]) for row in base.execute(query)}
    captures = _captures(base) if "CUDA_GRAPH_NODE_EVENTS" in tables else {}
    columns = {row[1] for row in base.execute("PRAGMA table_info(CUPTI_ACTIVITY_KIND_KERNEL)")}
    node_column = "k.graphNodeId" if "graphNodeId" in columns else "NULL"
    rows = base.execute(
        "SELECT COALESCE(s.value, 'kernel'), k.start, k.end, k.streamId, k.correlationId, "
        f"{node_column} FROM CUPTI_ACTIVITY_KIND_KERNEL k "
        "LEFT JOIN StringIds s ON k.shortName = s.id ORDER BY k.start"
    )
    kernels, places = [], []
    for name, start, end, stream, correlation, node in rows:
        kernel = Kernel(str(name), start, end, stream)
        place = launches.get(correlation, _UNKNOWN)
        if node:
            kernel.replay, place = correlation, captures.get(node, _UNKNOWN)
        else:
            kernel.launch = place[1] - place[0]
        kernels.append(kernel)
        places.append(place)
    return kernels, places


def _captures(base: sqlite3.Connection) -> dict[int, Place]:
    """Where every graph node was captured; a node that is a copy counts as the one it was copied from."""
    made: dict[int, Place] = {}
    copied: dict[int, int] = {}
    query = "SELECT start, globalTid, graphNodeId, originalGraphNodeId FROM CUDA_GRAPH_NODE_EVENTS"
    for start, thread, node, original in base.execute(query):
        if original:
            copied[node] = original
        else:
            made[node] = (start, start, thread)
    found = dict(made)
    for node in copied:
        first, seen = node, {node}
        while first in copied and copied[first] not in seen:
            first = copied[first]
            seen.add(first)
        found[node] = made.get(first, _UNKNOWN)
    return found


def _join(ranges: list[Range], kernels: list[Kernel], places: list[Place]) -> int:
    """Put every kernel into the innermost range around its place; how many lie in none."""
    by_thread: dict[int, list[Range]] = defaultdict(list)
    for item in ranges:
        by_thread[item.thread].append(item)
    order = sorted(range(len(kernels)), key=lambda i: places[i][0])
    cursor = dict.fromkeys(by_thread, 0)
    stacks: dict[int, list[Range]] = {thread: [] for thread in by_thread}
    unjoined = 0
    for index in order:
        start, _, thread = places[index]
        stack, own = stacks.get(thread, []), by_thread.get(thread, [])
        while cursor.get(thread, 0) < len(own) and own[cursor[thread]].start <= start:
            stack.append(own[cursor[thread]])
            cursor[thread] += 1
        while stack and stack[-1].end < start:
            stack.pop()
        kernel = kernels[index]
        if not stack:
            unjoined += 1
        elif kernel.replay is None:
            stack[-1].kernels.append(kernel)
        else:
            stack[-1].replays.setdefault(kernel.replay, []).append(kernel)
    return unjoined


# ------------------------------------------------------------------------------ summary


GRAPH = "graph"  # marks the route of what ran inside a CUDA graph


def summary(recording: Recording) -> list[dict[str, Any]]:
    """One row per site and implementation, in order of first use; times are medians in seconds.

    `host`: the range itself. `gpu`: its kernels; `gaps`: idle between them; `launch`: the calls that
    launched them; `kernels`: calls per range and seconds by name. What was replayed from a graph has
    a row of its own, with a replay for a call and no time on the host.
    """
    groups: dict[tuple[str, str], list[Range]] = defaultdict(list)
    for item in recording.ranges:
        site, route = _place(item)
        for kernels in item.replays.values() if site else ():
            copy = Range(item.name, 0, 0, item.thread, item.payload, item.parent, kernels)
            groups[site, f"{route} {GRAPH}".strip()].append(copy)
        if site and not item.replays:
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
    parent = found[0].parent
    place = parent if parent is not None and is_site(parent.name) else found[0]
    payload = place.payload
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
