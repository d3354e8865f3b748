"""A decode step whose tensors stay where they are, for a CUDA graph that is replayed token after token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4_bench.engine.config import CSA_RATIO
from dsv4_bench.engine.step import Step


class FixedStep(Step):
    """One token for each of b sequences, at positions that only the device knows.

    `tokens` and `positions` [b] int64 are buffers that the caller fills; `advance` adds one to the
    positions and makes every index tensor anew, with torch operations that a graph can capture.
    Shapes do not depend on the positions: they fit sequences of at most `limit` tokens. So

    - `entries(ratio)` is limit // ratio; what a token does not see yet has index -1 or score -inf;
    - a compressor returns a row for every sequence (`padded`), and the rows of windows that stay
      open are written to slot -1: nowhere.

    `capacities` has the pool rows of a sequence by compression ratio. Values, per token, are those
    of `Step`. Reading `starts` waits for the device, which a capture refuses.
    """

    def __init__(
        self,
        tokens: Tensor,
        positions: Tensor,
        window: int,
        limit: int,
        capacities: Mapping[int, int],
    ) -> None:
        batch, device = len(tokens), tokens.device
        vars(self).update(tokens=tokens, lengths=(1,) * batch, window=window)
        self.positions = positions
        self.limit = limit
        self.capacities = dict(capacities)
        self.sequence = torch.arange(batch, device=device)
        self._first = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._offsets = torch.arange(1 - window, 1, device=device)
        self._columns = {
            ratio: torch.arange(limit // ratio, device=device, dtype=torch.int32)
            for ratio in self.capacities
        }
        ones = torch.ones_like(self.sequence)
        self._tables = {
            ratio: torch.stack((ones, ones, self.sequence, self.sequence), dim=1)
            for ratio in self.capacities
        }
        self._bases = {
            ratio: (self.sequence * capacity)[:, None]
            for ratio, capacity in self.capacities.items()
        }
        self._compute()

    @property
    def padded(self) -> bool:
        return True

    @property
    def starts(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.positions.tolist())

    def advance(self) -> None:
        """Go to the next token."""
        self.positions += 1
        self._compute()

    def _compute(self) -> None:
        """Everything that depends on the positions."""
        p, ring = self.positions, self.sequence * self.window
        keys = p[:, None] + self._offsets  # [b, window] absolute positions
        self.ring_slots = ring + p % self.window
        rows = torch.where(keys >= 0, ring[:, None] + keys % self.window, -1)
        self.ring_rows = rows.int()
        self._visible, self._new, self._all_rows = {}, {}, {}
        for ratio, base in self._bases.items():
            index = p // ratio  # of the window that the token is in
            visible = (p + 1) // ratio
            closes = visible > index
            self._visible[ratio] = visible
            self._new[ratio] = index * ratio, torch.where(closes, base[:, 0] + index, -1)
            self._tables[ratio][:, 0] = p
            if ratio != CSA_RATIO:  # whose layers select
                columns = self._columns[ratio]
                rows = torch.where(columns < visible[:, None], columns + base, -1)
                self._all_rows[ratio] = rows.int()

    def tensors(self) -> list[Tensor]:
        """All tensors that sites are given."""
        new = [tensor for pair in self._new.values() for tensor in pair]
        tables = (self._visible, self._tables, self._all_rows)
        fixed = [self.tokens, self.positions, self.sequence, self.ring_slots, self.ring_rows]
        return [*fixed, *new, *(tensor for table in tables for tensor in table.values())]

    # -- what layers ask for

    def entries_of(self, b: int, ratio: int) -> int:
        return self.limit // ratio

    def visible(self, ratio: int) -> Tensor:
        return self._visible[ratio]

    def closed(self, ratio: int) -> list[int]:
        return [1] * len(self.lengths)

    def sequence_table(self, ratio: int) -> Tensor:
        return self._tables[ratio]

    def new_entries(self, ratio: int, capacity: int) -> tuple[Tensor, Tensor]:
        self._check(ratio, capacity)
        return self._new[ratio]

    def all_rows(self, ratio: int, capacity: int) -> Tensor:
        self._check(ratio, capacity)
        return self._all_rows[ratio]

    def pool_rows(self, index: Tensor, capacity: int) -> Tensor:
        if len(self.lengths) == 1:  # sequence 0 begins at row 0
            return index
        return super().pool_rows(index, capacity)

    def _check(self, ratio: int, capacity: int) -> None:
        assert capacity == self.capacities[ratio], (ratio, capacity, self.capacities)
