"""Safetensors files of a checkpoint: headers read and checked at once, tensors mapped when asked for.

`Shards.read` maps a tensor, for weights. `Shards.read_bytes` and `read_scalars` copy, for passes over
many tensors whose pages shall not stay resident. Mapping is done here and not by the safetensors
library, whose tensors fault in a page (with read-ahead: megabytes) each before anybody looks at them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dsv4_bench.engine.errors import BadCheckpoint

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # what the safetensors library accepts
_MAX_DIMS = 8
_COPY_BYTES = 1 << 16  # smaller tensors are copied: a page of them holds their neighbours
_TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,  # two a byte
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_BITS = {name: 4 if name == "F4" else 8 * dtype.itemsize for name, dtype in _TORCH.items()}


class TensorInfo(NamedTuple):
    """Where a tensor is stored; nothing of it has been read."""

    key: str
    file: str
    dtype: str  # as safetensors spells it: BF16, F8_E4M3, F8_E8M0, U8, I8, F32, I64
    shape: tuple[int, ...]
    nbytes: int
    start: int  # offset of its first byte in the file


def read_header(path: Path) -> list[TensorInfo]:
    """All tensors of one file. Raises BadCheckpoint with the sizes when the file is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise BadCheckpoint(
                    f"{path.name}: header says {length} bytes, the file has {size}",
                    "truncated download, or not a safetensors file",
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits
        raise BadCheckpoint(
            f"{path.name}: header is not JSON: {error}", "not a safetensors file, or a damaged one"
        ) from None
    if not isinstance(header, dict):
        raise BadCheckpoint(
            f"{path.name}: header is a JSON {type(header).__name__}, not an object",
            "not a safetensors file, or a damaged one",
        )
    header.pop("__metadata__", None)
    infos = [_info(path.name, 8 + length, key, entry) for key, entry in header.items()]
    _check_offsets(path.name, infos, 8 + length, size)
    return infos


def _info(file: str, data: int, key: str, entry: Any) -> TensorInfo:
    """One header entry; `data` is where the file's data begins."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = _BITS[dtype]
        if type(shape) is not list or len(shape) > _MAX_DIMS:
            raise ValueError
        for number in (*shape, start, stop):
            if type(number) is not int or number < 0:
                raise ValueError
        if (stop - start) * 8 != math.prod(shape) * bits:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise BadCheckpoint(
            f"{file}: bad header entry for {key[:200]!r}: {str(entry)[:200]}",
            "dtype, shape and data_offsets have to agree; the file is damaged",
        ) from None
    return TensorInfo(key, file, dtype, tuple(shape), stop - start, data + start)


def _check_offsets(file: str, infos: list[TensorInfo], data: int, size: int) -> None:
    """The tensors have to cover the data of the file exactly: no overlap, no gap, nothing after."""
    end, before = data, "the header"
    for info in sorted(infos, key=lambda i: (i.start, i.nbytes)):
        if info.start != end:
            what = "overlaps" if info.start < end else "leaves a gap after"
            raise BadCheckpoint(
                f"{file}: {info.key!r} at byte {info.start} {what} {before}, which ends at {end}",
                "the header is damaged",
            )
        end, before = info.start + info.nbytes, repr(info.key)
    if end != size:
        raise BadCheckpoint(
            f"{file}: the header describes {end} bytes, the file has {size}",
            "the shard is truncated or has trailing data; download it again",
        )


class Shards:
    """All tensors of a folder, by stored key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._maps: dict[str, mmap.mmap] = {}
        self._map: dict[str, str] = {}
        self.files = self._find_files()
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in read_header(folder / file):
                self._add(info)
        self._check_index()

    def _add(self, info: TensorInfo) -> None:
        other = self.tensors.get(info.key)
        if other is None or self._map.get(info.key) == info.file:
            self.tensors[info.key] = info
        elif self._map.get(info.key) != other.file:
            raise BadCheckpoint(
                f"{info.key} is in {other.file} and in {info.file}",
                f"remove the files that are not part of it, or add the {INDEX} that says which one",
            )

    def _find_files(self) -> list[str]:
        present = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not (self.folder / INDEX).exists():
            return self._files_without_index(present)
        self._map = _read_index(self.folder / INDEX)
        wanted = sorted(set(self._map.values()))
        escaping = [name for name in wanted if os.path.basename(name) != name or name in ("", "..")]
        if escaping:
            raise BadCheckpoint(
                f"{INDEX} names files outside the folder: {_some(escaping)}",
                "shards have to lie beside the index",
            )
        missing = [name for name in wanted if name not in present]
        if missing:
            raise BadCheckpoint(
                f"{len(missing)} of {len(wanted)} shards are missing: {_some(missing)}",
                f"{INDEX} lists them; finish the download",
            )
        return wanted

    def _files_without_index(self, present: list[str]) -> list[str]:
        if not present:
            raise BadCheckpoint(
                f"no *.safetensors in {self.folder}",
                "CKPT is a folder with config.json and weights",
            )
        numbered = [m for m in (re.search(r"-of-(\d+)\.safetensors$", n) for n in present) if m]
        total = max((int(m[1]) for m in numbered), default=0)
        if total > len(numbered):
            raise BadCheckpoint(
                f"{INDEX} is missing, and {total - len(numbered)} of {total} shards",
                "finish the download",
            )
        if len(present) > 1:
            self.notes.append(f"{INDEX} is missing; the headers of {len(present)} shards were used")
        return present

    def _check_index(self) -> None:
        lost = [key for key in self._map if key not in self.tensors]
        if lost:
            raise BadCheckpoint(
                f"{len(lost)} tensors of {INDEX} are not in their shards: {_some(lost)}",
                "index and shards are from different downloads",
            )
        moved = [k for k, file in self._map.items() if self.tensors[k].file != file]
        if moved:
            self.notes.append(
                f"{len(moved)} tensors are in another shard than {INDEX} says: {_some(moved)}"
            )

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def read(self, key: str) -> Tensor:
        """The tensor as stored (F4: bytes of two values), memory-mapped unless it is small.

        Nothing is read before somebody looks at it. Writing to it changes this process's copy only.
        """
        info = self.tensors[key]
        dtype = _TORCH[info.dtype]
        shape = info.shape
        if info.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        if info.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        if info.nbytes < _COPY_BYTES:
            with _opened(self.folder / info.file) as handle:
                copy = bytearray(_read_at(handle, info.start, info.nbytes))
            return torch.frombuffer(copy, dtype=torch.uint8).view(dtype).reshape(shape)
        raw = torch.frombuffer(
            self._mapped(info), dtype=torch.uint8, count=info.nbytes, offset=info.start
        )
        if info.start % dtype.itemsize:  # legal in the format, but kernels expect aligned pointers
            raw = raw.clone()
        return raw.view(dtype).reshape(shape)

    def _mapped(self, info: TensorInfo) -> mmap.mmap:
        """The whole file of `info`, mapped once."""
        if info.file not in self._maps:
            with _opened(self.folder / info.file) as handle:
                try:
                    mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:
                    raise BadCheckpoint(f"{info.file}: cannot map it: {error}") from None
            self._maps[info.file] = mapped
        if len(self._maps[info.file]) < info.start + info.nbytes:
            raise BadCheckpoint(
                f"{info.file}: {info.key} ends at byte {info.start + info.nbytes}, the file now has "
                f"{len(self._maps[info.file])}",
                "the file was cut while in use",
            )
        return self._maps[info.file]

    def read_bytes(self, infos: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, bytes]]:
        """The stored bytes of each tensor, in file order; nothing stays mapped."""
        for file, group in _by_file(infos).items():
            with _opened(self.folder / file) as handle:
                for info in group:
                    yield info, _read_at(handle, info.start, info.nbytes)

    def read_scalars(self, infos: Iterable[TensorInfo]) -> dict[str, float]:
        """The value of each one-element F32 tensor. Neighbours in a file are read in one go."""
        values: dict[str, float] = {}
        for file, group in _by_file(infos).items():
            with _opened(self.folder / file) as handle:
                for run in _runs(group):
                    first = run[0].start
                    data = _read_at(handle, first, run[-1].start + 4 - first)
                    for info in run:
                        (values[info.key],) = struct.unpack_from("<f", data, info.start - first)
        return values


_RUN_GAP, _RUN_BYTES = 1 << 16, 1 << 22  # read across gaps up to this; at most this in one go


def _runs(infos: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Split sorted tensors into runs that one read can cover."""
    run: list[TensorInfo] = []
    for info in infos:
        near = run and info.start - run[-1].start < _RUN_GAP
        if run and not (near and info.start - run[0].start < _RUN_BYTES):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


def _by_file(infos: Iterable[TensorInfo]) -> dict[str, list[TensorInfo]]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in sorted(infos, key=lambda i: (i.file, i.start)):
        groups[info.file].append(info)
    return groups


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise BadCheckpoint(f"{path}: {error.strerror or error}") from None


def _read_at(file: BinaryIO, start: int, count: int) -> bytes:
    try:
        data = os.pread(file.fileno(), count, start)
    except OSError as error:
        raise BadCheckpoint(f"{file.name}: {error.strerror or error}") from None
    if len(data) != count:
        raise BadCheckpoint(
            f"{file.name}: only {len(data)} of {count} bytes at {start} are there",
            "the file was cut while in use",
        )
    return data


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: stored key -> file name."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("file names have to be strings")
        return dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(
            f"{path.name}: no readable weight_map: {error!r}", "download the index again"
        ) from None


def _some(names: list[str], count: int = 4) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
