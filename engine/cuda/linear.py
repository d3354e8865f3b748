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
SKINNY = Library("skinny", {"skinny": (P, N, P, N, P, I, I, I, P)})

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
    if x.dtype is torch.bfloat16 and (plan := _skinny_plan(packed, rows, groups)):
        skinny(x, packed, groups, y, plan)
    else:
        pointers = packed.address, groups, there
        LINEAR.call("linear", x, x.data_ptr(), kind, rows, *pointers, DTYPES[kept])
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
# Nanoseconds: a stage of every warp of a block; a byte that a multiprocessor reads; a block beside these; a
# second kernel for the sums; a byte of what it adds up.
_STAGE_NS, _BYTE_NS, _BLOCK_NS, _SUM_NS, _PART_NS = 1100, 1 / 45, 1500, 1500, 1 / 3000
_PROCESSORS, _MOST_SPLITS = 132, 64


class Plan(NamedTuple):
    """A tile of 64 * row_groups weight rows, its columns over `splits` blocks; bytes of workspace."""

    row_groups: int
    splits: int
    workspace: int


def skinny(x: Tensor, packed: Packed, groups: int, y: Tensor, plan: Plan) -> None:
    """y [..., n] = x [..., groups * k] W^T by csrc/cuda/skinny.cuh; x bfloat16, y float32 or bfloat16."""
    space = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device)
    m, there, kind = y.numel() // packed.n, y.data_ptr(), DTYPES[y.dtype]
    pointers = packed.address, groups, there
    division = plan.row_groups, plan.splits
    SKINNY.call("skinny", x, x.data_ptr(), m, *pointers, kind, *division, space.data_ptr())


def _skinny_plan(packed: Packed, m: int, groups: int) -> Plan | None:
    """How skinny.cuh divides the product of m rows; None where it is not the kernel to use."""
    columns, whole, rows = _SKINNY.get(packed.format, (0, 1, range(0)))
    if m not in rows or packed.k % whole:
        return None
    return best_plan(packed.n // groups, groups, m, packed.k, columns)


@lru_cache(1024)
def best_plan(n: int, groups: int, m: int, k: int, columns: int) -> Plan | None:
    """The fastest by the figures above for groups of n weight rows; None if no tile fits a group.

    `columns`: of a stage.
    """
    stages, tokens = -(-k // columns), _tokens(m)

    def nanoseconds(plan: Plan) -> float:
        column_groups = 4 // plan.row_groups
        own = -(-stages // (plan.splits * column_groups))
        blocks = groups * -(-n // (64 * plan.row_groups)) * -(-m // tokens) * plan.splits
        read = own * (16 * 2304 + column_groups * 2 * columns * tokens)
        parts = plan.splits * column_groups
        summed = _SUM_NS + 8 * parts * m * groups * n * _PART_NS if parts > 1 else 0
        one = max(own * _STAGE_NS, read * _BYTE_NS) + _BLOCK_NS
        return -(-blocks // _PROCESSORS) * one + summed

    plans = [
        plan_of(n * groups, groups, m, k, columns, row_groups, splits)
        for row_groups in (4, 2, 1)
        for splits in range(1, min(stages, _MOST_SPLITS) + 1)
        if groups == 1 or n % (64 * row_groups) == 0
    ]
    return min(plans, key=nanoseconds, default=None)


def _tokens(m: int) -> int:
    """Activation rows of a block."""
    return 16 if m <= 16 else 32 if m <= 32 else 64


def plan_of(
    n: int, groups: int, m: int, k: int, columns: int, row_groups: int, splits: int
) -> Plan:
    """The plan of such a division, with its workspace (see dsv4_skinny)."""
    parts, tokens = splits * 4 // row_groups, _tokens(m)
    placed = 2 * groups * -(-m // tokens) * tokens * -(-k // columns) * columns
    partial = 4 * parts * m * -(-n // (64 * row_groups)) * 64 * row_groups if parts > 1 else 0
    return Plan(row_groups, splits, 1024 + placed + partial)
