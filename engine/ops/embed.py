"""Token embedding, repeated to the residual streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import nbytes, op


def _traffic(a: dict[str, Any]) -> int:
    """Only the rows of the tokens are read."""
    row = a["weight"].data[0].nbytes
    return nbytes(a["tokens"]) + len(a["tokens"]) * row + nbytes(a["x"])


@op("embed", outputs=("x",), traffic=_traffic)
def embed(tokens: Tensor, *, weight: Weight, hc: int, dtype: torch.dtype) -> Tensor:
    """tokens [n] int64 -> x [n, hc, d], hc identical copies, in `dtype`.

    `weight` is dense [v, d]; only the rows asked for are read. Token ids must be in [0, v).
    """
    rows = weight.data[tokens].to(dtype)  # [n, d]
    return rows.unsqueeze(1).repeat(1, hc, 1)
