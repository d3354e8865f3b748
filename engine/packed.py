"""Weights as the kernels take them: struct dsv4_weight (csrc/common/abi.h) over a weight's tensors, made once a weight."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from dsv4_bench.engine.formats import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, Weight

Wrong = Callable[[str, str], NoReturn]  # of what, what is wrong with it

_NVFP4, _MXFP4, _FP8_E8M0, _FP8_F32 = range(4)  # enum dsv4_format
_DENSE = {torch.float32: 4, torch.bfloat16: 5, torch.float16: 6}
_E8M0 = (torch.float8_e8m0fnu, torch.uint8)


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
    """A weight in memory: `address` of the C struct (always in host memory), `n`, `k`, `format`.

    Valid as long as the weight has the same tensors and global scale; what is in them may change,
    but where a copy had to be made (strided or unaligned tensors) only by `Packs` taking a new weight.
    """

    __slots__ = ("address", "data", "format", "global_scale", "k", "keep", "n", "scale", "struct")

    def __init__(self, weight: Weight, dense: Callable[[Tensor], Tensor], wrong: Wrong) -> None:
        self.data, self.scale, self.global_scale = weight.data, weight.scale, weight.global_scale
        self.n, self.k = weight.shape
        self.format = format_code(weight, wrong)
        data = dense(weight.data)
        scale = None if weight.format == "dense" or weight.scale is None else dense(weight.scale)
        self.keep = (data, scale)  # copies live as long as this object
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


class Packs:
    """The packed forms of the weights in one kind of memory, each made when it is first asked for.

    `where` says in a word what memory that is, `there` whether a tensor is in it, `dense` makes a
    tensor contiguous as its kernels need it, `wrong` raises.
    """

    def __init__(
        self,
        where: str,
        there: Callable[[Tensor], bool],
        dense: Callable[[Tensor], Tensor],
        wrong: Wrong,
    ) -> None:
        self._where, self._there, self._dense, self._wrong = where, there, dense, wrong
        # By id(weight); an entry goes when its weight does.
        self._packed: dict[int, tuple[Packed, weakref.ref[Weight]]] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._packed

    def __call__(self, weight: Weight) -> Packed:
        """The packed form of `weight`. DSV4Error if shapes, dtypes or memory are not as documented."""
        key = id(weight)
        entry = self._packed.get(key)
        if entry is not None and entry[0].fits(weight):
            return entry[0]
        packed = self.make(weight)
        self._packed[key] = packed, weakref.ref(weight, lambda _: self._packed.pop(key, None))
        return packed

    def make(self, weight: Weight) -> Packed:
        """The same, made anew and not kept."""
        data, scale = weight.data, weight.scale
        if not self._there(data) or (scale is not None and scale.device != data.device):
            name = f"weight {weight.name!r}"
            self._wrong(name, f"expected tensors {self._where}, it is on {data.device}")
        return Packed(weight, self._dense, self._wrong)


def format_code(weight: Weight, wrong: Wrong) -> int:
    """enum dsv4_format of a weight; `wrong` where its shapes and dtypes are not as abi.h says."""
    (n, k), data, scale = weight.shape, weight.data, weight.scale
    name = f"weight {weight.name!r}"
    if weight.format == "dense":
        if data.dtype not in _DENSE:
            wrong(name, f"a dense weight is float32, bfloat16 or float16, not {data.dtype}")
        return _DENSE[data.dtype]
    if scale is None:
        wrong(name, f"{weight.format} without scale")
    block, shape = 1, (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    if weight.format == "fp8_block":
        wide = scale.dtype == torch.float32
        kind, fits = (_FP8_F32 if wide else _FP8_E8M0), wide or scale.dtype in _E8M0
    elif weight.format == "nvfp4":
        kind, fits, block = _NVFP4, scale.dtype == torch.float8_e4m3fn, NVFP4_BLOCK
    elif weight.format == "mxfp4":
        kind, fits, block = _MXFP4, scale.dtype in _E8M0, MXFP4_BLOCK
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
    return kind
