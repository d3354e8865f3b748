"""Copies of tensors that keep what a plain clone loses: strides, offsets, padding and aliasing.

A kernel that ignores a row stride, or reads past its rows, is right on a contiguous copy. So a
capture copies *storages*: every storage once, the bytes its tensors cover and the gaps between them
included, and makes each tensor again as a view of its copy, at the same address modulo 64: libraries
choose their paths, and with them the order of additions, by alignment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGN = 64  # bytes: a cache line, the widest vector


@dataclass(frozen=True)
class Extent:
    """The bytes [start, stop) of one storage that a group of tensors covers.

    A copy begins with `phase` unused bytes, so that it keeps its address modulo 64.
    """

    start: int
    stop: int
    phase: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of a copy."""
        return self.phase + self.stop - self.start

    def offset(self, tensor: Tensor) -> int:
        """Where `tensor` begins in a copy, in elements."""
        if tensor.numel() == 0:
            return 0
        size = tensor.element_size()
        return int(tensor.storage_offset()) + (self.phase - self.start) // size

    def joined(self, other: Extent) -> Extent:
        """What covers both, of the same storage."""
        return Extent(min(self.start, other.start), max(self.stop, other.stop), self.phase)


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def extent_of(tensor: Tensor) -> Extent:
    """Bytes from the first element to the end of the last row, its padding included.

    The start is rounded down to a multiple of 64; an empty tensor covers nothing.
    """
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    if tensor.numel() == 0:
        return Extent(0, 0)
    dims = list(zip(tensor.shape, tensor.stride(), strict=True))
    last = sum((length - 1) * stride for length, stride in dims) + 1
    padded = max([last, *(length * stride for length, stride in dims)])
    stop = min(first + padded * size, tensor.untyped_storage().nbytes())
    phase = tensor.untyped_storage().data_ptr() % _ALIGN
    return Extent(first // _ALIGN * _ALIGN, max(stop, first + last * size), phase)


def extents(tensors: Iterable[Tensor]) -> dict[int, Extent]:
    """What each storage needs to hold for all of `tensors`, by `storage_key`."""
    found: dict[int, Extent] = {}
    for tensor in tensors:
        key, new = storage_key(tensor), extent_of(tensor)
        old = found.get(key)
        if old is None or old.stop == 0:  # an empty tensor covers nothing of a storage
            found[key] = new
        elif new.stop:
            found[key] = old.joined(new)
    return found


def storage_bytes(tensor: Tensor, extent: Extent) -> Tensor:
    """The bytes of `extent` of the tensor's storage: uint8 [stop - start], a view."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage(), extent.start, (extent.stop - extent.start,), (1,))


def _copy(tensor: Tensor, extent: Extent) -> Tensor:
    """The bytes of `extent` behind its phase, in new memory: uint8 [nbytes]."""
    copy = torch.empty(extent.nbytes, dtype=torch.uint8, device=tensor.device)
    copy[: extent.phase] = 0
    copy[extent.phase :] = storage_bytes(tensor, extent)
    return copy


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
            copies[key] = _copy(tensor, extent)
        offset = extent.offset(tensor)
        result[name] = view_of(copies[key], tensor.dtype, offset, tensor.shape, tensor.stride())
    return result
