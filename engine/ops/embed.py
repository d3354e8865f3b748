"""Token embedding, repeated to the residual streams."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import op


@op("embed", outputs=("x",))
def embed(tokens: Tensor, *, weight: Weight, hc: int, dtype: torch.dtype) -> Tensor:
    """tokens [n] int64 -> x [n, hc, d], hc identical copies, in `dtype`.

    `weight` is dense [v, d]; only the rows asked for are read. Token ids must be in [0, v).
    """
    rows = weight.data[tokens].to(dtype)  # [n, d]
    return rows.unsqueeze(1).repeat(1, hc, 1)
