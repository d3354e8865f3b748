"""Several linears of the same one to eight activation rows in one launch: what a decode layer's small matrices read.

Each result is that of op linear within rounding: bit for bit where both divide the columns among the warps
alike, as at 4,096 columns, else the order of additions is another.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import DTYPES, Library, N, P
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.formats import Weight

LINEARS = Library("linears", {"linears": (P, N, N, N, P, P, P)})
_MOST, _ROWS, _WIDEST, _FORMATS = 8, 8, 8192, ("dense", "fp8_block")


def joins_linears(
    x: Tensor, weights: Sequence[Weight], out_dtypes: Sequence[torch.dtype | None]
) -> bool:
    """Whether `linears` takes these: one to eight bfloat16 rows, two to eight matrices in bfloat16 or FP8."""
    return (
        1 < len(weights) <= _MOST
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and x.data_ptr() % 16 == 0
        and 0 < x.shape[-1] <= _WIDEST
        and x.shape[-1] % 16 == 0
        and 0 < x.numel() <= _ROWS * x.shape[-1]
        and all(w.format in _FORMATS and w.shape[1] == x.shape[-1] for w in weights)
        and all(w.format != "dense" or w.data.dtype == torch.bfloat16 for w in weights)
        and all((dtype or x.dtype) in DTYPES for dtype in out_dtypes)
    )


def linears(
    x: Tensor, weights: Sequence[Weight], out_dtypes: Sequence[torch.dtype | None]
) -> list[Tensor]:
    """x [m, k] times each weight [n, k]: [m, n] in its out_dtype, or x's; for what `joins_linears`."""
    packed = [pack(weight) for weight in weights]
    dtypes = [dtype or x.dtype for dtype in out_dtypes]
    results = [
        torch.empty((*x.shape[:-1], p.n), dtype=dtype, device=x.device)
        for p, dtype in zip(packed, dtypes, strict=True)
    ]
    count, k = len(packed), x.shape[-1]
    matrices = (ctypes.c_void_p * count)(*(p.address for p in packed))
    there = (ctypes.c_void_p * count)(*(y.data_ptr() for y in results))
    kinds = (ctypes.c_int * count)(*(DTYPES[dtype] for dtype in dtypes))
    LINEARS.call("linears", x, x.data_ptr(), x.numel() // k, k, count, matrices, there, kinds)
    return results
