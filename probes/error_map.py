"""An error as a picture: rows x columns of an output, each cell the worst place of its block"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.metrics import masks_differ, rows_of

MOST_CELLS = 64 * 256


@dataclass(frozen=True)
class Area:
    """Rows [top, bottom) and columns [left, right) of an output seen as [rows, everything else]."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class ErrorMap:
    """`error` [height][width]: the largest |ours - theirs| of each block, in units of the rms of
    theirs; infinite where only one is finite, or both are infinite or NaN in different ways.

    A cell covers `block` rows x columns, powers of two, from the area's top left on (the last ones
    may be smaller).
    `at` is (row, column) of each cell's worst place, `ours` and `theirs` the values there.
    """

    shape: list[int]
    area: Area
    block: tuple[int, int]
    rms: float
    error: list[list[float]]
    at: list[list[tuple[int, int]]]
    ours: list[list[float]]
    theirs: list[list[float]]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "area": vars(self.area)}


def error_map(
    ours: Tensor, theirs: Tensor, height: int, width: int, area: Area | None = None
) -> ErrorMap:
    """The map of two outputs of one shape [rows, ...] in at most `height` x `width` cells.

    Integers are compared as sets: rows are sorted, and an id that differs counts as 1. Raises
    DSV4Error for shapes that differ, an empty tensor, an area outside it, or more than MOST_CELLS.
    """
    if ours.shape != theirs.shape:
        raise DSV4Error(f"shapes differ: {list(ours.shape)} and {list(theirs.shape)}")
    if ours.numel() == 0:
        raise DSV4Error("the output is empty: there is nothing to draw")
    if height < 1 or width < 1 or height * width > MOST_CELLS:
        raise DSV4Error(f"{height}x{width} cells: from 1x1 up to {MOST_CELLS} in all")
    ours, theirs = torch.atleast_1d(ours), torch.atleast_1d(theirs)
    a, b = rows_of(ours), rows_of(theirs)
    area = area or Area(0, a.shape[0], 0, a.shape[1])
    if not (
        0 <= area.top < area.bottom <= a.shape[0] and 0 <= area.left < area.right <= a.shape[1]
    ):
        raise DSV4Error(f"{area} is not in {a.shape[0]} rows x {a.shape[1]} columns")
    rms = _rms(b) if b.is_floating_point() else 1.0
    window = (slice(area.top, area.bottom), slice(area.left, area.right))
    error = _errors(a, b, window) / rms
    block = (_block(error.shape[0], height), _block(error.shape[1], width))
    worst, place = _worst_of_blocks(error, block)
    rows, columns = place[0] + area.top, place[1] + area.left
    return ErrorMap(
        list(ours.shape),
        area,
        block,
        rms,
        worst.tolist(),
        [
            list(zip(r, c, strict=True))
            for r, c in zip(rows.tolist(), columns.tolist(), strict=True)
        ],
        a[rows, columns].double().tolist(),
        b[rows, columns].double().tolist(),
    )


def _errors(a: Tensor, b: Tensor, window: tuple[slice, slice]) -> Tensor:
    """[rows, columns] float64 of the window: |a - b|, infinite where they are differently finite."""
    if not b.is_floating_point():
        return (a.sort(-1).values != b.sort(-1).values)[window].double()
    a, b = a[window].double(), b[window].double()
    difference = (a - b).abs().nan_to_num(0.0, 0.0, 0.0)
    return difference.masked_fill(masks_differ(a, b), math.inf)


def _block(size: int, cells: int) -> int:
    """The least power of two that covers `size` in `cells`: tiles of kernels are powers of two."""
    return 1 << (-(-size // cells) - 1).bit_length()


def _rms(truth: Tensor) -> float:
    """Root mean square of the finite values; 1 where it is 0."""
    values = truth.double()
    values = values[torch.isfinite(values)]
    return float(values.square().mean().sqrt()) or 1.0 if values.numel() else 1.0


def _worst_of_blocks(error: Tensor, block: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Largest value of each block [h, w], and its (rows, columns) in `error`."""
    rows, columns = error.shape
    high, wide = block
    h, w = -(-rows // high), -(-columns // wide)
    padded = error.new_full((h * high, w * wide), -1.0)
    padded[:rows, :columns] = error
    cells = padded.view(h, high, w, wide).transpose(1, 2).flatten(2)  # [h, w, high*wide]
    worst, index = cells.max(-1)
    top = torch.arange(h, device=error.device)[:, None] * high
    left = torch.arange(w, device=error.device) * wide
    return worst, (top + index // wide, left + index % wide)
