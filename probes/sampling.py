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
    return rows[_spaced(count, most, rows.device)], f"{most} of {count} {what}"


def sample(count: int, most: int, what: str = "queries") -> tuple[list[int], str]:
    """The same of the rows 0 to count - 1, on the host."""
    if count <= most:
        return list(range(count)), ""
    return _spaced(count, most, torch.device("cpu")).tolist(), f"{most} of {count} {what}"


def _spaced(count: int, most: int, device: torch.device) -> Tensor:
    """`most` of the numbers 0 to count - 1 there, which nobody waits for."""
    return torch.linspace(0, count - 1, most, device=device).round().long()


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 numbers of the host [n] as a tensor there, without waiting for what the device does."""
    tensor = torch.tensor(values, dtype=torch.long)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
