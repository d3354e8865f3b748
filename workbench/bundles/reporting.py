"""report.md, fit for an issue, and report.html, one file without any link to the outside

Everything that comes from the run is escaped: a report must not break the page it is pasted into.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv4_bench.workbench.bundles.plots import Plot
from dsv4_bench.workbench.cli.output import bytes_text, table

Row = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

_MOST_ROWS = 20  # of a table in report.md; an issue has to stay readable


# ------------------------------------------------------------------------------ content


def verdict(manifest: Row) -> str:
    """The first wrong op in one sentence, or that nothing captured is wrong."""
    first, coverage = manifest["first"], manifest["coverage"]
    ops = f"{coverage['calls']} captured ops of {coverage['captured']} sites"
    if first is None:
        return f"All {ops} are within their limits."
    place = f"{first['sentence']} ({first['kind']})"
    return f"{place}. {coverage['over']} of {ops} are over their limit; this one came first."


def facts(manifest: Row) -> Table:
    """What ran, on what, and how far the bundle can be trusted."""
    versions, checkpoint = manifest["versions"], manifest["checkpoint"]
    tokens, chunks = manifest["tokens"], manifest["chunks"]
    rows = [
        ("command", " ".join(manifest["command"])),
        ("checkpoint", f"{checkpoint['name']}; {checkpoint['layout']}"),
        ("tokens", f"{len(tokens)} in {len(chunks)} forward passes ({_few(chunks)})"),
        ("numerics", f"{manifest['numerics']}, {manifest['dtype']} on {manifest['device']}"),
        ("route", ", ".join(manifest["route"]) or "reference"),
        ("dsv4-bench, torch", f"{versions['dsv4-bench']}, {versions['torch']}"),
        ("machine", _machine(versions)),
        ("coverage", _coverage(manifest)),
        ("watching", _observer(manifest["observer"])),
        ("created", manifest["created"]),
    ]
    return ("", ""), rows


def _machine(versions: Row) -> str:
    parts = [versions["cpu"], versions["vector_units"], f"{versions['threads']} threads"]
    if versions["gpu"]:
        parts.append(f"{versions['gpu']}, CUDA {versions['cuda']}")
    return f"{', '.join(map(str, parts))} ({versions['system']})"


def _coverage(manifest: Row) -> str:
    coverage = manifest["coverage"]
    text = (
        f"{coverage['captured']} of {coverage['selected']} selected sites captured, "
        f"the model has {coverage['sites']}"
    )
    left = len(manifest["left_out"])
    return f"{text}; {left} ops left out for size" if left else text


def _observer(observer: Row | None) -> str:
    if observer is None:
        return "not measured (--quick)"
    bits = (
        "CHANGED the output bits" if observer["bits_changed"] else "left every output bit as it is"
    )
    return f"{bits}, took {observer['slow_down']:.1f} x the time"


def worst_ops(calls: Sequence[Row]) -> Table:
    """Every output over its limit, in the order the ops ran; else the closest to their limits."""
    header = ("op", "pass", "output", "ran", "own error", "limit", "verdict", "what")
    rows = [(call, name, check) for call in calls for name, check in call["checks"].items()]
    over = [row for row in rows if row[2]["verdict"] == "over"]
    if not over:
        judged = [row for row in rows if row[2]["verdict"] == "ok" and float(row[2]["limit"]) > 0]
        over = sorted(judged, key=lambda row: -_share(row[2]))[:8]
    return header, [_op_row(*row) for row in over]


def _share(check: Row) -> float:
    return float(check["own_error"]) / float(check["limit"])


def _op_row(call: Row, name: str, check: Row) -> tuple[str, ...]:
    over = check["verdict"] == "over"
    signature = call.get("signature") or {}
    kind = signature.get("kind", "") if over else ""
    stamp = call["stamp"]
    return (
        call["site"],
        str(call["forward"]),
        name,
        f"{stamp.get('implementation', '?')} {stamp.get('hash', '')[:6]}".strip(),
        _number(check["own_error"]),
        _number(check["limit"]),
        "OVER" if over else "ok",
        kind,
    )


def alarms(readings: Iterable[Row]) -> Table:
    """The readings that a probe judged and found wrong."""
    rows = [
        (
            str(r["site"]),
            str(r["forward"]),
            f"{r['probe']}/{r['name']}",
            _short(r["value"]),
            "" if r["limit"] is None else _number(r["limit"]),
            str(r["detail"]),
        )
        for r in readings
        if r["verdict"] == "alarm"
    ]
    return ("site", "pass", "reading", "value", "limit", "detail"), rows


def left_out(manifest: Row) -> Table:
    """What was asked for and is not in the bundle."""
    rows = [
        (item["site"], str(item["forward"]), bytes_text(item["bytes"]), item["why"])
        for item in manifest["left_out"]
    ]
    return ("site", "pass", "size", "why"), rows


def left_out_line(items: Sequence[Row]) -> str:
    """The same in one line: how much, and which sites."""
    sites = list(dict.fromkeys(item["site"] for item in items))
    size = bytes_text(sum(item["bytes"] for item in items))
    return f"{len(items)} ops of {len(sites)} sites, {size}: {_few(sites)}"


def fallbacks(manifest: Row) -> Table:
    """Sites whose route was not served, by the reason."""
    reasons: dict[str, list[str]] = {}
    for site, stamp in manifest["stamps"].items():
        if stamp.get("note"):
            reasons.setdefault(str(stamp["note"]), []).append(site)
    rows = [(note, str(len(sites)), _few(sites)) for note, sites in reasons.items()]
    return ("why the reference ran", "sites", "which"), rows


def _number(value: Any) -> str:
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return "0" if number == 0 else f"{number:.2e}"


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return _few([_short(v) for v in value], 4)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _few(items: Sequence[Any], most: int = 6) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return shown + (f", ... ({len(items)})" if len(items) > most else "")


# ------------------------------------------------------------------------------ markdown


def markdown_report(manifest: Row, calls: Sequence[Row], readings: Sequence[Row]) -> str:
    """A report to paste into an issue."""
    parts = [
        f"## {_plain(verdict(manifest))}",
        _markdown(facts(manifest)),
        "### " + ("Over their limit" if manifest["first"] else "Closest to their limit"),
        _markdown(worst_ops(calls)),
    ]
    for title, content in (
        ("Alarms of the probes", alarms(readings)),
        ("Reference instead of a kernel", fallbacks(manifest)),
    ):
        if content[1]:
            parts += [f"### {title}", _markdown(content)]
    if manifest["left_out"]:
        line = _plain(left_out_line(manifest["left_out"]))
        parts.append(f"Left out for size (manifest.json lists all): {line}")
    parts.append(
        "To see it again: `dsv4-bench replay BUNDLE`, or `python replay.py` in the unpacked bundle, "
        "which needs torch only."
    )
    return "\n\n".join(parts) + "\n"


def _markdown(content: Table) -> str:
    header, rows = content
    shown = [tuple(_plain(cell) for cell in row) for row in rows[:_MOST_ROWS]]
    more = len(rows) - len(shown)
    return table(header, shown) + (f"\n\nand {more} more" if more > 0 else "")


def _plain(text: str) -> str:
    """Without what would end a table's cell, or ping people."""
    flat = " ".join(str(text).split())
    for mark in "\\`|<>@":
        flat = flat.replace(mark, {"@": "(at)", "|": "/", "`": "'"}.get(mark, "\\" + mark))
    return flat


# ------------------------------------------------------------------------------ html

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6875; --line: #d9dfe5; --paper: #fff;
  --over: #c0392b; --ok: #3a8f5c; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa5b1; --line: #37424d;
  --paper: #171c21; --over: #ff7b6b; --ok: #6fce97; --card: #1f262d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.35rem; line-height: 1.35; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.badge { display: inline-block; font-weight: 600; padding: .05rem .6rem; border-radius: 1rem;
  color: #fff; margin-bottom: .6rem; }
.badge.over { background: #c0392b; } .badge.ok { background: #3a8f5c; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; width: 100%; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
td.over { color: var(--over); font-weight: 600; } td.ok { color: var(--ok); }
td.key { color: var(--soft); white-space: nowrap; }
td.site { font-family: ui-monospace, monospace; white-space: nowrap; }
figure { margin: 1rem 0 1.6rem; background: #fff; border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #5b6875; font-size: .86rem; margin-top: .3rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); padding: .8rem; overflow-x: auto; font-size: .82rem; }
"""


def html_report(
    manifest: Row, calls: Sequence[Row], readings: Sequence[Row], plots: Sequence[Plot]
) -> str:
    """One self-contained page: tables, inline SVG, no script, nothing fetched."""
    first = manifest["first"]
    badge = "over" if first else "ok"
    title = f"dsv4-bench: {first['site']}" if first else "dsv4-bench: bundle"
    body = [
        f'<span class="badge {badge}">{"found" if first else "within limits"}</span>',
        f"<h1>{_escape(verdict(manifest))}</h1>",
        _html_table(facts(manifest), keyed=True),
        f"<h2>{'Over their limit' if first else 'Closest to their limit'}</h2>",
        _html_table(worst_ops(calls)),
    ]
    for heading, content in (
        ("Alarms of the probes", alarms(readings)),
        ("Reference instead of a kernel", fallbacks(manifest)),
    ):
        if content[1]:
            body += [f"<h2>{heading}</h2>", _html_table(content)]
    if plots:
        body.append("<h2>Plots</h2>")
        body += [_figure(plot) for plot in plots]
    body += [
        "<h2>All captured ops</h2>",
        _details(f"{len(calls)} ops", _html_table(_all_ops(calls))),
        *_left_out_details(manifest),
        _details("Environment", f"<pre>{_escape(_environment(manifest))}</pre>"),
        "<h2>Run it again</h2>",
        "<pre>dsv4-bench replay BUNDLE          # this machine's implementations\n"
        "python replay.py                  # in the unpacked bundle; needs torch only</pre>",
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _left_out_details(manifest: Row) -> list[str]:
    items = manifest["left_out"]
    if not items:
        return []
    return [_details(f"Left out: {left_out_line(items)}", _html_table(left_out(manifest)))]


def _all_ops(calls: Sequence[Row]) -> Table:
    header = ("op", "pass", "output", "ran", "own error", "limit", "verdict", "what")
    rows = [_op_row(call, name, check) for call in calls for name, check in call["checks"].items()]
    return header, rows


def _html_table(content: Table, keyed: bool = False) -> str:
    header, rows = content
    numeric = [
        bool(rows) and all(_looks_numeric(row[column]) for row in rows)
        for column in range(len(header))
    ]
    classes = ["number" if n else "" for n in numeric]
    if keyed:
        classes[0] = "key"
    elif header[0] in ("op", "site"):
        classes[0] = "site"
    lines = ['<div class="scroll"><table>']
    if any(header):
        cells = zip(header, numeric, strict=True)
        lines.append(
            "<tr>"
            + "".join(f"<th{' class=number' if n else ''}>{_escape(h)}</th>" for h, n in cells)
            + "</tr>"
        )
    for row in rows:
        named = zip(row, classes, strict=True)
        columns = [f'<td class="{_cell_class(c, name)}">{_escape(c)}</td>' for c, name in named]
        lines.append(f"<tr>{''.join(columns)}</tr>")
    return "\n".join([*lines, "</table></div>"])


def _cell_class(text: str, name: str) -> str:
    return {"OVER": "over", "ok": "ok"}.get(text, name)


def _looks_numeric(text: str) -> bool:
    try:
        float(text or "0")
    except ValueError:
        return False
    return True


def _figure(plot: Plot) -> str:
    """The SVG without its prologue, which names a document type on a server."""
    svg = plot.svg.decode()
    drawing = svg[svg.index("<svg") :]
    return f"<figure>{drawing}<figcaption>{_escape(plot.caption)}</figcaption></figure>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_escape(summary)}</summary>{content}</details>"


def _environment(manifest: Row) -> str:
    lines = [f"{name}: {value}" for name, value in manifest["versions"].items()]
    for title, checks in manifest["environment"].get("sections", {}).items():
        lines += ["", title]
        lines += [f"  {c['status']:<5} {c['name']}: {c['value']}" for c in checks]
    return "\n".join(lines)


def _escape(text: object) -> str:
    return html.escape(str(text))
