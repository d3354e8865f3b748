"""What the later forward passes say about the first finding: rows or positions, prefill or decode

In one prefill a row and a position are the same thing. A decode step tells them apart: its one row
stands at a late position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4_bench.probes.signatures import Signature
from dsv4_bench.workbench.checking.findings import Finding


@dataclass(frozen=True)
class Judged:
    """One call that was judged: where its rows stand, and whether it was found wrong."""

    forward: int
    rows: int
    first: int  # lowest position of its rows
    wrong: bool


def settle(finding: Finding, calls: list[Judged]) -> Signature:
    """The signature of `finding` in the light of all `calls` of its site."""
    signature = finding.signature
    mine = next((call for call in calls if call.forward == finding.forward), None)
    later = [call for call in calls if call.forward > finding.forward]
    if mine is None:
        return signature
    if signature.kind == "positions" and signature.start is not None:
        beyond = [call for call in later if call.first >= signature.start]
        if beyond and not any(call.wrong for call in beyond):
            words = f"{signature.detail}; a later pass beyond that position is right"
            return replace(signature, kind="rows", detail=words)
    if signature.kind == "unexplained" and finding.own and mine.rows == 1:
        earlier = [call for call in calls if call.forward < finding.forward and call.rows > 1]
        if earlier and not any(call.wrong for call in earlier):
            words = f"{signature.detail}; only where there is one row (decode)"
            return replace(signature, kind="rows", detail=words)
    return signature
