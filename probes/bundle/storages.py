"""Tensor files of a bundle: safetensors whose entries are storages, written and read as a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dsv4_bench.probes.bundle.format import (
    BadBundle,
    count,
    counts,
    mapping,
    member,
    read_json,
    short,
)
from dsv4_bench.probes.layout import Extent, extents, storage_bytes, storage_key

_MAX_HEADER = 4 << 20
_ALIGN = 64
_CHUNK = 1 << 20  # bytes read at a time: a zip member is copied once more on its way


@dataclass
class StorageTable:
    """The storages of one tensor file while it is put together: `place` tensors, then `save`."""

    file: str
    names: dict[int, str] = field(default_factory=dict)  # storage key -> name in the file
    owners: dict[int, Tensor] = field(default_factory=dict)  # a tensor of each storage
    placed: list[Tensor] = field(default_factory=list)
    extents: dict[int, Extent] = field(default_factory=dict)

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        """Make room for `tensors`, by the names their storages shall have if they are the first."""
        for name, tensor in tensors.items():
            self.names.setdefault(storage_key(tensor), name)
            self.owners.setdefault(storage_key(tensor), tensor)
            self.placed.append(tensor)
        self.extents = extents(self.placed)

    @property
    def file_bytes(self) -> int:
        """The size the file will have."""
        return 8 + len(self._header()) + sum(extent.nbytes for extent in self.extents.values())

    def _header(self) -> bytes:
        header, position = {}, 0
        for key, name in self.names.items():
            size = self.extents[key].nbytes
            end = position + size
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header).encode()
        return encoded + b" " * (-len(encoded) % 8)

    def offset(self, tensor: Tensor) -> int:
        """Where `tensor` begins in its storage as stored, in elements."""
        return self.extents[storage_key(tensor)].offset(tensor)

    def save(self, path: Path) -> None:
        """Write the file; one storage at a time goes through memory."""
        encoded = self._header()
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for key in self.names:
                extent = self.extents[key]
                file.write(bytes(extent.phase))
                raw = storage_bytes(self.owners[key], extent)
                file.write(raw.cpu().numpy().data)


def read_storages(stream: BinaryIO, size: int, where: str) -> dict[str, Tensor]:
    """All storages of a tensor file of `size` bytes: uint8 tensors in new memory, aligned to 64.

    Raises BadBundle before anything is allocated if header and size do not agree.
    """
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
        raise BadBundle(f"{where}: its header says {length} bytes, the file has {size}")
    raw = stream.read(length)
    if len(raw) < length:
        raise BadBundle(f"{where} ends in its header")
    header = mapping(read_json(raw, f"{where}: header"), f"{where}: header")
    header.pop("__metadata__", None)
    spans = {name: _span(entry, f"{where}: {short(name)}") for name, entry in header.items()}
    position = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != position:
            raise BadBundle(f"{where}: {short(name)} begins at {start}, not at {position}")
        position = stop
    if 8 + length + position != size:
        raise BadBundle(f"{where}: {8 + length + position} bytes are described, it has {size}")
    storages = {}
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        storages[name] = _read_into_new(stream, stop - start, where)
    return storages


def _span(entry: object, where: str) -> tuple[int, int]:
    fields = mapping(entry, where)
    start, stop = counts(member(fields, "data_offsets", where), where, 2)
    shape = counts(member(fields, "shape", where), where, 1)
    if member(fields, "dtype", where) != "U8" or count(stop - start, where) != shape[0]:
        raise BadBundle(f"{where}: a storage is U8 [bytes], not {short(fields)}")
    return start, stop


def _read_into_new(stream: BinaryIO, nbytes: int, where: str) -> Tensor:
    memory = np.empty(nbytes + _ALIGN, dtype=np.uint8)
    first = -memory.ctypes.data % _ALIGN
    part = memory[first : first + nbytes]
    view, done = part.data, 0
    while done < nbytes:
        got = stream.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
        if not got:
            raise BadBundle(f"{where} ends after {done} of {nbytes} bytes of a storage")
        done += got
    return torch.from_numpy(part)
