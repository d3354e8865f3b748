"""Rows that a costly probe looks at when it cannot look at all, and the words that say so"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_rows(rows: Tensor, most: int, what: str = "queries") -> tuple[Tensor, str]:
    """Up to `most` of `rows` [n] int64, evenly spaced, first and last included; "" if all of them.

    The text belongs into a reading's detail: sampling is never silent.
    """
    count = len(rows)
    if count <= most:
        return rows, ""
    chosen = torch.linspace(0, count - 1, most, device=rows.device).round().long()
    return rows[chosen], f"{most} of {count} {what}"


def furthest(values: Tensor, target: float) -> Tensor:
    """The one of `values` that is furthest from `target`, 0-d, without waiting for a device."""
    flat = values.flatten()
    return flat.index_select(0, (flat - target).abs().argmax()[None])[0]


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 numbers of the host [n] as a tensor there, without waiting for what the device does."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
