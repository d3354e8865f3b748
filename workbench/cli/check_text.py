"""What `check` prints for people, in 80 columns, from the same documents that --json gives"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

WIDTH = 80
_WORST = 8  # sites in the table of a check
_SITES_OF_A_REASON = 3


def check_text(document: dict[str, Any], tokens: int) -> str:
    """The verdict, why, the worst sites, decisions, what was not covered, and what limits mean."""
    asked = len(document["sites"]) - len(document["uncovered"])
    counted = f"{asked} of {len(document['sites'])} sites checked on {tokens} tokens"
    blocks = [
        _verdict(document, f"{counted} in {document['seconds']:.1f} s"),
        _worst_sites(document),
        _kl(document),
        _decisions(document["decisions"]),
        _not_covered(document["uncovered"]),
        _wrap(
            "Limits: twice the reference's own error against float64 on these inputs, plus rounding; "
            "--limits FILE keeps the evidence."
        ),
    ]
    return "\n\n".join(block for block in blocks if block)


def _verdict(document: dict[str, Any], counted: str) -> str:
    first = document["first"]
    if first is None:
        words = {
            "clean": "no site is over its limit",
            "partial": "nothing found, but not all checked",
        }
        logits = f"logits differ by {document['logits_error']:.1e}"
        return _wrap(
            f"{document['status'].upper()}: {words[document['status']]}; {counted}; {logits}"
        )
    lines = [_wrap(f"FOUND: {first['sentence']}")]
    lines.append(
        _wrap(
            f"{first['kind']}; own error {first['own_error']:.2g}, limit {first['limit']:.2g}, "
            f"carried error {first['carried_error']:.2g}",
            "  ",
        )
    )
    lines += [_wrap(f"breaks: {sentence}", "  ") for sentence in first["invariants"]]
    others = sorted({f["site"] for f in document["findings"]} - {first["site"]})
    if others:
        lines.append(_wrap(f"{len(others)} more sites are over their limit", "  "))
    lines.append(_wrap(f"{counted}; logits differ by {document['logits_error']:.1e}"))
    return "\n".join(lines)


def _worst_sites(document: dict[str, Any]) -> str:
    """In the order of the forward pass where something is over, else by how near the limit is."""
    sites = document["sites"]
    over = [site for site in sites if site["verdict"] == "over"]
    judged = [site for site in sites if site["verdict"] == "ok" and site["limit"] > 0]
    near = sorted(judged, key=lambda s: s["own_error"] / s["limit"], reverse=True)
    shown = over[:_WORST] or near[:_WORST]
    if not shown:
        return ""
    worst: dict[str, dict[str, Any]] = {}  # the finding that is furthest over, by site
    for finding in document["findings"]:
        known = worst.get(finding["site"])
        if known is None or finding["own_error"] > known["own_error"]:
            worst[finding["site"]] = finding
    rows = [
        (
            site["site"],
            site["implementation"],
            *(f"{worst.get(site['site'], site)[name]:.1e}" for name in ("own_error", "limit")),
            f"{site['carried_error']:.1e}",
        )
        for site in shown
    ]
    title = "over their limit, in order:" if over else "nearest to their limit:"
    more = [f"and {len(over) - _WORST} more"] if len(over) > _WORST else []
    header = ("site", "runs", "own error", "limit", "carried")
    return "\n".join([title, columns(header, rows), *more])


def _kl(document: dict[str, Any]) -> str:
    kl = document["kl"]
    if kl is None:
        return _wrap(f"KL: not measured, the route raises {document['kl_problem']}")
    text = (
        f"KL(reference || route): {kl['total']:.2g} nats a token = {kl['arithmetic']:.2g} from "
        f"arithmetic and {kl['decisions']:.2g} from flipped decisions; {kl['top1_changed']} of "
        f"{kl['positions']} most likely tokens differ"
    )
    if kl["total"] > 0:
        text += f"; worst at position {kl['worst_position']}: {kl['worst']:.2g}"
    return _wrap(text + ".")


def _decisions(decisions: Sequence[dict[str, Any]]) -> str:
    flipped = [row for row in decisions if row["flipped"] or row["flipped_unreplayed"]]
    if not flipped:
        return _wrap(f"Decisions: none flipped at {len(decisions)} sites.") if decisions else ""
    worst = sorted(flipped, key=lambda row: row["flipped"], reverse=True)[:5]
    rows = [
        (
            row["site"],
            f"{row['flipped']}/{row['rows']}",
            f"{row['overlap']:.4f}",
            "-" if row["margin"] is None else f"{row['margin']:.1e}",
            f"{row['gap']:.1e}",
            str(row["against_scores"]),
        )
        for row in worst
    ]
    header = ("decisions at", "flipped", "overlap", "margin", "gap", "against own scores")
    more = [f"and {len(flipped) - 5} more sites"] if len(flipped) > 5 else []
    return "\n".join([columns(header, rows), *more])


def _not_covered(uncovered: Sequence[dict[str, str]]) -> str:
    if not uncovered:
        return ""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for item in uncovered:
        by_reason[item["why"]].append(item["site"])
    lines = [f"not covered: {len(uncovered)} sites"]
    for why, sites in by_reason.items():
        shown = ", ".join(sites[:_SITES_OF_A_REASON])
        rest = (
            f" and {len(sites) - _SITES_OF_A_REASON} more"
            if len(sites) > _SITES_OF_A_REASON
            else ""
        )
        lines.append(_wrap(f"{why}: {shown}{rest}", "  "))
    return "\n".join(lines)


def minimise_text(document: dict[str, Any], tokens: int) -> str:
    """The minimal sets, what their parts do, and how many trials it took."""
    whole = document["whole"]
    counted = (
        f"{document['trials']} trials in {document['seconds']:.1f} s"
        f" ({document['stored']} known from before), {tokens} tokens"
    )
    if not document["sets"]:
        return _wrap(
            f"CLEAN: the {document['candidates']} kernels of the route together do not break the "
            f"output; logits off by {whole['error']:.2g}. Broken would be: {document['symptom']}. "
            f"{counted}"
        )
    blocks = [_wrap(f"FOUND: broken is: {document['symptom']}")]
    for number, found in enumerate(document["sets"], 1):
        lines = [_wrap(f"{number}. {found['sentence']}")]
        if len(found["sites"]) > 1:
            rows = [
                (
                    " + ".join(part["sites"]),
                    "broken" if part["broken"] else "fine",
                    f"{part['error']:.1e}",
                )
                for part in found["subsets"]
            ]
            lines.append(columns(("on the kernel", "output", "logits off by"), rows))
        if not found["confirmed"]:
            lines.append(
                _wrap("not confirmed by a run from the start: it varies, or needs --fresh", "  ")
            )
        blocks.append("\n".join(lines))
    if not document["complete"]:
        blocks.append("There are more faults than these; minimise again with these ops left out.")
    blocks += [_wrap(f"note: {note}") for note in document["notes"]]
    return "\n\n".join([*blocks, counted])


def vary_text(document: dict[str, Any], tokens: int) -> str:
    """A row for every variation, and a sentence for every one that changed bits."""
    effects = document["variations"]
    rows = [
        (
            effect["variable"],
            effect["label"],
            effect["verdict"],
            effect["first"]["site"] if effect["first"] else "-",
            f"{effect['logits']['error']:.1e}" if effect["logits"] else "0",
        )
        for effect in effects
    ]
    over = [effect for effect in effects if effect["verdict"] == "over"]
    head = (
        f"FOUND: {over[0]['sentence']}"
        if over
        else "CLEAN: no variation changes more than rounding does"
    )
    changed = [effect for effect in effects if effect["verdict"] == "rounding"]
    blocks = [_wrap(f"{head}; {tokens} tokens in {document['seconds']:.1f} s")]
    blocks.append(columns(("variable", "run", "bits", "first changed at", "logits"), rows))
    blocks += [_wrap(effect["sentence"]) for effect in over[1:]]
    if changed:
        blocks.append(_wrap(changed[0]["sentence"] + "."))
    return "\n\n".join(blocks)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with two spaces between columns; all but the first and text columns to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = [
        i > 0 and all(row[i][:1] in "0123456789-in" for row in rows) for i in range(len(header))
    ]
    lines = []
    for row in (header, *rows):
        cells = zip(row, widths, right, strict=True)
        padded = [c.rjust(w) if to_right else c.ljust(w) for c, w, to_right in cells]
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
