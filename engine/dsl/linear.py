"""The `cutedsl` implementations of linear and grouped_linear: matrix products of many rows on wgmma.

Contracts are those of the references in ops/linear.py, for bfloat16 rows. Nothing here synchronises
with the GPU, and no weight is dequantised in memory. `sm90+cutedsl` is what the family `kernel` uses: the
kernels of sm90 for few rows, these for many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import dsv4_bench.engine.cuda.linear  # noqa: F401  (registers the ops, and their sm90 kernels)
from dsv4_bench.engine.cuda.library import F, I, N, P, dense, wrong
from dsv4_bench.engine.cuda.weights import Packed, pack
from dsv4_bench.engine.dsl.library import DslLibrary, cutedsl
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Context, Function, implementation

# Kernels by format code (enum dsv4_format): name, what k must be a multiple of, and what the sums are
# multiplied by beside the global scale (the decoded nvfp4 operand is 2^-7 of its value).
_KERNELS = {
    0: ("nvfp4", 64, 128.0),
    1: ("mxfp4", 64, 1.0),
    2: ("fp8", 16, 1.0),
    5: ("bf16", 8, 1.0),
}
_CODED = frozenset((0, 1, 2))
_OUTPUTS = {torch.bfloat16: "bf16", torch.float32: "f32"}
# w, scale, x, y, n, m, k, groups, splits, factor, multiprocessors
_ARGUMENTS = (P, P, P, P, I, I, I, I, I, F, I)
_TILES = (("bf16", 256), ("bf16", 128), ("f32", 128))  # output, activation rows of a tile
LINEAR = DslLibrary(
    "linear",
    {
        **{f"linear_{k}_{o}_{t}": _ARGUMENTS for k, _, _ in _KERNELS.values() for o, t in _TILES},
        **{f"sum_{out}": (P, P, N, I) for out in _OUTPUTS.values()},  # parts, y, size, splits
    },
)
_CLUSTER_ROWS, _STEP = 256, 64  # weight rows of a cluster's tile (of two blocks), columns of a step


# ------------------------------------------------------------------------------ tiles and splits

# Measured on an H200, nanoseconds: a step of a tile by its activation rows, for bfloat16 and coded
# weights; what a tile takes beside its steps; a second kernel; a byte of the parts, written and read.
_STEP_NS = {256: (720, 840), 128: (395, 580)}
_TILE_NS, _SUM_NS, _BYTE_NS = 1500, 2500, 1 / 1500


class Plan(NamedTuple):
    """Activation rows of a tile, and over how many blocks its columns are divided."""

    tokens: int
    splits: int


@lru_cache(1024)
def plan(n: int, m: int, k: int, coded: bool, narrow: bool, processors: int) -> Plan:
    """The fastest by the figures above. `narrow`: the output is float32, whose tiles are small."""
    steps, clusters = -(-k // _STEP), max(1, processors // 2)

    def nanoseconds(tokens: int, splits: int) -> float:
        share = -(-steps // splits)
        waves = -(-(-(-n // _CLUSTER_ROWS) * -(-m // tokens) * splits) // clusters)
        time = waves * (share * _STEP_NS[tokens][coded] + _TILE_NS)
        return time + (_SUM_NS + 8 * splits * m * n * _BYTE_NS if splits > 1 else 0)

    choices = [Plan(128, splits) for splits in (1, 2, 4, 8) if no_empty_share(steps, splits)]
    choices += [] if narrow else [Plan(256, 1)]
    return min(choices, key=lambda choice: nanoseconds(*choice))


def no_empty_share(steps: int, splits: int) -> bool:
    """Whether every part gets steps where each takes its share rounded up."""
    return (splits - 1) * -(-steps // splits) < steps


@lru_cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_not(x: Tensor, weight: Weight, groups: int = 1) -> str | None:
    """Why no kernel here multiplies `x` with `weight`, or None."""
    (n, k), packed = weight.shape, pack(weight)
    if x.dtype != torch.bfloat16 or x.device != packed.data.device:
        return f"x must be bfloat16 on {packed.data.device}, it is {x.dtype} on {x.device}"
    if packed.format not in _KERNELS:
        return f"weight {weight.name!r} is {weight.format} with {weight.data.dtype} and its scales"
    whole_groups = groups == 1 or (n % (groups * _CLUSTER_ROWS) == 0 and k % _STEP == 0)
    if n % 8 or k % _KERNELS[packed.format][1] or x.shape[-1] != groups * k or not whole_groups:
        return f"x is {list(x.shape)}, {weight.format} weight {weight.name!r} [{n}, {k}]"
    return None


@cutedsl("linear", LINEAR)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    return _matmul("linear", x, weight, 1, out_dtype or x.dtype)


@cutedsl("grouped_linear", LINEAR)
def grouped_linear(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    return _matmul("grouped_linear", o, weight, groups, o.dtype)


def _matmul(op: str, x: Tensor, weight: Weight, groups: int, out_dtype: torch.dtype) -> Tensor:
    """x [..., groups * k] -> [..., n] in `out_dtype`."""
    if reason := why_not(x, weight, groups):
        wrong(op, reason, "cutedsl")
    packed, x = pack(weight), dense(x)
    kept = out_dtype if out_dtype in _OUTPUTS else torch.float32
    m, n, processors = x.numel() // (groups * packed.k), packed.n, multiprocessors(x.device.index)
    y = x.new_empty((*x.shape[:-1], n), dtype=kept)
    if m:
        coded, narrow = packed.format in _CODED, kept is torch.float32
        tokens, splits = plan(n, m, packed.k, coded, narrow, processors)
        _launch(x, packed, y, m, groups, tokens, splits, processors)
    return y if kept is out_dtype else y.to(out_dtype)


def _launch(
    x: Tensor,
    packed: Packed,
    y: Tensor,
    m: int,
    groups: int,
    tokens: int,
    splits: int,
    processors: int,
) -> None:
    """y [m, n] = x [m, groups * k] W^T in tiles of `tokens` rows, from `splits` parts of the columns."""
    kind, _, factor = _KERNELS[packed.format]
    size = m * packed.n
    out = y if splits == 1 else torch.empty(splits * size, dtype=torch.float32, device=y.device)
    LINEAR.call(
        f"linear_{kind}_{_OUTPUTS[out.dtype]}_{tokens}",
        x,
        packed.struct.data,
        packed.struct.scale,
        x.data_ptr(),
        out.data_ptr(),
        packed.n,
        m,
        packed.k,
        groups,
        splits,
        factor * packed.global_scale,
        processors,
    )
    if out is not y:
        parts, there = out.data_ptr(), y.data_ptr()
        LINEAR.call(f"sum_{_OUTPUTS[y.dtype]}", x, parts, there, size, splits)


# ------------------------------------------------------------------------------ by the number of rows

_FEW = {op: IMPLEMENTATIONS[op]["sm90"] for op in ("linear", "grouped_linear")}
_MANY = {op: IMPLEMENTATIONS[op]["cutedsl"] for op in _FEW}
FEW_ROWS = 64  # up to which sm90 is the faster one


def _for_any_rows(op: str) -> Callable[[Function], Function]:
    """Register as `sm90+cutedsl` of `op`, there where both can run."""
    few, many = _FEW[op], _MANY[op]

    def code() -> str:
        assert few.code is not None and many.code is not None
        return f"{few.code()}+{many.code()}"

    def requires(context: Context) -> str | None:
        return few.unavailable(context) or many.unavailable(context)

    return implementation(op=op, name="sm90+cutedsl", requires=requires, code=code)


def _takes(x: Tensor, weight: Weight, groups: int = 1) -> bool:
    """Whether x has many rows, and cutedsl takes them."""
    return x.numel() > FEW_ROWS * x.shape[-1] and why_not(x, weight, groups) is None


@_for_any_rows("linear")
def linear_of_any_rows(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    chosen = _MANY if _takes(x, weight) else _FEW
    return chosen["linear"].function(x, weight=weight, out_dtype=out_dtype)


@_for_any_rows("grouped_linear")
def grouped_linear_of_any_rows(o: Tensor, *, weight: Weight, groups: int) -> Tensor:
    chosen = _MANY if _takes(o, weight, groups) else _FEW
    return chosen["grouped_linear"].function(o, weight=weight, groups=groups)
