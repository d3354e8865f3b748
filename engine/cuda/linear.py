"""The `sm90` implementations of the dense ops with weights: linear, grouped_linear.

Contracts are those of the references in `ops`. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

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
from dsv4_bench.engine.cuda.weights import Packed, pack
from dsv4_bench.engine.formats import Weight

LINEAR = Library("linear", {"linear": (P, I, N, P, N, P, I)})
SKINNY = Library("skinny", {"skinny": (P, N, P, N, P, I, I, I)})

# ------------------------------------------------------------------------------ linear


@sm90("linear", LINEAR)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    return matmul("linear", x, weight, 1, out_dtype or x.dtype)


@sm90("grouped_linear", LINEAR)
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
    divided = _division(packed, rows, groups) if x.dtype is torch.bfloat16 else None
    if divided:
        address = packed.address
        SKINNY.call("skinny", x, x.data_ptr(), rows, address, groups, there, DTYPES[kept], *divided)
    else:
        LINEAR.call(
            "linear", x, x.data_ptr(), kind, rows, packed.address, groups, there, DTYPES[kept]
        )
    return y if kept is out_dtype else y.to(out_dtype)


# ------------------------------------------------------------------------------ a few to 64 rows

# By format code (enum dsv4_format): columns of a stage of csrc/cuda/skinny.cuh, what k must be a multiple
# of, and the activation rows for which it is the fastest kernel.
_SKINNY = {
    0: (256, 64, range(0)),
    1: (256, 128, range(0)),
    2: (128, 16, range(0)),
    3: (128, 16, range(0)),
    5: (64, 8, range(0)),
}
# Nanoseconds: a stage of every warp of a block, as memory and decoding set it; a byte of activations; a
# block beside these; what a cluster adds. Blocks that run at once, by the size of their cluster.
_STAGE_NS, _BYTE_NS, _BLOCK_NS, _CLUSTER_NS = 1000, 1 / 55, 1500, 600
_AT_ONCE = {1: 132, 2: 132, 4: 128, 8: 128}


class Division(NamedTuple):
    """A tile of 64 * row_groups weight rows, its columns over `splits` blocks."""

    row_groups: int
    splits: int


def _division(packed: Packed, m: int, groups: int) -> Division | None:
    """How skinny.cuh divides the product of m rows; None where it is not the kernel to use."""
    columns, whole, rows = _SKINNY.get(packed.format, (0, 1, range(0)))
    if m not in rows or packed.k % whole:
        return None
    return divide(packed.n // groups, groups, m, packed.k, columns)


@lru_cache(1024)
def divide(n: int, groups: int, m: int, k: int, columns: int) -> Division | None:
    """The fastest by the figures above for groups of n weight rows; None if no tile fits a group.

    `columns`: of a stage.
    """
    stages, tokens = -(-k // columns), 16 if m <= 16 else 32 if m <= 32 else 64

    def nanoseconds(row_groups: int, splits: int) -> float:
        column_groups = 4 // row_groups
        own = -(-stages // (splits * column_groups))
        blocks = groups * -(-n // (64 * row_groups)) * -(-m // tokens) * splits
        staged = own * column_groups * 2 * columns * min(m, tokens)
        one = own * _STAGE_NS + staged * _BYTE_NS + _BLOCK_NS
        return -(-blocks // _AT_ONCE[splits]) * one + (_CLUSTER_NS if splits > 1 else 0)

    choices = [
        Division(row_groups, splits)
        for row_groups in (4, 2, 1)
        for splits in (1, 2, 4, 8)
        if groups == 1 or n % (64 * row_groups) == 0
    ]
    return min(choices, key=lambda choice: nanoseconds(*choice), default=None)
