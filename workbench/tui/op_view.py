"""The op pane: an OPVIEW of the session as styled lines for a given width. Pure."""

from __future__ import annotations

from typing import Any

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.results import VERDICTS, columns, reading_limit, reading_value
from dsv4_bench.workbench.tui.store import SiteInfo
from dsv4_bench.workbench.tui.spans import (
    ACCENT,
    BAD,
    BANNER,
    BOLD,
    DIM,
    GOOD,
    PLAIN,
    TITLE,
    WARN,
    Line,
    Span,
    width_of,
    wrap,
)

View = dict[str, Any]
INDENT = 8

_HELD = {
    "done": (f"{fmt.DONE} done, tensors not held", DIM),
    "pending": (f"{fmt.PENDING} not run yet", DIM),
    "current": (f"{fmt.CURRENT} current, tensors held", GOOD),
}


def op_lines(view: View, width: int) -> list[Line]:
    """Everything the op pane shows."""
    blocks = [
        _heading(view, width),
        _banner(view, width),
        _route(view, width),
        _times(view, width),
        _error(view, width),
        _tensors("in", view.get("inputs", ()), width),
        _tensors("out", view.get("outputs", ()), width),
        _tensors("params", view.get("params", ()), width),
        _readings(view, width),
    ]
    lines: list[Line] = []
    for block in blocks:
        if block and block[0] and lines and block[0][0][1] == TITLE:
            lines.append([])
        lines += block
    return lines


def stub_view(info: SiteInfo) -> View:
    """What is known of a site before the session was asked about it."""
    return {
        "site": info.path,
        "op": info.op,
        "state": "done" if info.done else "pending",
        "route": info.route,
        "stamp": {"implementation": info.route, "note": info.note} if info.route else None,
        "times": {info.route or "last": info.seconds} if info.seconds is not None else {},
    }


def _heading(view: View, width: int) -> list[Line]:
    state = _HELD["current" if view.get("held") else view.get("state", "pending")]
    if view.get("state") == "current" and not view.get("held"):
        state = (f"{fmt.CURRENT} current, tensors not held", WARN)
    doc = fmt.first_line(view.get("doc") or "")
    lines: list[Line] = [
        [(fmt.clip(view["site"], width - len(view["op"]) - 2, left=True), BOLD),
         ("  ", PLAIN), (view["op"], ACCENT)],
        [state],
    ]  # fmt: skip
    if doc:
        more = "  i: more" if "\n" in view["doc"].strip() else ""
        lines.insert(1, [(fmt.clip(doc, width - len(more)), PLAIN), (more, DIM)])
    return lines


def _banner(view: View, width: int) -> list[Line]:
    effect = view.get("effect")
    return [[(fmt.clip(f" {effect} ", width), BANNER)]] if effect else []


def _route(view: View, width: int) -> list[Line]:
    stamp = view.get("stamp") or {}
    ran: list[Span] = [(str(view.get("route", "")), BOLD)]
    if stamp:
        ran = [(str(stamp.get("implementation", view.get("route"))), BOLD)]
        ran.append((f"hash {str(stamp.get('hash', ''))[:8]}", DIM))
        launches = stamp.get("launches")
        if launches:
            ran.append((f"{launches} launch{'' if launches == 1 else 'es'}", DIM))
    lines = wrap("route", ran, width, INDENT)
    if stamp.get("note"):
        note = fmt.clip(str(stamp["note"]), width - INDENT)
        lines.append([(" " * INDENT, PLAIN), (note, WARN)])
    others = [a for a in view.get("alternatives", ()) if a["name"] != view.get("route")]
    words = [_alternative(a) for a in others]
    return lines + (wrap("others", words, width, INDENT) if words else [])


def _alternative(alternative: View) -> Span:
    if alternative["available"]:
        return f"{fmt.DONE} {alternative['name']}", GOOD
    return f"✗ {alternative['name']} ({alternative.get('reason') or 'not available'})", DIM


def _times(view: View, width: int) -> list[Line]:
    times: dict[str, float] = view.get("times") or {}
    if not times:
        return []
    words: list[Span] = [(f"{name} {fmt.seconds(value)}", PLAIN) for name, value in times.items()]
    ours = times.get(str(view.get("route")))
    for name, value in times.items():
        if ours and name != view.get("route"):
            words.append((f"{fmt.speed(ours, value)} than {name}", DIM))
    return wrap("time", words, width, INDENT)


def _error(view: View, width: int) -> list[Line]:
    error = view.get("own_error")
    if not error:
        hint = "x runs the reference beside it" if view.get("held") else ""
        return wrap("error", [("not compared", DIM), (hint, DIM)], width, INDENT) if hint else []
    over = error.get("verdict") == "over"
    verdict = (f"{fmt.ALARM} over limit", BAD) if over else (f"{fmt.DONE} ok", GOOD)
    words: list[Span] = [
        verdict,
        (f"{fmt.number(error.get('relative_l2'))} rel. L2 vs {error.get('against')}", PLAIN),
        (f"limit {fmt.number(error.get('limit'))}", DIM),
    ]
    lines = wrap("error", words, width, INDENT)
    if error.get("max_abs") is not None:
        where = f"max abs {fmt.number(error['max_abs'])}"
        if error.get("coordinate") is not None:
            where += f" at {list(error['coordinate'])}"
        pair = f"ours {fmt.full(error.get('ours'))}  theirs {fmt.full(error.get('theirs'))}"
        lines += wrap("", [(where, PLAIN), (pair, DIM)], width, INDENT)
    return lines


def _tensors(title: str, tensors: Any, width: int) -> list[Line]:
    if not tensors:
        return []
    heads = columns(
        [
            (t["name"], fmt.shape(t["shape"]), t.get("format") or t["dtype"], _place(t, width))
            for t in tensors
        ]
    )
    lines: list[Line] = [[(title, TITLE)]]
    for tensor, head in zip(tensors, heads, strict=True):
        name = tensor["name"]
        entry: Line = [("  ", PLAIN), (name, BOLD), (head[len(name) :], PLAIN)]
        stats = _statistics(tensor)
        gap = " " * (4 + max(map(len, heads)) - len(head))
        if stats and width_of(entry) + len(gap) + width_of(stats) + 2 * len(stats) <= width:
            lines.append([*entry, (gap, PLAIN), *_spaced(stats)])
            continue
        lines.append(entry)
        lines += wrap("", stats, width, 4) if stats else []
    return lines


def _spaced(words: Line) -> Line:
    return [span for word in words for span in (word, ("  ", PLAIN))][:-1]


def _place(tensor: View, width: int) -> str:
    if width < 44:
        return ""
    return f"{tensor['device']}  {fmt.size(tensor.get('bytes'))}"


def _statistics(tensor: View) -> Line:
    stats = tensor.get("stats")
    if not stats:
        return []
    line: Line = []
    bad = [f"{stats[name]} {name}" for name in ("nan", "inf") if stats.get(name)]
    if bad and tensor.get("expected_nonfinite"):
        line.append((" ".join(bad) + " (expected)", DIM))
    elif bad:
        line.append((f"{fmt.ALARM} {' '.join(bad)}", BAD))
    else:
        line.append((f"{fmt.DONE} finite", GOOD))
    for name in ("absmax", "rms", "mean"):
        if stats.get(name) is not None:
            line.append((f"{name} {fmt.number(stats[name])}", PLAIN))
    return line


def _readings(view: View, width: int) -> list[Line]:
    readings = [r for r in view.get("readings", ()) if r["probe"] != "stats"]
    if not readings:
        return []
    return [[("readings", TITLE)], *reading_lines(readings, width)]


def reading_lines(readings: list[View], width: int, sites: bool = False) -> list[Line]:
    """One line a reading: sign, name, value, limit, detail."""
    texts = columns(
        [
            (
                fmt.clip(f"{r['probe']}.{r['name']}", 24),
                reading_value(r),
                reading_limit(r) or (r.get("detail") or ""),
            )
            for r in readings
        ],
        right=frozenset({1}),
    )
    lines: list[Line] = []
    previous = None
    for reading, text in zip(readings, texts, strict=True):
        if sites and reading["site"] != previous:
            previous = reading["site"]
            lines.append([(fmt.clip(previous, width, left=True), DIM)])
        alarm = reading.get("verdict") == "alarm"
        sign = VERDICTS.get(reading.get("verdict", "info"), " ")
        lines.append([(f"{sign} ", BAD if alarm else GOOD), (text, BAD if alarm else PLAIN)])
        if alarm and reading.get("detail") and reading.get("limit") is not None:
            lines.append([("    " + reading["detail"], BAD)])
    return lines
