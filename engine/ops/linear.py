"""Matrix products with weights in any checkpoint format.

Source: the release, Linear, without the simulated quantisation of activations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.formats import DENSE_CACHE, Weight
from dsv4_bench.engine.numerics import acc, acc_dtype
from dsv4_bench.engine.registry import op

_ROW_BLOCK = 1 << 26  # elements dequantised at a time when the matrix is not kept


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """x [m, k] -> x @ W^T [m, n] in float32 (the oracle: float64), from the dequantised weight."""
    xf = acc(x)
    if acc_dtype() == torch.float64:
        # Without the global scale a quantised weight is exact in float32; the scale follows in float64.
        exact = replace(weight, global_scale=1.0)
        return _by_row_blocks(xf, exact) * weight.global_scale
    dense = DENSE_CACHE.get(weight)
    return xf @ dense.T if dense is not None else _by_row_blocks(xf, weight)


def _by_row_blocks(xf: Tensor, weight: Weight) -> Tensor:
    n, k = weight.shape
    rows = max(1, _ROW_BLOCK // k)
    blocks = range(0, n, rows)
    return torch.cat(
        [xf @ acc(weight.dequantize_rows(r, min(r + rows, n))).T for r in blocks], dim=1
    )


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

    Group g's n/groups output rows see only columns [g*k, (g+1)*k) of o.
    """
    m = o.shape[0]
    n, k = weight.shape
    of = acc(o).view(m, groups, k).transpose(0, 1)  # [g, m, k]
    w = _dense(weight).view(groups, n // groups, k)
    z = of @ w.transpose(1, 2)  # [g, m, n/g]
    return z.transpose(0, 1).reshape(m, n).to(o.dtype)


def _dense(weight: Weight) -> Tensor:
    """The whole matrix [n, k] in the references' precision."""
    if acc_dtype() == torch.float64:
        return acc(replace(weight, global_scale=1.0).dequantize()) * weight.global_scale
    kept = DENSE_CACHE.get(weight)
    return weight.dequantize() if kept is None else kept
