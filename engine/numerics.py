"""In which precision the references compute: float32, or float64 when they serve as the oracle.

Every reference widens its inputs with `acc`. Under `double_precision()` the same code computes in
float64, from the exactly dequantised weights: the truth that implementations are judged by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_dtype = torch.float32


def acc_dtype() -> torch.dtype:
    """The dtype references accumulate in."""
    return _dtype


def acc(x: Tensor) -> Tensor:
    """`x` in the dtype references accumulate in."""
    return x.to(_dtype)


@contextmanager
def double_precision() -> Iterator[None]:
    """References compute in float64 inside this block; not for use from several threads."""
    global _dtype
    before, _dtype = _dtype, torch.float64
    try:
        yield
    finally:
        _dtype = before
