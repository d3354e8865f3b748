"""The `cutedsl` implementation of op linear: matrix products of many rows on wgmma.

Contract: that of the reference in ops/linear.py, for bfloat16 rows. Nothing here synchronises with
the GPU, and no weight is dequantised in memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda_library import F, I, P, dense, wrong
from dsv4_bench.engine.cuda_weights import pack
from dsv4_bench.engine.dsl.library import DslLibrary, cutedsl
from dsv4_bench.engine.formats import Weight

# Kernels by format code (enum dsv4_format): name, what k must be a multiple of, and what the sums are
# multiplied by beside the global scale (the decoded nvfp4 operand is 2^-7 of its value).
_KERNELS = {
    0: ("nvfp4", 64, 128.0),
    1: ("mxfp4", 64, 1.0),
    2: ("fp8", 16, 1.0),
    5: ("bf16", 8, 1.0),
}
_OUTPUTS = {torch.bfloat16: "bf16", torch.float32: "f32"}
# w, scale, x, y, n, m, k, groups, factor, multiprocessors
_ARGUMENTS = (P, P, P, P, I, I, I, I, F, I)
LINEAR = DslLibrary(
    "linear",
    {f"linear_{k}_{out}": _ARGUMENTS for k, _, _ in _KERNELS.values() for out in _OUTPUTS.values()},
)
_CLUSTER_ROWS, _STEP = 256, 64  # weight rows of a cluster's tile, columns of a step


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
    kind, _, factor = _KERNELS[packed.format]
    m = x.numel() // (groups * packed.k)
    y = x.new_empty((*x.shape[:-1], packed.n), dtype=kept)
    if m:
        LINEAR.call(
            f"linear_{kind}_{_OUTPUTS[kept]}",
            x,
            packed.struct.data,
            packed.struct.scale,
            x.data_ptr(),
            y.data_ptr(),
            packed.n,
            m,
            packed.k,
            groups,
            factor * packed.global_scale,
            multiprocessors(x.device.index),
        )
    return y if kept is out_dtype else y.to(out_dtype)
