"""Weights as the CUDA kernels take them: struct dsv4_weight over device pointers, made once a weight."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from dsv4_bench.engine.cuda.library import dense, wrong
from dsv4_bench.engine.formats import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, Weight

_DENSE = {torch.float32: 4, torch.bfloat16: 5, torch.float16: 6}  # enum dsv4_format


class WeightStruct(ctypes.Structure):
    """struct dsv4_weight."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("global_scale", ctypes.c_float),
        ("format", ctypes.c_int32),
    )


class Packed:
    """A weight in GPU memory: `address` of the C struct (in host memory), `n`, `k`, `format`.

    Valid as long as the weight has the same tensors and global scale; what is in them may change,
    but where a copy had to be made (strided or unaligned tensors) only by `pack`ing a new weight.
    """

    __slots__ = ("address", "data", "format", "global_scale", "k", "keep", "n", "scale", "struct")

    def __init__(self, weight: Weight) -> None:
        self.data, self.scale, self.global_scale = weight.data, weight.scale, weight.global_scale
        self.n, self.k = weight.shape
        self.format, data, scale = _checked(weight)
        self.keep = (data, scale)
        where = None if scale is None else scale.data_ptr()
        g = weight.global_scale
        self.struct = WeightStruct(data.data_ptr(), where, self.n, self.k, g, self.format)
        self.address = ctypes.addressof(self.struct)

    def fits(self, weight: Weight) -> bool:
        """Whether this is still what `weight` holds."""
        return (
            self.data is weight.data
            and self.scale is weight.scale
            and self.global_scale == weight.global_scale
        )


# By id(weight); an entry goes when its weight does.
_PACKED: dict[int, tuple[Packed, weakref.ref[Weight]]] = {}


def pack(weight: Weight) -> Packed:
    """The packed form of `weight`, made once. DSV4Error if shapes or dtypes do not fit its format."""
    key = id(weight)
    entry = _PACKED.get(key)
    if entry is not None and entry[0].fits(weight):
        return entry[0]
    packed = Packed(weight)
    _PACKED[key] = packed, weakref.ref(weight, lambda _: _PACKED.pop(key, None))
    return packed


def _checked(weight: Weight) -> tuple[int, Tensor, Tensor | None]:
    """Format code and dense tensors of a weight whose shapes and dtypes are as documented."""
    (n, k), data, scale = weight.shape, weight.data, weight.scale
    name = f"weight {weight.name!r}"
    if not data.is_cuda or (scale is not None and scale.device != data.device):
        wrong(name, f"expected tensors of one GPU, it is on {data.device}")
    if weight.format == "dense":
        if data.dtype not in _DENSE:
            wrong(name, f"a dense weight is float32, bfloat16 or float16, not {data.dtype}")
        return _DENSE[data.dtype], dense(data), None
    if scale is None:
        wrong(name, f"{weight.format} without scale")
    one_byte = scale.dtype in (torch.float8_e8m0fnu, torch.uint8)
    block, shape = 1, (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    if weight.format == "fp8_block":
        wide = scale.dtype == torch.float32
        kind, fits = (3 if wide else 2), wide or one_byte
    elif weight.format == "nvfp4":
        kind, fits, block = 0, scale.dtype == torch.float8_e4m3fn, NVFP4_BLOCK
    elif weight.format == "mxfp4":
        kind, fits, block = 1, one_byte, MXFP4_BLOCK
    else:
        wrong(name, f"unknown format {weight.format!r}")
    if block > 1:
        shape = (n, k // block)
    if data.itemsize != 1 or not fits or tuple(scale.shape) != shape or k % block:
        wrong(
            name,
            f"{weight.format} [{n}, {k}] with data {data.dtype} and scale {scale.dtype} "
            f"{list(scale.shape)}, expected a scale of {list(shape)}",
        )
    return kind, dense(data), dense(scale)
