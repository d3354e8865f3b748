"""Limits that calibrate themselves: how far from float64 an honest implementation may be.

Per op, output and dtype: `honest` is the largest error of the reference, which rounds as any kernel
in that dtype must; `noise` is how much the float64 result moves when the inputs move by one unit in
the last place. limit = 2 * honest + noise, of the worst row 4 * honest + noise. The numbers are kept
with their evidence.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.metrics import tensor_and_row_error

MARGIN = 2.0
# One row scatters more between honest implementations than the whole: where its terms cancel, the
# order of additions decides. CPU kernels were seen at 3.3 times the reference's worst row.
ROW_MARGIN = 4.0
# Below this an error is not told from that of another order of float32 additions.
FLOOR = {torch.float32: 1.5e-7, torch.bfloat16: 2e-4}
SCHEMA_VERSION = 1


@dataclass
class Limit:
    """Limits of one output: of the whole tensor's relative L2, and of its worst row's."""

    op: str
    output: str
    dtype: str
    honest: float = 0.0
    honest_row: float = 0.0
    noise: float = 0.0
    noise_row: float = 0.0
    samples: int = 0

    def total(self, floor: float) -> float:
        return MARGIN * self.honest + self.noise + floor

    def row(self, floor: float) -> float:
        return ROW_MARGIN * self.honest_row + self.noise_row + 4 * floor


class Limits:
    """The table of limits of one run; `learn` adds evidence."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.floor = FLOOR.get(dtype, FLOOR[torch.float32])
        self.table: dict[tuple[str, str], Limit] = {}

    def learn(
        self, call: Captured, truth: dict[str, Tensor], noisy: dict[str, Tensor] | None
    ) -> None:
        """Take the reference's outputs in `call` as an honest low-precision run against `truth`.

        `noisy` is the oracle on inputs moved by one unit in the last place.
        """
        op = call.site.op
        for name, exact in truth.items():
            if not judged(call, name, exact):
                continue
            key = (op, name)
            dtype = str(self.dtype).removeprefix("torch.")
            limit = self.table.setdefault(key, Limit(op, name, dtype))
            limit.samples += 1
            error, row = tensor_and_row_error(call.outputs[name], exact)
            limit.honest, limit.honest_row = max(limit.honest, error), max(limit.honest_row, row)
            if noisy is not None:
                error, row = tensor_and_row_error(noisy[name], exact)
                limit.noise, limit.noise_row = max(limit.noise, error), max(limit.noise_row, row)

    def of(self, op: str, output: str, rows: int | None = None) -> tuple[float, float]:
        """(limit of the whole tensor, limit of the worst row); the floor for an unseen output.

        With `rows`, the tensor's number of rows: few of them average less, and one is its worst.
        """
        limit = self.table.get((op, output)) or Limit(op, output, "")
        total, row = limit.total(self.floor), limit.row(self.floor)
        if rows:
            total += max(row - total, 0.0) / rows**0.5
        return total, row

    def evidence(self, op: str, output: str) -> dict[str, Any] | None:
        """What the limit of one output was made from; None for one that was never calibrated."""
        limit = self.table.get((op, output))
        return None if limit is None else self._row(limit)

    def _row(self, limit: Limit) -> dict[str, Any]:
        totals = {"limit": limit.total(self.floor), "limit_row": limit.row(self.floor)}
        margins = {"margin": MARGIN, "margin_row": ROW_MARGIN, "floor": self.floor}
        return {**asdict(limit), **margins, **totals}

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "margin": MARGIN,
            "margin_row": ROW_MARGIN,
            "floor": self.floor,
            "limits": [self._row(limit) for limit in self.table.values()],
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def judged(call: Captured, output: str, value: Tensor) -> bool:
    """Whether an output is compared by value: floating point, not a set, not empty."""
    discrete = output in call.site.spec.discrete
    return value.is_floating_point() and not discrete and value.numel() > 0


def move_inputs(call: Captured, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The run-time float inputs of `dtype`, each value moved by up to one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.finfo(dtype).eps
    moved = {}
    for name, value in call.inputs.items():
        if (
            name in call.site.params
            or not isinstance(value, Tensor)
            or not value.is_floating_point()
        ):
            continue
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5
        exact = value.double()
        moved[name] = torch.where(
            torch.isfinite(exact), exact * (1 + noise.to(value.device) * step), exact
        )
    return moved
