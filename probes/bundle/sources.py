"""Where a bundle's files come from, folder or zip: names and sizes checked, contents verified."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from dsv4_bench.probes.bundle.format import MANIFEST, BadBundle, OpenLimits, check_name, short

T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest promises about a file."""

    bytes: int
    sha256: str


class Source:
    """The files of a bundle. Nothing is ever extracted; what is read stays in memory."""

    def __init__(self, path: Path, limits: OpenLimits) -> None:
        self.path = path
        self.limits = limits
        self.sizes = self._list()
        if len(self.sizes) > limits.files:
            raise BadBundle(f"{path} holds {len(self.sizes)} files, at most {limits.files}")
        total = sum(self.sizes.values())
        if total > limits.total:
            raise BadBundle(f"{path} unpacks to {total} bytes, at most {limits.total}")
        if MANIFEST not in self.sizes:
            raise BadBundle(
                f"{path} has no {MANIFEST}", "a bundle is what `dsv4-bench dump` writes"
            )

    def _list(self) -> dict[str, int]:
        raise NotImplementedError

    def _open(self, name: str) -> BinaryIO:
        raise NotImplementedError

    def small(self, name: str) -> bytes:
        """The bytes of a JSON file, bounded by `limits.json`."""
        size = self.sizes.get(name)
        if size is None:
            raise BadBundle(f"{self.path} has no {name}")
        if size > self.limits.json:
            raise BadBundle(f"{name} has {size} bytes, at most {self.limits.json}")
        return self._guarded(name, lambda stream: _exactly(stream, size, name))

    def consume(self, name: str, entry: FileEntry, reader: Callable[[BinaryIO, int], T]) -> T:
        """Give the file to `reader` as a stream, and check size and hash of what it read."""

        def read(stream: BinaryIO) -> T:
            hashed = _Hashing(stream, entry.bytes)
            result = reader(hashed, entry.bytes)  # type: ignore[arg-type]
            if hashed.left or stream.read(1):
                raise BadBundle(f"{name} has not the {entry.bytes} bytes of the manifest")
            if hashed.digest != entry.sha256:
                raise BadBundle(
                    f"{name}: sha256 is {hashed.digest[:12]}..., the manifest says "
                    f"{entry.sha256[:12]}...",
                    "the bundle was changed or damaged on its way",
                )
            return result

        return self._guarded(name, read)

    def _guarded(self, name: str, reader: Callable[[BinaryIO], T]) -> T:
        try:
            with self._open(name) as stream:
                return reader(stream)
        except BadBundle:
            raise
        except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
            raise BadBundle(f"{name} cannot be read: {short(str(error))}") from None
        except (NotImplementedError, zipfile.LargeZipFile, MemoryError, OverflowError) as error:
            raise BadBundle(f"{name} cannot be read: {short(str(error))}") from None
        except Exception as error:  # zlib.error, lzma.LZMAError: no common base
            if type(error).__module__ in ("zlib", "_lzma", "bz2"):
                raise BadBundle(f"{name} cannot be unpacked: {short(str(error))}") from None
            raise


class FolderSource(Source):
    """A folder: regular files only, no links, up to two levels deep."""

    def _list(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for folder, folders, files in os.walk(self.path):
            for name in [*folders, *files]:
                full = os.path.join(folder, name)
                relative = os.path.relpath(full, self.path).replace(os.sep, "/")
                mode = os.lstat(full)
                if stat.S_ISDIR(mode.st_mode):
                    continue
                if not stat.S_ISREG(mode.st_mode):
                    raise BadBundle(f"{short(relative)} is a link or a device, not a file")
                sizes[check_name(relative)] = mode.st_size
                if len(sizes) > self.limits.files:
                    raise BadBundle(f"{self.path} holds more than {self.limits.files} files")
        return sizes

    def _open(self, name: str) -> BinaryIO:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)
        return os.fdopen(os.open(self.path / name, flags), "rb")


class ZipSource(Source):
    """A zip: read in place, never extracted."""

    def _list(self) -> dict[str, int]:
        if self.path.stat().st_size > self.limits.total:
            raise BadBundle(f"{self.path} has more than {self.limits.total} bytes")
        try:
            self._archive = zipfile.ZipFile(self.path)
            infos = self._archive.infolist()
        except Exception as error:  # the module raises a dozen kinds for damaged files
            raise BadBundle(f"{self.path} is no readable zip: {short(str(error))}") from None
        sizes: dict[str, int] = {}
        for info in infos:
            if info.filename.endswith("/") and info.file_size == 0:
                continue
            name = check_name(info.filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise BadBundle(f"{name} is a link or a device, not a file")
            if info.flag_bits & 0x1 or info.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise BadBundle(f"{name} is encrypted or packed in an unusual way")
            if name in sizes:
                raise BadBundle(f"{name} is in the zip twice")
            sizes[name] = info.file_size
        return sizes

    def _open(self, name: str) -> BinaryIO:
        return self._archive.open(name)  # type: ignore[return-value]


class _Hashing(io.RawIOBase):
    """A stream that hashes what is read from it, and ends after `left` bytes."""

    def __init__(self, stream: BinaryIO, left: int) -> None:
        self.stream = stream
        self.left = left
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(self.left if size < 0 else min(size, self.left))
        self._seen(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _seen(self, data: bytes) -> None:
        self.left -= len(data)
        self._hash.update(data)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _exactly(stream: BinaryIO, size: int, name: str) -> bytes:
    data = stream.read(size + 1)
    if len(data) != size:
        raise BadBundle(f"{name} has {'more' if len(data) > size else 'fewer'} than {size} bytes")
    return data


def open_source(path: Path, limits: OpenLimits) -> Source:
    """The files at `path`. Raises BadBundle if it is neither a folder nor a zip."""
    try:
        if path.is_dir():
            return FolderSource(path, limits)
        if path.is_file():
            return ZipSource(path, limits)
    except OSError as error:
        raise BadBundle(f"{path}: {error.strerror or error}", "") from None
    raise BadBundle(f"no such bundle: {path}", "a bundle is a folder or a zip that `dump` wrote")
