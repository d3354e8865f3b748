"""The `sm90` implementations of the dense ops with weights: linear, grouped_linear.

Contracts are those of the references in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda.library import (
    DTYPES,
    I,
    Library,
    N,
    P,
    activation,
    sm90,
    wrong,
)
from dsv4_bench.engine.cuda.skinny import SKINNY, plan_for, skinny
from dsv4_bench.engine.cuda.weights import pack
from dsv4_bench.engine.formats import Weight

LINEAR = Library("linear", {"linear": (P, I, N, P, N, P, I)})


@sm90("linear", LINEAR, also=(SKINNY,))
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    return matmul("linear", x, weight, 1, out_dtype or x.dtype)


@sm90("grouped_linear", LINEAR, also=(SKINNY,))
def grouped_linear(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    if groups < 1 or weight.shape[0] % groups:
        wrong("grouped_linear", f"{groups} groups do not divide {weight.shape[0]} rows")
    return matmul("grouped_linear", o, weight, groups, o.dtype)


def matmul(op: str, x: Tensor, weight: Weight, groups: int, out_dtype: torch.dtype) -> Tensor:
    """x [..., groups * k] -> [..., n] in `out_dtype`."""
    x, kind = activation(op, x)
    packed = pack(weight)
    if x.shape[-1] != groups * packed.k or packed.data.device != x.device:
        wrong(op, f"x is {list(x.shape)}, weight {weight.name!r} [{packed.n}, {packed.k}]")
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    kept = out_dtype if out_dtype in DTYPES else torch.float32
    y = x.new_empty((*x.shape[:-1], packed.n), dtype=kept)
    there = y.data_ptr()
    if x.dtype is torch.bfloat16 and (plan := plan_for(packed, rows, groups)):
        skinny(x, packed, groups, y, plan)
    else:
        pointers = packed.address, groups, there
        LINEAR.call("linear", x, x.data_ptr(), kind, rows, *pointers, DTYPES[kept])
    return y if kept is out_dtype else y.to(out_dtype)
