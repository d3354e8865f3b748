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
SKINNY = Library("skinny", {"skinny": (P, N, P, N, P, I, I, P)})

# ------------------------------------------------------------------------------ linear


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
    if x.dtype is torch.bfloat16 and (plan := _skinny_plan(packed, rows, groups)):
        skinny(x, packed, groups, y, plan)
    else:
        pointers = packed.address, groups, there
        LINEAR.call("linear", x, x.data_ptr(), kind, rows, *pointers, DTYPES[kept])
    return y if kept is out_dtype else y.to(out_dtype)


# ------------------------------------------------------------------------------ a few to 64 rows

# By format code (enum dsv4_format): columns of a stage of csrc/cuda/skinny.cuh, and what k must be a
# multiple of.
_SKINNY = {0: (256, 64), 1: (256, 128), 2: (128, 16), 3: (128, 16), 5: (64, 8)}
_FEWEST, _MOST = 17, 64  # activation rows for which it is the fastest kernel
_FEWEST_OF_SOME, _SMALL = (
    5,
    1024,
)  # measured for bfloat16, for FP8 of up to so many rows, and for one part
# Nanoseconds: a stage of every warp of a block; a byte that a multiprocessor reads; a block beside these; a
# second kernel for the sums; a byte of what it adds up.
_STAGE_NS, _BYTE_NS, _BLOCK_NS, _SUM_NS, _PART_NS = 1100, 1 / 45, 1500, 1500, 1 / 3000
_PROCESSORS, _TILE, _MOST_PARTS = 132, 256, 16


class Plan(NamedTuple):
    """Over how many blocks the columns of a tile are divided, and bytes of workspace (see dsv4_skinny)."""

    parts: int
    workspace: int


def skinny(x: Tensor, packed: Packed, groups: int, y: Tensor, plan: Plan) -> None:
    """y [..., n] = x [..., groups * k] W^T by csrc/cuda/skinny.cuh; x bfloat16, y float32 or bfloat16."""
    space = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device)
    m, there, kind = y.numel() // packed.n, y.data_ptr(), DTYPES[y.dtype]
    pointers = packed.address, groups, there
    SKINNY.call("skinny", x, x.data_ptr(), m, *pointers, kind, plan.parts, space.data_ptr())


def _skinny_plan(packed: Packed, m: int, groups: int) -> Plan | None:
    """How skinny.cuh divides the product of m rows; None where it is not the kernel to use."""
    if packed.format not in _SKINNY or (groups > 1 and packed.n // groups % _TILE):
        return None
    columns, whole = _SKINNY[packed.format]
    if not _FEWEST_OF_SOME <= m <= _MOST or packed.k % whole:
        return None
    plan = best_plan(packed.n, m, packed.k, columns, groups)
    some = columns == 64 or plan.parts == 1 or (columns == 128 and packed.n <= _SMALL)
    return plan if some or m >= _FEWEST else None


@lru_cache(1024)
def best_plan(n: int, m: int, k: int, columns: int, groups: int = 1) -> Plan:
    """The fastest by the figures above; a stage has `columns`."""
    stages, tiles, tokens = -(-k // columns), -(-n // _TILE), _tokens(m)

    def nanoseconds(parts: int) -> float:
        own, blocks = -(-stages // parts), tiles * -(-m // tokens) * parts
        read = own * (16 * 2304 + 2 * columns * tokens)
        summed = _SUM_NS + 8 * parts * m * n * _PART_NS if parts > 1 else 0
        one = max(own * _STAGE_NS, read * _BYTE_NS) + _BLOCK_NS
        return -(-blocks // _PROCESSORS) * one + summed

    best = min(range(1, min(stages, _MOST_PARTS) + 1), key=nanoseconds)
    return plan_of(n, m, k, columns, groups, best)


def plan_of(n: int, m: int, k: int, columns: int, groups: int, parts: int) -> Plan:
    """The plan of so many parts."""
    tokens = _tokens(m)
    placed = 2 * groups * -(-m // tokens) * tokens * -(-k // columns) * columns
    partial = 4 * parts * m * -(-n // _TILE) * _TILE if parts > 1 else 0
    return Plan(parts, 1024 + placed + partial)


def _tokens(m: int) -> int:
    """Activation rows of a block."""
    return 16 if m <= 16 else 32 if m <= 32 else 64
