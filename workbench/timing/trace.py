"""A profile as a trace for Perfetto or chrome://tracing

The format is Chrome's: complete events (`ph` X) with times in microseconds, nested by containment on
one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv4_bench.workbench.timing.recording import Recording

Event = dict[str, Any]


def of_document(document: dict[str, Any]) -> dict[str, Any]:
    """Sites end to end by their median times, kernels inside: one row for each route."""
    events: list[Event] = []
    for thread, route in enumerate(("reference", "kernel")):
        events.append(_name(thread, f"{route} route"))
        events += _route(document, route, thread)
    return {
        "traceEvents": events,
        "otherData": {"what": "medians laid end to end, not a recording"},
    }


def _route(document: dict[str, Any], route: str, thread: int) -> Iterator[Event]:
    now = 0.0
    for site in document["sites"]:
        name = site["kernel"] if route == "kernel" else "reference"
        seconds = site["seconds"][name]
        details = {
            "implementation": name,
            "bytes": site["bytes"],
            "flops": site["flops"],
            "floor_us": 1e6 * site["floor"],
            "own_error": site["own_error"] if route == "kernel" else None,
        }
        yield _event(site["site"], now, seconds, thread, details)
        inside, room = now, now + seconds
        for kernel in site["kernels"].get(name, []):
            length = min(kernel["seconds"], room - inside)
            if length <= 0:
                break
            yield _event(kernel["name"], inside, length, thread, {"calls": kernel["calls"]})
            inside += length
        now += seconds


def of_recording(recording: Recording) -> dict[str, Any]:
    """What nsys recorded: our ranges by host thread, kernels by stream, with flows between them."""
    base = min(item.start for item in recording.ranges)
    threads = {t: n for n, t in enumerate(dict.fromkeys(i.thread for i in recording.ranges))}
    events = [_name(number, f"host thread {number}") for number in threads.values()]
    streams = sorted({kernel.stream for kernel in recording.kernels})
    lanes = {stream: len(threads) + n for n, stream in enumerate(streams)}
    events += [_name(lane, f"GPU stream {stream}") for stream, lane in lanes.items()]
    for item in recording.ranges:
        start, seconds = (item.start - base) / 1e9, (item.end - item.start) / 1e9
        events.append(_event(item.name, start, seconds, threads[item.thread], {}))
    for kernel in recording.kernels:
        start, seconds = (kernel.start - base) / 1e9, (kernel.end - kernel.start) / 1e9
        events.append(_event(kernel.name, start, seconds, lanes[kernel.stream], {}))
    return {"traceEvents": events, "otherData": {"nsys": recording.version}}


def _event(name: str, start: float, seconds: float, thread: int, args: dict[str, Any]) -> Event:
    return {
        "name": name, "ph": "X", "ts": 1e6 * start, "dur": 1e6 * seconds, "pid": 1, "tid": thread,
        "args": args,
    }  # fmt: skip


def _name(thread: int, name: str) -> Event:
    return {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
