"""The product of 5 to 64 bfloat16 rows by csrc/cuda/skinny.cuh: when linear takes it, how it is divided.

Nothing here synchronises with the GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import DTYPES, I, Library, N, P
from dsv4_bench.engine.cuda.weights import Packed

SKINNY = Library("skinny", {"skinny": (P, N, P, N, P, I, I, P)})


class Stage(NamedTuple):
    """`columns` of a weight that the kernel takes at a time; k has to be a multiple of `whole`."""

    columns: int
    whole: int


# By enum dsv4_format: NVFP4, MXFP4, FP8 with e8m0 and with float32 scales, bfloat16.
STAGES = {
    0: Stage(256, 64),
    1: Stage(256, 128),
    2: Stage(128, 16),
    3: Stage(128, 16),
    5: Stage(64, 8),
}
_FEWEST, _MOST = 17, 64  # activation rows for which it is the fastest kernel
# From so many on for bfloat16, for FP8 of up to _SMALL weight rows, and where nothing is to be added up.
_FEWEST_OF_SOME, _SMALL = 5, 1024
# Nanoseconds: a stage of every warp of a block; a byte that a multiprocessor reads; a block beside these; a
# second kernel for the sums; a byte of what it adds up.
_STAGE_NS, _BYTE_NS, _BLOCK_NS, _SUM_NS, _PART_NS = 1100, 1 / 45, 1500, 1500, 1 / 3000
_PROCESSORS, _TILE, _MOST_PARTS = 132, 256, 16
_STAGE_BYTES = 16 * 2304  # of a block's weights with their scales, 16 warps


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


def plan_for(packed: Packed, m: int, groups: int) -> Plan | None:
    """How the product of m rows is divided; None where this is not the kernel to use."""
    stage = STAGES.get(packed.format)
    if stage is None or (groups > 1 and packed.n // groups % _TILE):
        return None
    if not _FEWEST_OF_SOME <= m <= _MOST or packed.k % stage.whole:
        return None
    plan = best_plan(packed.n, m, packed.k, stage.columns, groups)
    bf16, fp8 = stage.columns == 64, stage.columns == 128
    some = bf16 or plan.parts == 1 or (fp8 and packed.n <= _SMALL)
    return plan if some or m >= _FEWEST else None


@lru_cache(1024)
def best_plan(n: int, m: int, k: int, columns: int, groups: int = 1) -> Plan:
    """The fastest by the figures above; a stage has `columns`."""
    stages, tiles, tokens = -(-k // columns), -(-n // _TILE), _tokens(m)

    def nanoseconds(parts: int) -> float:
        own, blocks = -(-stages // parts), tiles * -(-m // tokens) * parts
        read = own * (_STAGE_BYTES + 2 * columns * tokens)
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
