"""The `sm100` implementation of linear: NVFP4 weights on Blackwell's own 4-bit tensor cores. Compiled, never run.

It rounds activations to NVFP4 too, by the checkpoint's input scale, as the quantised model is meant to
run; that is not the plain contract of the op. No family picks it: it has to be named, on sm_100.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine import build
from dsv4_bench.engine.cuda.library import DTYPES, FLAGS, F, I, Library, N, P, dense, nvcc, wrong
from dsv4_bench.engine.cuda.weights import Packed, pack
from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.formats import Weight, swizzle_scales
from dsv4_bench.engine.registry import Context, implementation

NEVER_RUN = "compiled, never run"
_COLUMNS, _ROWS = 64, 128  # k is a multiple of one; scales are padded to the other


@lru_cache
def sm100_build() -> build.Build:
    """The build of ``csrc/cuda/linear_sm100.cu``."""
    flags = ("-gencode=arch=compute_100a,code=sm_100a", *FLAGS[1:])
    return build.Build("linear_sm100", ("cuda/linear_sm100.cu",), flags, "sm_100a", nvcc()[0])


class Sm100Library(Library):
    def path(self) -> Path:
        target = sm100_build()
        if target.compiler is None and target.find() is None:
            raise CannotAnswer(f"{target.name} is not built, and {nvcc()[1]}", "install nvcc 13")
        return target.library()


# x, m, w, input_scale, x_codes, x_scales, y, y_dtype
LINEAR = Sm100Library("linear_sm100", {"linear_nvfp4": (P, N, P, F, P, P, P, I)})


def _unavailable(context: Context) -> str | None:
    if not torch.cuda.is_available():
        return f"{NEVER_RUN}; no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (10, 0):
        return f"{NEVER_RUN}; needs sm_100a, this is sm_{major}{minor}"
    if context.device != "cuda" or context.dtype != torch.bfloat16:
        return f"{NEVER_RUN}; needs bfloat16 on cuda, this is {context.dtype} on {context.device}"
    return None


# By id(weight): the weight as the kernel takes it, its scales swizzled; gone with the weight.
_SWIZZLED: dict[int, tuple[Packed, weakref.ref[Weight]]] = {}


def swizzled(weight: Weight) -> Packed:
    """`weight` with its scales in the order of the tensor cores, made once."""
    entry = _SWIZZLED.get(id(weight))
    if entry is not None and entry[0].fits(weight):
        return entry[0]
    packed, key = pack.make(weight), id(weight)
    assert weight.scale is not None
    order = swizzle_scales(weight.scale)
    packed.keep = (packed.keep[0], order)
    packed.struct.scale = order.data_ptr()
    _SWIZZLED[key] = packed, weakref.ref(weight, lambda _: _SWIZZLED.pop(key, None))
    return packed


@implementation(
    op="linear", name="sm100", requires=_unavailable, code=lambda: sm100_build().identity()
)
def linear(x: Tensor, *, weight: Weight, out_dtype: torch.dtype | None) -> Tensor:
    n, k = weight.shape
    if weight.format != "nvfp4" or k % _COLUMNS or x.shape[-1] != k or x.dtype != torch.bfloat16:
        wrong("linear", f"x {list(x.shape)} {x.dtype}, weight {weight.format} [{n}, {k}]", "sm100")
    wanted = out_dtype or x.dtype
    kept = wanted if wanted in DTYPES else torch.float32
    x, packed, m = dense(x), swizzled(weight), x.numel() // k
    y = x.new_empty((*x.shape[:-1], n), dtype=kept)
    codes = torch.empty(m, k // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-m // _ROWS) * _ROWS * (k // 16), dtype=torch.uint8, device=x.device)
    LINEAR.call(
        "linear_nvfp4",
        x,
        x.data_ptr(),
        m,
        packed.address,
        weight.input_scale or 1.0,
        codes.data_ptr(),
        scales.data_ptr(),
        y.data_ptr(),
        DTYPES[kept],
    )
    return y if kept is wanted else y.to(wanted)
