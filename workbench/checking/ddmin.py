"""Delta debugging: a smallest part of a set that still breaks

Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input", 2002.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def ddmin(
    units: Sequence[T],
    breaks: Callable[[list[T]], bool],
    cost: Callable[[list[T]], float] = len,
) -> list[T]:
    """A 1-minimal part of `units`, in their order: it breaks, and does not without any one of its units.

    `breaks(units)` must hold and is not asked. Of the parts to try next the cheapest by `cost` comes
    first. A part may be asked for twice: keeping answers is the caller's.
    """
    left, pieces = list(units), 2
    while len(left) >= 2:
        chunks, rests = _split(left, pieces)
        if pieces == 2:
            rests = []  # of two halves, each is the rest of the other
        for candidates, next_pieces in ((chunks, 2), (rests, max(pieces - 1, 2))):
            broken = next((c for c in sorted(candidates, key=cost) if breaks(c)), None)
            if broken is not None:
                left, pieces = broken, min(next_pieces, max(len(broken), 2))
                break
        else:
            if pieces == len(left):
                break
            pieces = min(2 * pieces, len(left))
    return left


def _split(units: list[T], pieces: int) -> tuple[list[list[T]], list[list[T]]]:
    """`units` in `pieces` runs whose lengths differ by at most one, and what is left without each."""
    bounds = [i * len(units) // pieces for i in range(pieces + 1)]
    spans = list(itertools.pairwise(bounds))
    return [units[a:b] for a, b in spans], [units[:a] + units[b:] for a, b in spans]


def expected_trials(units: int) -> float:
    """Trials that finding a single unit takes: two halves at each of log2(units) levels."""
    return 2 * math.log2(units) if units > 1 else 0.0
