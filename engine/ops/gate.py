"""The router: hash layers look experts up by token id, the others score them.

Source: the release, Gate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.numerics import acc
from dsv4_bench.engine.ops.linear import matmul
from dsv4_bench.engine.registry import op


def _flops(a: dict[str, Any]) -> int:
    n, k = a["weight"].shape
    return 2 * n * k * a["x"].shape[0]


@op("gate", outputs=("routing", "experts", "scores"), discrete=("experts",), flops=_flops)
def gate(
    x: Tensor,
    tokens: Tensor,
    *,
    weight: Weight,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """scores = sqrt(softplus(x W^T)) in float32; pick k experts; weights from the scores alone.

    x [n, d], tokens [n] int64, weight dense [e, d], bias [e] (used only to pick) or tid2eid [v, k]
    (hash layers). Returns routing [n, k] float32, renormalised to sum `scale`; experts [n, k]
    int32, best first, ties to the lower id; scores [n, e] float32 without bias.
    """
    scores = F.softplus(matmul(x, weight)).sqrt()  # [n, e]
    if tid2eid is not None:
        chosen = tid2eid[tokens].long()  # [n, k]
    else:
        biased = scores if bias is None else scores + acc(bias)
        chosen = biased.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    routing = scores.gather(1, chosen)
    routing = routing / routing.sum(-1, keepdim=True) * scale
    return routing, chosen.to(torch.int32), scores
