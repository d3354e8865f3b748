"""Copies of tensors that keep what a plain clone loses: strides, offsets, padding and aliasing.

A kernel that ignores a row stride, or reads past its rows, is right on a contiguous copy. So a
capture copies *storages*: every storage once, the bytes its tensors cover and the gaps between them
included, and makes each tensor again as a view of its copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGN = 64  # bytes; copies keep their address modulo this, kernels take paths by alignment


@dataclass(frozen=True)
class Extent:
    """The bytes [start, stop) of one storage that a group of tensors covers."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def extent_of(tensor: Tensor) -> Extent:
    """Bytes from the first element to the end of the last row, its padding included.

    The start is rounded down to a multiple of 64; an empty tensor covers nothing.
    """
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if tensor.numel() == 0:
        return Extent(first // _ALIGN * _ALIGN, first // _ALIGN * _ALIGN)
    dims = list(zip(tensor.shape, tensor.stride(), strict=True))
    last = sum((length - 1) * stride for length, stride in dims) + 1
    padded = max([last, *(length * stride for length, stride in dims)])
    stop = min(first + padded * size, tensor.untyped_storage().nbytes())
    return Extent(first // _ALIGN * _ALIGN, max(stop, first + last * size))


def extents(tensors: Iterable[Tensor]) -> dict[int, Extent]:
    """What each storage needs to hold for all of `tensors`, by `storage_key`."""
    found: dict[int, Extent] = {}
    for tensor in tensors:
        key, new = storage_key(tensor), extent_of(tensor)
        old = found.get(key, new)
        found[key] = Extent(min(old.start, new.start), max(old.stop, new.stop))
    return found


def storage_bytes(tensor: Tensor, extent: Extent) -> Tensor:
    """The bytes of `extent` of the tensor's storage: uint8 [nbytes], a view."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage(), extent.start, (extent.nbytes,), (1,))


def view_of(
    raw: Tensor, dtype: torch.dtype, offset: int, shape: Iterable[int], stride: Iterable[int]
) -> Tensor:
    """A tensor over the memory of `raw` (uint8, from its storage's start), `offset` in elements."""
    empty = torch.empty(0, dtype=dtype, device=raw.device)
    return empty.set_(raw.untyped_storage(), offset, tuple(shape), tuple(stride))


def clone_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies with the same values, strides, padding and mutual aliasing.

    Two that share memory share it in the copy too. Offsets count from the copied extent.
    """
    needed = extents(tensors.values())
    copies: dict[int, Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        key = storage_key(tensor)
        extent = needed[key]
        if key not in copies:
            copies[key] = storage_bytes(tensor, extent).clone()
        offset = tensor.storage_offset() - extent.start // tensor.element_size()
        offset = 0 if tensor.numel() == 0 else offset
        result[name] = view_of(copies[key], tensor.dtype, offset, tensor.shape, tensor.stride())
    return result
