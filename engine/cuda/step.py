"""A decode step's index tensors made by one launch on the GPU, for CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import Library, N, P
from dsv4_bench.engine.fixed_step import FixedStep

_COMPRESSED = (N, N, P, P, P, P, N, P)
STEP = Library(
    "step",
    {"step": (P, N, N, P, P, *_COMPRESSED, *_COMPRESSED), "pool_rows": (P, N, N, N, P)},
)
_MOST_RATIOS = 2


class CudaStep(FixedStep):
    """FixedStep with kernels of its own: `advance` writes the index tensors where they are."""

    def advance(self) -> None:
        batch = len(self.lengths)
        groups: list[Any] = []
        for ratio in self.capacities:
            groups += self._group(ratio)
        groups += [0, 0, None, None, None, None, 0, None] * (_MOST_RATIOS - len(self.capacities))
        STEP.call(
            "step",
            self.positions,
            self.positions.data_ptr(),
            batch,
            self.window,
            self.ring_slots.data_ptr(),
            self.ring_rows.data_ptr(),
            *groups,
        )

    def _group(self, ratio: int) -> list[Any]:
        """struct Compressed of step_sm90.cu."""
        (places, slots), rows = self._new[ratio], self._all_rows.get(ratio)
        return [
            ratio,
            self.capacities[ratio],
            self._visible[ratio].data_ptr(),
            places.data_ptr(),
            slots.data_ptr(),
            self._tables[ratio].data_ptr(),
            0 if rows is None else rows.shape[1],
            None if rows is None else rows.data_ptr(),
        ]

    def pool_rows(self, index: Tensor, capacity: int) -> Tensor:
        if len(self.lengths) == 1 or index.dtype != torch.int32 or not index.is_contiguous():
            return super().pool_rows(index, capacity)
        rows = torch.empty_like(index)
        n, k = index.shape
        STEP.call("pool_rows", index, index.data_ptr(), n, k, capacity, rows.data_ptr())
        return rows
