"""Writing a bundle: into a temporary folder beside the target, published by one rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.bundle.format import (
    CALLS,
    FORMAT,
    MANIFEST,
    READINGS,
    SCHEMA_VERSION,
    check_name,
    slug,
    write_json,
)
from dsv4_bench.probes.bundle.record import BundleCall
from dsv4_bench.probes.bundle.storages import StorageTable
from dsv4_bench.probes.bundle.values import encode, is_bank, tensors_of
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.compare import bits_equal

_PER_CONSTANT = 600  # bytes around a stored tensor at most: alignment, header, JSON, digest
_ZIP_LEVEL = 1  # weights hardly shrink; zeros of unused cache rows do at any level


@dataclass(frozen=True)
class LeftOut:
    """Something that was asked for and is not in the bundle."""

    site: str
    forward: int | None
    bytes: int
    why: str


@dataclass
class _SiteRecord:
    """What a site's calls share: constants, and the experts that some call used."""

    captured: Captured
    used: set[int] = field(default_factory=set)
    calls: int = 0


class Writer:
    """Builds the bundle `target`; use it as a context manager.

    A name that ends in .zip makes a zip, any other a folder. Nothing appears under the target's
    name before `publish`, and leaving the block without it removes everything. `max_bytes` bounds the
    calls and their weights, uncompressed (None: no bound); what does not fit is in `left_out`.
    Raises DSV4Error if the target exists and is no bundle, or cannot be written.
    """

    def __init__(self, target: Path, max_bytes: int | None = None) -> None:
        self.target = target
        self.max_bytes = max_bytes
        self.left_out: list[LeftOut] = []
        self.calls: list[dict[str, Any]] = []
        self.nbytes = 0
        self._number = 0
        self._sites: dict[str, _SiteRecord] = {}
        _check_target(target)
        _remove_leftovers(target)
        self.folder = target.parent / f".{target.name}.{os.getpid()}.part"

    def __enter__(self) -> Writer:
        with _write_errors(self.target):
            self.folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for path in (self.folder, self._zip_part):
            _remove(path)

    @property
    def _zip_part(self) -> Path:
        return self.folder.with_name(self.folder.name + ".zip")

    # -- content

    def add_call(self, call: BundleCall) -> bool:
        """Add one op, unless it does not fit any more; then it is named in `left_out`.

        For an op that is over its limit, ones that are not have to make room.
        """
        captured, path = call.captured, call.site
        table = StorageTable(f"calls/{self._number:04d}-{slug(path)}.safetensors")
        entry = _encode_call(call, table)
        used = _used_experts(captured)
        own = table.file_bytes + len(write_json(entry, None))
        size = own + self._constant_bytes(captured, used)
        if call.verdict == "over" and not self._fits(size):
            self._make_room(size)
            size = own + self._constant_bytes(captured, used)
        if not self._fits(size):
            self._leave_out(path, call.forward, size)
            return False
        self._number += 1
        record = self._sites.setdefault(path, _SiteRecord(captured))
        record.used |= used
        record.calls += 1
        self.nbytes += size
        self.calls.append(entry)
        with _write_errors(self.target):
            table.save(self._path(table.file))
        return True

    def _fits(self, size: int) -> bool:
        return self.max_bytes is None or self.nbytes + size <= self.max_bytes

    def _leave_out(self, path: str, forward: int, size: int) -> None:
        why = f"did not fit into {self.max_bytes} bytes"
        self.left_out.append(LeftOut(path, forward, size, why))

    def _make_room(self, size: int) -> None:
        """Take out calls that are within their limits, the largest first, until `size` bytes fit."""
        if self.max_bytes is not None and size > self.max_bytes:
            return
        right = [call for call in self.calls if not _is_over(call)]
        right.sort(key=lambda call: -(self.folder / call["file"]).stat().st_size)
        for call in right:
            if self._fits(size):
                return
            self.calls.remove(call)
            path, record = call["site"], self._sites[call["site"]]
            file = self.folder / call["file"]
            before = self.nbytes
            self.nbytes -= file.stat().st_size + len(write_json(call, None))
            file.unlink()
            record.calls -= 1
            if not record.calls:
                self.nbytes -= self._bytes_of(record.captured.site.params, record.used)
                del self._sites[path]
            self._leave_out(path, call["forward"], before - self.nbytes)

    def _constant_bytes(self, captured: Captured, used: set[int]) -> int:
        """Bytes of the constants that this call adds to what its site already brings."""
        params, known = captured.site.params, self._sites.get(captured.site.path)
        if known is None:
            return self._bytes_of(params, used)
        banks = {name: value for name, value in params.items() if is_bank(value)}
        return self._bytes_of(banks, used - known.used)

    @staticmethod
    def _bytes_of(params: Mapping[str, Any], used: set[int]) -> int:
        """Bytes that these constants take, in the tensor file and in calls.json."""
        return sum(
            tensor.nbytes + _PER_CONSTANT
            for name, value in params.items()
            for _, tensor in tensors_of(name, value, sorted(used))
        )

    def add_readings(self, readings: Iterable[Mapping[str, Any]]) -> None:
        """Write readings.jsonl: dictionaries as `Reading.to_dict` makes them."""
        self.add_file(READINGS, b"".join(write_json(dict(row), None) for row in readings))

    def add_file(self, name: str, data: bytes) -> None:
        """Any other file, such as a report."""
        with _write_errors(self.target):
            self._path(check_name(name)).write_bytes(data)

    # -- publication

    def sort_calls(self, order: Sequence[str]) -> None:
        """Put the calls in the order they ran: by forward pass, then by the sites' `order`."""
        place = {path: number for number, path in enumerate(order)}
        self.calls.sort(key=lambda call: (call["forward"], place[call["site"]]))

    def publish(self, manifest: Mapping[str, Any]) -> int:
        """Complete the manifest, and let the bundle appear; returns its size in bytes.

        The writer adds format, schema_version, left_out and files.
        """
        with _write_errors(self.target):
            sites = {path: self._save_site(path, r) for path, r in self._sites.items()}
            self.add_file(CALLS, write_json({"sites": sites, "calls": self.calls}, None))
            names = sorted(
                str(path.relative_to(self.folder))
                for path in self.folder.rglob("*")
                if path.is_file()
            )
            document = {
                "format": FORMAT,
                "schema_version": SCHEMA_VERSION,
                **manifest,
                "left_out": [asdict(item) for item in self.left_out],
                "files": {name: _fingerprint(self.folder / name) for name in names},
            }
            self.add_file(MANIFEST, write_json(document))
            if self.target.suffix == ".zip":
                _zip(self.folder, [MANIFEST, *names], self._zip_part)
                size = self._zip_part.stat().st_size
                os.replace(self._zip_part, self.target)
            else:
                size = sum(path.stat().st_size for path in self.folder.rglob("*"))
                _replace_folder(self.folder, self.target)
        return size

    def _save_site(self, path: str, record: _SiteRecord) -> dict[str, Any]:
        site = record.captured.site
        used = sorted(record.used)
        table = StorageTable(f"weights/{slug(path)}.safetensors")
        for name, value in site.params.items():
            table.place(dict(tensors_of(name, value, used)))
        if table.names:
            table.save(self._path(table.file))
        return {
            "op": site.op,
            "layer": site.layer,
            "params": {name: encode(value, table, used) for name, value in site.params.items()},
            "digests": {
                name: _digest(tensor)
                for param, value in site.params.items()
                for name, tensor in tensors_of(param, value, used)
            },
        }

    def _path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _is_over(call: Mapping[str, Any]) -> bool:
    return any(check["verdict"] == "over" for check in call["checks"].values())


def _run_inputs(captured: Captured) -> dict[str, Any]:
    """The arguments that differ from call to call, those written in place as they were before."""
    constants = captured.site.params
    return {name: v for name, v in captured.inputs.items() if name not in constants}


def _encode_call(call: BundleCall, table: StorageTable) -> dict[str, Any]:
    """The entry of calls.json; its tensors are placed in `table`. The reference's outputs that have
    the bits of the route's are views of the same memory."""
    inputs = _run_inputs(call.captured)
    ours, same = call.captured.outputs, _same_bits(call)
    named = [(f"in/{n}", v) for n, v in inputs.items()]
    table.place(dict(pair for name, value in named for pair in tensors_of(name, value)))
    table.place({f"out/{n}": t for n, t in ours.items()})
    table.place({f"ref/{n}": t for n, t in call.reference.items() if n not in same})
    right = {n: ours[n] if n in same else t for n, t in call.reference.items()}
    return {
        "site": call.site,
        "forward": call.forward,
        "file": table.file,
        "stamp": call.stamp,
        "signature": call.signature,
        "inputs": {n: encode(v, table) for n, v in inputs.items()},
        "outputs": {n: encode(t, table) for n, t in ours.items()},
        "reference": {n: encode(t, table) for n, t in right.items()},
        "checks": {n: check.to_dict() for n, check in call.checks.items()},
    }


def _same_bits(call: BundleCall) -> set[str]:
    """The reference's outputs that need not be stored, as the route's are the same."""
    ours = call.captured.outputs
    return {n for n, t in call.reference.items() if n in ours and bits_equal(t, ours[n])}


def _used_experts(captured: Captured) -> set[int]:
    """Ids of the experts that this call reads, if its op has a bank."""
    banks = [value for value in captured.site.params.values() if is_bank(value)]
    if not banks:
        return set()
    ids = captured.inputs["experts"].flatten().tolist()
    return {e for e in ids if 0 <= e < len(banks[0])}


def _digest(tensor: Tensor) -> str:
    """sha256 of the values, whatever the layout in memory."""
    raw = tensor.contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(raw.data).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _zip(folder: Path, names: list[str], target: Path) -> None:
    """Zip the files, the same bytes for the same content."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=_ZIP_LEVEL) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = (folder / name).stat().st_size
            with (folder / name).open("rb") as source, archive.open(info, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


# ------------------------------------------------------------------------------ the target


def _check_target(target: Path) -> None:
    """Raise DSV4Error unless nothing is there, or a bundle of the same kind to be replaced."""
    if not target.parent.is_dir():
        raise DSV4Error(f"no such folder: {target.parent}", "-o names a file or folder to make")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink():
        fine = False
    elif target.suffix == ".zip":
        fine = target.is_file() and _zip_has_manifest(target)
    else:
        fine = target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir()))
    if not fine:
        raise DSV4Error(f"{target} exists and is no bundle", "choose another name, or remove it")


def _zip_has_manifest(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return False


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of this target left behind, and give back a replaced folder."""
    prefix = f".{target.name}."
    for path in target.parent.glob(f".{_escape(target.name)}.*"):
        owner, _, kind = path.name.removeprefix(prefix).partition(".")
        if not owner.isdecimal() or _alive(int(owner)):
            continue
        if kind == "old" and not target.exists():
            path.rename(target)
        elif kind in ("part", "part.zip", "old"):
            _remove(path)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an older bundle there goes only after the new one stands."""
    if not target.exists():
        source.rename(target)
        return
    old = target.parent / f".{target.name}.{os.getpid()}.old"
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _remove(old)


class _write_errors:
    """Turns an OSError of writing into a DSV4Error with the target and the reason."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            hint = "--max-size makes it smaller" if full else "choose another place with -o"
            reason = error.strerror or str(error)
            raise DSV4Error(f"cannot write {self.target}: {reason}", hint) from error
