"""Several linears of one activation row in one launch: what a decode layer's small matrices read.

Each result is that of op linear within rounding: bit for bit where both divide the columns among the warps
alike, as at 4,096 columns, else the order of additions is another. With a norm, bit for bit that of
op rms_norm and then of the launch without one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import DTYPES, F, I, Library, N, P
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.formats import Weight

Norm = tuple[Tensor, float]  # weight [k] and eps of rms_norm

LINEARS = Library("linears", {"linears": (P, N, N, P, P, P, P, I, F)})
_MOST, _WIDEST, _FORMATS = 8, 8192, ("dense", "fp8_block")


def joins_linears(
    x: Tensor,
    weights: Sequence[Weight],
    out_dtypes: Sequence[torch.dtype | None],
    norm: Norm | None = None,
) -> bool:
    """Whether `linears` takes these: one bfloat16 row, two to eight matrices in bfloat16 or FP8; with a norm
    one is enough."""
    return (
        (1 if norm else 2) <= len(weights) <= _MOST
        and x.is_cuda
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and x.data_ptr() % 16 == 0
        and x.numel() == x.shape[-1] <= _WIDEST
        and x.shape[-1] % 16 == 0
        and all(w.format in _FORMATS and w.shape[1] == x.shape[-1] for w in weights)
        and all(w.format != "dense" or w.data.dtype == torch.bfloat16 for w in weights)
        and all((dtype or x.dtype) in DTYPES for dtype in out_dtypes)
        and (norm is None or _takes_gain(norm[0], x))
    )


def _takes_gain(gain: Tensor, x: Tensor) -> bool:
    return (
        gain.device == x.device
        and gain.dtype in DTYPES
        and gain.shape == x.shape[-1:]
        and gain.is_contiguous()
        and gain.data_ptr() % 32 == 0
    )


def linears(
    x: Tensor,
    weights: Sequence[Weight],
    out_dtypes: Sequence[torch.dtype | None],
    norm: Norm | None = None,
) -> list[Tensor]:
    """x [1, k] times each weight [n, k]: [1, n] in its out_dtype, or x's; for what `joins_linears`.

    With `norm`, rms_norm(x) in bfloat16 takes the place of x.
    """
    packed = [pack(weight) for weight in weights]
    dtypes = [dtype or x.dtype for dtype in out_dtypes]
    results = [
        torch.empty((*x.shape[:-1], p.n), dtype=dtype, device=x.device)
        for p, dtype in zip(packed, dtypes, strict=True)
    ]
    count = len(packed)
    matrices = (ctypes.c_void_p * count)(*(p.address for p in packed))
    there = (ctypes.c_void_p * count)(*(y.data_ptr() for y in results))
    kinds = (ctypes.c_int * count)(*(DTYPES[dtype] for dtype in dtypes))
    gain, eps = norm or (None, 0.0)
    where, kind = (None, 0) if gain is None else (gain.data_ptr(), DTYPES[gain.dtype])
    k = x.shape[-1]
    LINEARS.call("linears", x, x.data_ptr(), k, count, matrices, there, kinds, where, kind, eps)
    return results
