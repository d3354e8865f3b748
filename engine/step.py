"""One forward call over a ragged batch: whose tokens these are, where they stand, what they can see.

Sequences of different lengths lie one after another in one token axis `n`; there is no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """`tokens` [n] int64, sequence by sequence; sequence b brings `lengths[b]` tokens at positions
    `starts[b]`, `starts[b]` + 1, ...  Index tensors are made once per step, on the tokens' device.
    """

    tokens: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    window: int

    @property
    def padded(self) -> bool:
        """Whether a compressor returns a row for every sequence, zeros where no window closes."""
        return False

    @property
    def is_decode(self) -> bool:
        """One token for every sequence."""
        return all(length == 1 for length in self.lengths)

    def rows(self) -> list[slice]:
        """The slice of the token axis that belongs to each sequence."""
        slices, first = [], 0
        for length in self.lengths:
            slices.append(slice(first, first + length))
            first += length
        return slices

    @cached_property
    def sequence(self) -> Tensor:
        """[n] int64: which sequence a token belongs to."""
        lengths = torch.tensor(self.lengths)
        return torch.arange(len(lengths)).repeat_interleave(lengths).to(self.tokens.device)

    @cached_property
    def positions(self) -> Tensor:
        """[n] int64: absolute position of each token in its sequence."""
        spans = zip(self.starts, self.lengths, strict=True)
        parts = [torch.arange(start, start + length) for start, length in spans]
        return torch.cat(parts).to(self.tokens.device)

    # -- sliding window

    @cached_property
    def ring_slots(self) -> Tensor:
        """[n] int64 row in the flattened ring [b*window] that each token is written to.

        -1 for tokens that a later token of the same step would overwrite.
        """
        slots = self.sequence * self.window + self.positions % self.window
        ends = torch.tensor(self.starts) + torch.tensor(self.lengths)
        last = ends.to(self.tokens.device)[self.sequence] - self.window
        return torch.where(self.positions >= last, slots, -1)

    @cached_property
    def window_rows(self) -> Tensor:
        """[n, window] int32 rows of `gather_swa`'s pool: positions p-window+1 ... p, -1 before 0."""
        offsets = torch.arange(-self.window + 1, 1, device=self.tokens.device)
        keys = self.positions[:, None] + offsets  # [n, window] absolute positions
        starts = torch.tensor(self.starts, device=keys.device)[self.sequence][:, None]
        first_row = torch.tensor([s.start for s in self.rows()], device=keys.device)
        fresh = first_row[self.sequence][:, None] + keys - starts + len(self.starts) * self.window
        ring = self.sequence[:, None] * self.window + keys % self.window
        rows = torch.where(keys >= starts, fresh, ring)
        return torch.where(keys >= 0, rows, -1).int()

    @cached_property
    def ring_rows(self) -> Tensor:
        """[n, window] int32 rows of the ring itself, once it holds this step's tokens (decode)."""
        offsets = torch.arange(-self.window + 1, 1, device=self.tokens.device)
        keys = self.positions[:, None] + offsets
        rows = self.sequence[:, None] * self.window + keys % self.window
        return torch.where(keys >= 0, rows, -1).int()

    # -- compressed entries; entry j of a sequence is closed by position (j + 1) * ratio - 1

    def entries_of(self, b: int, ratio: int) -> int:
        """Entries sequence b has after this step."""
        return (self.starts[b] + self.lengths[b]) // ratio

    def entries(self, ratio: int) -> int:
        """The most entries any sequence has after this step."""
        return max(self.entries_of(b, ratio) for b in range(len(self.lengths)))

    def visible(self, ratio: int) -> Tensor:
        """[n] int64: how many entries each token may see, (p + 1) // ratio."""
        return (self.positions + 1) // ratio

    def closed(self, ratio: int) -> list[int]:
        """Rows that a compressor returns for each sequence: its windows that close in this step."""
        return _closed(self.starts, self.lengths, ratio)

    def sequence_table(self, ratio: int) -> Tensor:
        """[b, 4] int64: first position, tokens, first row in n, first row of `closed` (-1 if none)."""
        return _sequence_table(self.starts, self.lengths, ratio, self.tokens.device)

    def new_entries(self, ratio: int, capacity: int) -> tuple[Tensor, Tensor]:
        """Of the entries that close in this step: position of the first token [m], and row [m] in a
        pool of `capacity` rows a sequence. Both int64."""
        positions, slots = [], []
        for b, start in enumerate(self.starts):
            index = torch.arange(start // ratio, self.entries_of(b, ratio))
            positions.append(index * ratio)
            slots.append(index + b * capacity)
        device = self.tokens.device
        return torch.cat(positions).to(device), torch.cat(slots).to(device)

    def all_rows(self, ratio: int, capacity: int) -> Tensor:
        """[n, T] int32 pool rows of every visible entry, -1 elsewhere: what HCA attends to."""
        columns = torch.arange(self.entries(ratio), device=self.tokens.device)
        index = columns.expand(len(self.tokens), -1)
        visible = index < self.visible(ratio)[:, None]
        return self.pool_rows(torch.where(visible, index, -1), capacity)

    def pool_rows(self, index: Tensor, capacity: int) -> Tensor:
        """Local entry indices [n, k] -> rows [n, k] int32 in a pool of `capacity` rows a sequence."""
        base = (self.sequence * capacity)[:, None]
        return torch.where(index >= 0, index + base, -1).int()


def _closed(starts: tuple[int, ...], lengths: tuple[int, ...], ratio: int) -> list[int]:
    return [(a % ratio + b) // ratio for a, b in zip(starts, lengths, strict=True)]


@lru_cache(maxsize=16)  # the layers of a step ask for the same one
def _sequence_table(
    starts: tuple[int, ...], lengths: tuple[int, ...], ratio: int, device: torch.device
) -> Tensor:
    table, row, window = [], 0, 0
    for start, length, closed in zip(starts, lengths, _closed(starts, lengths, ratio), strict=True):
        table.append((start, length, row, window if closed else -1))
        row, window = row + length, window + closed
    return torch.tensor(table, dtype=torch.int64).to(device, non_blocking=True)
