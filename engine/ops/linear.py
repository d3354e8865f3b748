"""Matrix products with weights in any checkpoint format (MODEL.md 5.4, without activation quantisation)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import DENSE_CACHE, Weight
from dsv4_bench.engine.registry import op

_ROW_BLOCK = 1 << 26  # elements dequantised at a time when the matrix is not kept


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x [m, k] -> x @ W^T [m, n] in float32, from the exactly dequantised weight."""
    xf = x.float()
    dense = DENSE_CACHE.get(weight)
    if dense is not None:
        return xf @ dense.T
    n, k = weight.shape
    rows = max(1, _ROW_BLOCK // k)
    blocks = range(0, n, rows)
    return torch.cat([xf @ weight.dequantize_rows(r, min(r + rows, n)).T for r in blocks], dim=1)


def _flops(a: dict[str, Any]) -> int:
    n, k = a["weight"].shape
    return 2 * n * k * (a["x"].numel() // a["x"].shape[-1])


@op("linear", outputs=("y",), flops=_flops)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    """y = x W^T: x [m, k], weight [n, k] in any format -> y [m, n].

    float32 accumulation, one cast to `out_dtype` (x's dtype when None). The global scale of NVFP4
    belongs to the product, not to the rounded weight.
    """
    return matmul(x, weight).to(out_dtype or x.dtype)


def _grouped_flops(a: dict[str, Any]) -> int:
    n, k = a["weight"].shape
    return 2 * n * k * a["o"].shape[0]


@op("grouped_linear", outputs=("z",), flops=_grouped_flops)
def grouped_linear(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    """Block-diagonal projection: o [m, groups*k] -> z [m, n], weight [n, k] in `groups` row blocks.

    Group g's n/groups output rows see only columns [g*k, (g+1)*k) of o (MODEL.md 5.7).
    """
    m = o.shape[0]
    n, k = weight.shape
    of = o.float().view(m, groups, k).transpose(0, 1)  # [g, m, k]
    dense = DENSE_CACHE.get(weight)
    w = weight.dequantize() if dense is None else dense
    z = of @ w.view(groups, n // groups, k).transpose(1, 2)  # [g, m, n/g]
    return z.transpose(0, 1).reshape(m, n).to(o.dtype)
