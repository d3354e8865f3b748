"""The `cutedsl` implementation of op linear: matrix products of many rows on wgmma.

Contract: that of the reference in ops/linear.py. Nothing here synchronises with the GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.cuda_library import DTYPES, F, I, P, dense, wrong
from dsv4_bench.engine.cuda_weights import pack
from dsv4_bench.engine.dsl.library import DslLibrary, cutedsl
from dsv4_bench.engine.formats import Weight

_ARGUMENTS = (P, P, P, I, I, I, F, I)  # w, x, y, n, m, k, factor, multiprocessors
LINEAR = DslLibrary("linear", {"linear_bf16_bf16": _ARGUMENTS, "linear_bf16_f32": _ARGUMENTS})


@lru_cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def takes(x: Tensor, weight: Weight) -> str | None:
    """Why the kernel cannot multiply `x` with `weight`, or None."""
    n, k = weight.shape
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return f"needs bfloat16 on the GPU, x is {x.dtype} on {x.device}"
    if weight.format != "dense" or weight.data.dtype != torch.bfloat16:
        return f"needs a bfloat16 weight, {weight.name!r} is {weight.format}"
    if n % 8 or k % 8 or x.shape[-1] != k:
        return f"needs n and k in eights, x is {list(x.shape)}, weight {weight.name!r} [{n}, {k}]"
    return None


@cutedsl("linear", LINEAR)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    if reason := takes(x, weight):
        wrong("linear", reason, "cutedsl")
    wanted = out_dtype or x.dtype
    kept = wanted if wanted in DTYPES else torch.float32
    (n, k), x, packed = weight.shape, dense(x), pack(weight)
    m = x.numel() // k
    y = x.new_empty((*x.shape[:-1], n), dtype=kept)
    if m:
        name = "linear_bf16_bf16" if kept == torch.bfloat16 else "linear_bf16_f32"
        pointers = (packed.struct.data, x.data_ptr(), y.data_ptr())
        processors = multiprocessors(x.device.index)
        LINEAR.call(name, x, *pointers, n, m, k, packed.global_scale, processors)
    return y if kept is wanted else y.to(wanted)
