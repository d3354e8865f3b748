"""Safetensors files of a checkpoint: headers read and checked at once, tensors mapped when asked for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv4_bench.engine.errors import BadCheckpoint

INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # what the safetensors library accepts
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64"), 64),
    "F4": 4,
}


class TensorInfo(NamedTuple):
    """Where a tensor is stored; nothing of it has been read."""

    key: str
    file: str
    dtype: str  # as safetensors spells it: BF16, F8_E4M3, F8_E8M0, U8, I8, F32, I64
    shape: tuple[int, ...]
    nbytes: int


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
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadCheckpoint(
            f"{path.name}: header is not JSON: {error}", "not a safetensors file"
        ) from None
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{path.name}: header is not a JSON object")
    infos = [_info(path.name, k, v) for k, v in header.items() if k != "__metadata__"]
    end = 8 + length + max((stop for _, stop in infos), default=0)
    if end != size:
        raise BadCheckpoint(
            f"{path.name}: the header describes {end} bytes, the file has {size}",
            "the shard is truncated or has trailing data; download it again",
        )
    return [info for info, _ in infos]


def _info(file: str, key: str, entry: Any) -> tuple[TensorInfo, int]:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        integers = all(isinstance(x, int) and x >= 0 for x in (*shape, start, stop))
        if not integers or dtype not in _BITS or (stop - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise BadCheckpoint(f"{file}: bad header entry for {key!r}: {str(entry)[:200]}") from None
    return TensorInfo(key, file, dtype, shape, stop - start), stop


class Shards:
    """All tensors of a folder, by stored key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self._open: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            for info in read_header(folder / file):
                self.tensors[info.key] = info
        self._check_index()

    def _files(self) -> list[str]:
        index = self.folder / INDEX
        present = sorted(p.name for p in self.folder.glob("*.safetensors"))
        self._map: dict[str, str] = {}
        if not index.exists():
            return self._files_without_index(present)
        try:
            data = json.loads(index.read_text())
            self._map = dict(data["weight_map"])
        except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(f"{INDEX}: no readable weight_map: {error!r}") from None
        wanted = sorted(set(map(str, self._map.values())))
        escaping = [name for name in wanted if os.path.basename(name) != name]
        if escaping:
            raise BadCheckpoint(f"{INDEX} names files outside the folder: {escaping[:3]}")
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
                f"no *.safetensors in {self.folder}", "CKPT is a folder with config.json and weights"
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

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def read(self, key: str) -> Tensor:
        """The tensor as stored, memory-mapped."""
        info = self.tensors[key]
        try:
            if info.file not in self._open:
                handle = safe_open(self.folder / info.file, framework="pt", device="cpu")
                self._open[info.file] = handle
            return self._open[info.file].get_tensor(key)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise BadCheckpoint(f"{info.file}: cannot read {key}: {error}") from None


def _some(names: list[str], count: int = 4) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
