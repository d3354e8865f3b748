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
_ARGUMENTS = (P, P, P, P, I, I, I, F, I)  # w, scale, x, y, n, m, k, factor, multiprocessors
LINEAR = DslLibrary(
    "linear",
    {f"linear_{k}_{out}": _ARGUMENTS for k, _, _ in _KERNELS.values() for out in _OUTPUTS.values()},
)


@lru_cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_not(x: Tensor, weight: Weight) -> str | None:
    """Why no kernel here multiplies `x` with `weight`, or None."""
    (n, k), packed = weight.shape, pack(weight)
    if x.dtype != torch.bfloat16 or x.device != packed.data.device:
        return f"x must be bfloat16 on {packed.data.device}, it is {x.dtype} on {x.device}"
    if packed.format not in _KERNELS:
        return f"weight {weight.name!r} is {weight.format} with {weight.data.dtype} and its scales"
    if n % 8 or k % _KERNELS[packed.format][1] or x.shape[-1] != k:
        return f"x is {list(x.shape)}, {weight.format} weight {weight.name!r} [{n}, {k}]"
    return None


@cutedsl("linear", LINEAR)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    if reason := why_not(x, weight):
        wrong("linear", reason, "cutedsl")
    packed, x, wanted = pack(weight), dense(x), out_dtype or x.dtype
    kept = wanted if wanted in _OUTPUTS else torch.float32
    kind, _, factor = _KERNELS[packed.format]
    m = x.numel() // packed.k
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
            factor * packed.global_scale,
            multiprocessors(x.device.index),
        )
    return y if kept is wanted else y.to(wanted)
