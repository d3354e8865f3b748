"""The smaller panes as styled lines: readings, values, breakpoints, watches, death, status. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.op_view import readings_by_site
from dsv4_bench.workbench.tui.plot import Point, line_plot
from dsv4_bench.workbench.tui.records import Event, Value
from dsv4_bench.workbench.tui.spans import (
    ACCENT,
    BAD,
    BOLD,
    DIM,
    GOOD,
    PLAIN,
    TITLE,
    WARN,
    Line,
    width_of,
)
from dsv4_bench.workbench.tui.store import Store

# -- readings


def residual_points(readings: Sequence[Event]) -> list[Point]:
    """(layer, largest residual-stream norm) of the newest forward pass, by layer."""
    norms = [r for r in readings if r["name"] == "norm" and r.get("layer") is not None]
    newest = max((r.get("forward", 0) for r in norms), default=0)
    points: dict[float, float] = {}
    for reading in norms:
        value = reading["value"]
        streams = [v for v in (value if isinstance(value, list) else [value]) if _finite(v)]
        if reading.get("forward", 0) == newest and streams:
            points[float(reading["layer"])] = float(max(streams))
    return sorted(points.items())


def _finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def readings_lines(store: Store, width: int, height: int) -> list[Line]:
    """Residual growth over layers, alarms so far, and what the probes read in this layer."""
    layer = store.state.get("layer")
    lines = _growth(residual_points(store.residual), width, height, layer)
    alarms = store.anomalies()
    title = f"alarms: {len(alarms)}" if alarms else "alarms: none so far"
    lines += [[], [(title, TITLE), ("   ] [ jump" if alarms else "", DIM)]]
    for path in alarms[:8]:
        text = f"{store.sites[path].mark} {path}  {store.sites[path].alarm}"
        lines.append([(fmt.clip(text, width), BAD)])
    if len(alarms) > 8:
        lines.append([(f"  and {len(alarms) - 8} more", DIM)])
    lines += _generated(store.state, width)
    shown_elsewhere = ("stats", "residual", "shadow")
    here = [
        r
        for r in store.layer_readings
        if r["probe"] not in shown_elsewhere or r.get("verdict") == "alarm"
    ]
    if here:
        lines += [[], [(f"layer {layer}", TITLE)], *readings_by_site(here, width)]
    return lines


def _generated(state: Event, width: int) -> list[Line]:
    """The tokens so far and, at the end, the likeliest next ones."""
    ids = state.get("generated") or []
    if not ids:
        return []
    text = repr(state["text"]) if state.get("text") else " ".join(map(str, ids))
    lines: list[Line] = [[], [(f"generated: {len(ids)}", TITLE)], [(fmt.clip(text, width), PLAIN)]]
    for rank, token in enumerate(state.get("top") or (), start=1):
        name = repr(token["text"]) if token.get("text") else str(token["id"])
        lines.append([(f"  {rank}. {fmt.clip(name, 16):<16} p {fmt.number(token['p'])}", DIM)])
    return lines


def _growth(points: list[Point], width: int, height: int, layer: int | None) -> list[Line]:
    lines: list[Line] = [[("residual norm by layer", TITLE)]]
    if width >= 42:
        lines[0].append(("  largest stream", DIM))
    if len(points) < 2:
        return [*lines, [("drawn once two layers have run", DIM)]]
    plot = line_plot(points, min(width, 72), max(6, min(14, height // 2 - 2)), layer)
    lines += [[(row, PLAIN)] for row in plot.split("\n")]
    growth = [(after[1] / before[1], after[0]) for before, after in pairwise(points) if before[1]]
    if growth:
        worst, at = max(growth)
        lines.append([("largest growth ", DIM), (f"{worst:.2f}×", BOLD), (f" at L{at:.0f}", DIM)])
    return lines


# -- values, breakpoints, watches


def values_lines(values: Sequence[Value]) -> list[Line]:
    if not values:
        return [
            [("p  print a slice:   print o[0,:8]", DIM)],
            [("e  any expression:  eval (q*q).mean(-1)", DIM)],
        ]
    lines: list[Line] = []
    for index, value in enumerate(values):
        lines.append([(value.line, BOLD), (f"  {value.title}", DIM)])
        style = PLAIN if index == 0 else DIM
        lines += [[(row, style)] for row in value.text.split("\n")]
        lines.append([])
    return lines


def break_text(entry: Event, width: int) -> str:
    hits = f"{entry['hits']} hit{'' if entry['hits'] == 1 else 's'}"
    room = width - len(hits) - 1
    text = fmt.clip(f"{fmt.BREAK} {entry['number']}  {entry['text']}", room)
    return f"{text:<{room}} {hits}"


def watches_lines(watches: Sequence[Event], width: int) -> list[Line]:
    if not watches:
        return [[("w  evaluate at every stop", DIM)]]
    lines: list[Line] = []
    for watch in watches:
        lines.append([(watch["expression"], BOLD)])
        text, style = (watch["error"], WARN) if "error" in watch else (watch.get("text", ""), PLAIN)
        lines += [[("  " + fmt.clip(row, width - 2), style)] for row in str(text).split("\n")[:4]]
    return lines


# -- opening, death, status


def opening_lines(checkpoint: str, progress: str) -> list[Line]:
    return [
        [("opening ", BOLD), (checkpoint or "the demo checkpoint", ACCENT)],
        [(progress or "starting the engine in its own process …", DIM)],
        [],
        [("? lists the keys, q quits", DIM)],
    ]


def ready_lines(store: Store) -> list[Line]:
    """Shown in place of an op before the first step."""
    hello = store.hello
    prompt = hello.get("text")
    what = f"{hello.get('layout', '')}  {hello.get('dtype', '')} on {hello.get('device', '')}"
    lines: list[Line] = [
        [(str(hello.get("checkpoint", "")), BOLD)],
        [(what, DIM)],
        [(f"{len(store.sites)} ops, {len(hello.get('tokens', ()))} tokens", DIM)],
    ]
    if prompt:
        lines.append([("prompt  ", DIM), (str(prompt), PLAIN)])
    lines += [[]]
    for key, text in (
        ("s", "runs the first op"),
        ("l", "runs a whole layer"),
        ("c", "runs until a breakpoint or the end"),
        ("x", "runs the reference beside every op, and shows the error"),
        ("a", "runs to the first NaN, error over its limit, or broken promise"),
        ("b", "sets a breakpoint at the selected op"),
        (":", "takes any command, such as  break nan > 0"),
        ("?", "lists all keys"),
    ):
        lines.append([(f"{key}  ", ACCENT), (text, PLAIN)])
    return lines


def death_lines(death: Event, width: int) -> list[Line]:
    """The banner: where and how the worker died, its last words, and how to go on."""
    if death.get("fatal"):
        hint = [[(f"hint: {death['hint']}", PLAIN)]] if death.get("hint") else []
        title: Line = [(f"✗ {death.get('message')}", BAD)]
        return [title, *hint, [("R tries again", BOLD), (", q quits", PLAIN)]]
    cause = death.get("signal") or f"return code {death.get('returncode')}"
    site = death.get("site")
    lines: list[Line] = [[(f"✗ the worker died {f'at {site}' if site else ''}: {cause}", BAD)]]
    if death.get("message") and not site:
        lines.append([(fmt.clip(str(death["message"]), width), PLAIN)])
    for row in _last_words(death.get("stderr") or ()):
        lines.append([("  │ " + fmt.clip(row, width - 4), DIM)])
    layer = str(site).split("/")[0]
    where = f" at layer {layer[1:]}" if layer[1:].isdigit() else ""
    lines.append([("R restarts", BOLD), (f"{where}; log, readings and tree stay", PLAIN)])
    return lines


def _last_words(stderr: Sequence[str]) -> list[str]:
    """The line that names the fault and what follows it, or else the last lines."""
    rows = [row for row in stderr if row.strip()]
    fault = next((i for i, row in enumerate(rows) if row.startswith("Fatal ")), len(rows) - 3)
    return rows[max(fault, 0) :][:3]


_STATES = {
    "opening": ("… opening", WARN),
    "ready": ("○ ready", GOOD),
    "running": ("» running…", WARN),
    "stopped": ("■ stopped", GOOD),
    "finished": ("✓ finished", GOOD),
    "dead": ("✗ dead", BAD),
}


def status_line(store: Store, width: int, elapsed: float | None = None) -> Line:
    """As many facts as fit, the most important first kept, in a fixed order."""
    state = store.state
    facts: list[tuple[int, str, str]] = [(0, *_STATES.get(store.name, (store.name, PLAIN)))]
    if store.hello:
        facts += _place_facts(store)
        facts += _engine_facts(store, elapsed)
    elif elapsed is not None:
        facts.append((1, fmt.seconds(elapsed), PLAIN))
    if store.name == "stopped" and state.get("why") not in (None, "", "step"):
        facts.append((4, str(state["why"]), ACCENT))
    keep = sorted(facts)
    while len(keep) > 1 and sum(len(text) + 2 for _, text, _ in keep) > width:
        keep.pop()
    line: Line = [(" ", PLAIN)]
    for fact in facts:
        if fact in keep:
            line += [(fact[1], fact[2]), ("  ", PLAIN)]
    if width_of(line) > width + 2:
        return [(fmt.clip(line[1][0], width), line[1][1])]
    return line


def _place_facts(store: Store) -> list[tuple[int, str, str]]:
    state, facts = store.state, []
    if store.current:
        facts.append((1, store.current, BOLD))
        info = store.sites.get(store.current)
        if info and info.kind:
            facts.append((7, info.kind, PLAIN))
    if state.get("of"):
        facts.append((3, f"{_index(store) + 1}/{state['of']}", PLAIN))
    if state.get("phase") and store.forward == state.get("forward"):
        first, end = state.get("tokens") or (0, 0)
        span = f" {first}–{end - 1}" if end > first else ""
        facts.append((5, f"{state['phase']}{span}", PLAIN))
    if state.get("forwards"):
        facts.append((6, f"fwd {store.forward + 1}/{state['forwards']}", PLAIN))
    return facts


def _index(store: Store) -> int:
    """Position in the forward pass; while the engine runs, by the list of all sites."""
    index = store.order.get(store.entered or "") if store.running else None
    return int(store.state.get("index", -1)) if index is None else index


def _engine_facts(store: Store, elapsed: float | None) -> list[tuple[int, str, str]]:
    state, facts = store.state, []
    route = " ".join(state.get("route") or ()) or "default"
    facts.append((8, f"route {fmt.clip(route, 32)}", PLAIN))
    shadow = state.get("shadow", "off")
    facts.append((2 if shadow != "off" else 11, f"shadow {shadow}", PLAIN))
    if state.get("carried"):
        facts.append((6, "carried on", PLAIN))
    cost = state.get("calibration") or {}
    if cost.get("calls"):
        text = f"limits of {cost['ops']} ops: {fmt.seconds(cost['seconds'])} in float64"
        facts.append((12, text, DIM))
    taken = elapsed if elapsed is not None else state.get("seconds")
    if taken is not None:
        facts.append((9, fmt.seconds(taken), PLAIN))
    rss = (state.get("memory") or {}).get("rss")
    if rss:
        facts.append((10, f"mem {fmt.size(rss)}", PLAIN))
    return facts
