"""What the replies to session commands mean for the store. `quiet`: the UI asked, not the user."""

from __future__ import annotations

from collections.abc import Callable

from dsv4_bench.workbench.tui.records import Event, SiteInfo, Value
from dsv4_bench.workbench.tui.results import any_result, readings_table
from dsv4_bench.workbench.tui.store import Change, Store, command_name

VALUES_KEPT = 50
Handler = Callable[[Store, str, Event, bool], Change]


def take_reply(store: Store, line: str, result: Event, quiet: bool) -> Change:
    handler = _HANDLERS.get(command_name(line), _other)
    return handler(store, line, result, quiet)


def _moved(store: Store, line: str, result: Event, quiet: bool) -> Change:
    """The result is a state, or holds one."""
    state = result.get("state")
    if isinstance(state, dict):
        return store._on_state(state)
    return store._on_state(result) if state else Change.NONE


def _op(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.op = result
    return Change.OP


def _heatmap(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.heat = result
    return Change.HEAT


def _compare(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.comparison = result
    return Change.COMPARISON | store.note("result", f"{result['status']}: {result['sentence']}")


def _timing(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.timing = result
    return Change.TIMING


def _history(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.history = result
    return Change.HISTORY


def _ncu(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.counters = result
    return Change.COUNTERS


def _reload(store: Store, line: str, result: Event, quiet: bool) -> Change:
    change = Change.RERUN if result["reloaded"] else Change.NONE
    if quiet:
        store.watched = result
        return change | Change.WATCHED
    said = "taken up" if result["reloaded"] else "no source has changed"
    return change | store.note("result", f"{result['site']}: {said}")


def _sources(store: Store, line: str, result: Event, quiet: bool) -> Change:
    if quiet:
        store.watched = result
        return Change.WATCHED
    title = f"{result['site']}  {result['implementation']}"
    return _show(store, line, title, "\n".join(result["files"]) or "no file of its own")


def _bundle(store: Store, line: str, result: Event, quiet: bool) -> Change:
    hint = f"`dsv4-bench replay {result['bundle']}` runs it again"
    return store.note("result", result["text"]) | store.note("result", hint)


def _faults(store: Store, line: str, result: Event, quiet: bool) -> Change:
    """Faults become implementations to complete; asked for by name, they are listed."""
    rows = result.get("faults", ())
    for row in rows:
        for op in row["ops"]:
            names = store.implementations.setdefault(op, [])
            names += [row["name"]] if row["name"] not in names else []
    if quiet:
        return Change.NONE
    text = "\n".join(f"{' '.join(row['route'])}\n    {row['what']}" for row in rows)
    return _show(store, line, f"{len(rows)} known bugs; route ENTRY switches one on", text)


def _sites(store: Store, line: str, result: Event, quiet: bool) -> Change:
    for entry in result.get("sites", ()):
        site = store.sites.setdefault(entry["path"], SiteInfo(entry["path"], entry["op"]))
        ran = entry.get("state") in ("done", "current")
        site.done, site.stops = ran, bool(entry.get("break"))
        site.seconds = entry.get("seconds")
        site.route, site.note = entry.get("route") or "", entry.get("note") or ""
        if ran or entry.get("alarm"):
            store.take_errors(site, entry)
    return Change.SITES | (Change.NONE if quiet else _other(store, line, result, quiet))


def _readings(store: Store, line: str, result: Event, quiet: bool) -> Change:
    readings = result.get("readings", [])
    if not quiet:
        return _show(store, line, f"{len(readings)} readings", readings_table(readings))
    if line.endswith(" residual"):
        store.residual = readings
    else:
        store.layer_readings = readings
    return Change.READINGS


def _print(store: Store, line: str, result: Event, quiet: bool) -> Change:
    title = f"{result.get('dtype', '')} {result.get('shape', '')}".strip()
    return _show(store, line, title, str(result.get("text", "")))


def _watch(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.watches = result.get("watches") or []
    return Change.WATCHES


def _breaks(store: Store, line: str, result: Event, quiet: bool) -> Change:
    store.breaks = result.get("breaks") or []
    change = Change.BREAKS
    if not quiet and result.get("text"):
        change |= store.note("result", str(result["text"]))
    return change


def _route(store: Store, line: str, result: Event, quiet: bool) -> Change:
    changes = result.get("changed", ())
    store.effects = {changed["site"]: changed.get("effect", "") for changed in changes}
    for changed in changes[:8]:
        before, after = changed["before"]["implementation"], changed["after"]["implementation"]
        effect = f"  {changed['effect']}" if changed.get("effect") else ""
        store.note("result", f"{changed['site']}: {before} → {after}{effect}")
    if len(changes) > 8:
        store.note("result", f"and {len(changes) - 8} more sites")
    if not changes:
        store.note("result", "route: " + " ".join(result.get("route", ())))
    return Change.LOG | Change.OP | _moved(store, line, result, quiet)


def _save(store: Store, line: str, result: Event, quiet: bool) -> Change:
    return store.note("result", f"saved {result.get('commands', '')} lines: {result.get('file')}")


def _probes(store: Store, line: str, result: Event, quiet: bool) -> Change:
    known, on = result.get("known_probes") or {}, result.get("probes") or ()
    for name, text in known.items():
        store.note("result", f"{'on ' if name in on else 'off'}  {name:<12} {text}")
    return Change.LOG | _moved(store, line, result, quiet)


def _other(store: Store, line: str, result: Event, quiet: bool) -> Change:
    return Change.NONE if quiet else _show(store, line, "", any_result(result))


def _show(store: Store, line: str, title: str, text: str) -> Change:
    store.values = [Value(line, title, text), *store.values[: VALUES_KEPT - 1]]
    return Change.VALUES


_MOVES = (
    "step next finish layer continue until anomaly back rerun goto reset status shadow carried "
    "pause restart"
)
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_MOVES.split(), _moved),
    **dict.fromkeys(("toggle", "route"), _route),
    **dict.fromkeys(("break", "breaks", "delete"), _breaks),
    **dict.fromkeys(("print", "eval"), _print),
    "op": _op,
    "heatmap": _heatmap,
    "difference": _heatmap,
    "compare": _compare,
    "bundle": _bundle,
    "timing": _timing,
    "history": _history,
    "ncu": _ncu,
    "reload": _reload,
    "sources": _sources,
    "faults": _faults,
    "sites": _sites,
    "readings": _readings,
    "watch": _watch,
    "save": _save,
    "probes": _probes,
}
