"""The op pane: an OPVIEW of the session as styled lines for a given width. Pure."""

from __future__ import annotations

import textwrap
from typing import Any

from dsv4_bench.workbench.tui import format as fmt
from dsv4_bench.workbench.tui.records import real
from dsv4_bench.workbench.tui.results import VERDICTS, columns, reading_limit, reading_unit
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
        _carried(view, width),
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
    times = fmt.times(real(error.get("times")))
    value, limit = error.get("worst") or (error.get("relative_l2"), error.get("limit"))
    of = "" if value == error.get("relative_l2") else " of a row"
    mark, style = (fmt.ALARM, BAD) if over else (fmt.DONE, GOOD)
    words: list[Span] = [
        (f"{mark} {times} its limit", style),
        (f"{fmt.number(real(value))} rel. L2{of} vs {error.get('against')}", PLAIN),
        (f"limit {fmt.number(real(limit))}", DIM),
    ]
    if error.get("note"):
        words.append((error["note"], PLAIN))
    if error.get("bits_equal"):
        words[1:] = [("same bits", PLAIN)]
    lines = wrap("error", words, width, INDENT)
    signature = view.get("signature")
    if signature:
        what = [(f"{signature['kind']}: {signature['detail']}", BOLD)]
        lines += wrap("kind", _broken(what, width - INDENT), width, INDENT)
    if error.get("max_abs") is not None and not error.get("bits_equal"):
        where = f"max abs {fmt.number(error['max_abs'])}"
        if error.get("coordinate"):
            where += f" at {error.get('output', '')}{list(error['coordinate'])}"
        pair = f"ours {fmt.full(error.get('ours'))}  theirs {fmt.full(error.get('theirs'))}"
        lines += wrap("worst", [(where, PLAIN), (pair, DIM)], width, INDENT)
    return lines


def _broken(words: list[Span], width: int) -> list[Span]:
    """Words that are longer than `width`, in several pieces."""
    return [(row, style) for text, style in words for row in textwrap.wrap(text, max(width, 8))]


def _carried(view: View, width: int) -> list[Line]:
    error = view.get("carried_error")
    if error is None:
        return []
    text = f"{fmt.number(real(error))} rel. L2 vs a run on the reference from the first token"
    return wrap("carried", _broken([(text, PLAIN)], width - INDENT), width, INDENT)


def _tensors(title: str, tensors: Any, width: int) -> list[Line]:
    if not tensors:
        return []
    heads = _tensor_heads(tensors, width)
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


def _tensor_heads(tensors: list[View], width: int) -> list[str]:
    """Name, shape, dtype or format, device, bytes; of the last two what fits."""
    rows = [_tensor_row(tensor) for tensor in tensors]
    for count in (5, 4, 3):
        heads = columns([row[:count] for row in rows])
        if max(map(len, heads)) <= width - 2:
            return heads
    return [fmt.clip(head, width - 2) for head in heads]


def _tensor_row(tensor: View) -> tuple[str, ...]:
    if "shape" not in tensor:  # a plain argument
        return tensor["name"], fmt.clip(str(tensor.get("value", "")), 40), "", "", ""
    dims = fmt.shape(tensor["shape"])
    if tensor.get("count"):
        dims = f"{tensor['count']} of {dims}"
    kind = tensor.get("format") or tensor["dtype"]
    return tensor["name"], dims, kind, tensor["device"], fmt.size(tensor.get("bytes"))


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
    for name in ("abs_max", "rms", "mean"):
        if stats.get(name) is not None:
            line.append((f"{name} {fmt.number(stats[name])}", PLAIN))
    return line


def _readings(view: View, width: int) -> list[Line]:
    readings = [r for r in view.get("readings", ()) if r["probe"] != "stats"]
    if not readings:
        return []
    return [[("readings", TITLE)], *reading_lines(readings, width)]


COMPACT = 44  # narrower than this, a reading is its name and value only


def readings_by_site(readings: list[View], width: int) -> list[Line]:
    """Readings under the path of their site."""
    lines: list[Line] = []
    for site in dict.fromkeys(reading["site"] for reading in readings):
        lines.append([(fmt.clip(site, width, left=True), DIM)])
        lines += reading_lines([r for r in readings if r["site"] == site], width)
    return lines


def reading_lines(readings: list[View], width: int) -> list[Line]:
    """One line a reading: sign, name, value, limit or detail; the detail of an alarm below."""
    texts = columns([_reading_row(r, width) for r in readings], right=frozenset({1}))
    lines: list[Line] = []
    for reading, text in zip(readings, texts, strict=True):
        alarm = reading.get("verdict") == "alarm"
        sign = VERDICTS.get(reading.get("verdict", "info"), " ")
        text = fmt.clip(text, width - 2)
        lines.append([(f"{sign} ", BAD if alarm else GOOD), (text, BAD if alarm else PLAIN)])
        if alarm and reading.get("detail"):
            lines.append([("    " + fmt.clip(reading["detail"], width - 4), BAD)])
    return lines


def _reading_row(reading: View, width: int) -> tuple[str, str, str]:
    name, output = reading["name"], reading.get("output") or ""
    if width >= COMPACT:
        name = f"{reading['probe']}.{name}"
    rest = [reading_limit(reading), reading_unit(reading)]
    if reading.get("verdict") != "alarm":
        rest.append(reading.get("detail") or "")
    more = "  ".join(part for part in rest if part) if width >= COMPACT else ""
    return f"{name} {output}".strip(), fmt.numbers(reading.get("value")), more
