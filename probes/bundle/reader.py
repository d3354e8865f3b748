"""Opening a bundle: everything is checked before it is used, and nothing in it is executed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import dsv4_bench.engine.ops  # noqa: F401  (registers the ops)
from dsv4_bench.engine.errors import DSV4Error, did_you_mean
from dsv4_bench.engine.registry import OPS, Site, matches, spec_of
from dsv4_bench.probes.bundle.contracts import check_call
from dsv4_bench.probes.bundle.format import (
    CALLS,
    FORMAT,
    MANIFEST,
    READINGS,
    SCHEMA_VERSION,
    BadBundle,
    OpenLimits,
    check_name,
    count,
    counts,
    mapping,
    member,
    number,
    read_json,
    sequence,
    short,
    text,
)
from dsv4_bench.probes.bundle.record import BundleCall, OutputCheck
from dsv4_bench.probes.bundle.sources import FileEntry, Source, open_source
from dsv4_bench.probes.bundle.storages import read_storages
from dsv4_bench.probes.bundle.values import Decoder
from dsv4_bench.probes.capture import Captured

_SITE = re.compile(r"[\w.-]{1,80}(/[\w.-]{1,80}){0,7}", re.ASCII)
# What a manifest has to have, and how it is checked; everything else in it is for people.
_TEXTS = ("created", "dtype", "numerics")
_MAPPINGS = ("versions", "checkpoint", "coverage")
_VERDICTS = ("ok", "over", "unjudged")
_LEAST_BUDGET = 64 << 20  # bytes that the views of one call may claim, however small the bundle is


@dataclass(frozen=True)
class SiteEntry:
    """One captured site: its op, layer and constant arguments (still as JSON)."""

    path: str
    op: str
    layer: int | None
    params: dict[str, Any]
    digests: dict[str, str]  # sha256 of each constant tensor's values


@dataclass(frozen=True)
class CallEntry:
    """One captured op of calls.json; `Bundle.load` makes it runnable."""

    index: int
    site: SiteEntry
    forward: int
    stamp: dict[str, str]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    reference: dict[str, Any]
    checks: dict[str, OutputCheck]
    signature: dict[str, str] | None = None

    @property
    def label(self) -> str:
        """``L3/attn/core #1``: the site, and the forward pass."""
        return f"{self.site.path} #{self.forward}"


@dataclass
class Bundle:
    """An opened bundle. `manifest` is checked as far as this package uses it."""

    path: Path
    manifest: dict[str, Any]
    calls: list[CallEntry]
    files: dict[str, FileEntry]
    source: Source
    _weights: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> list[int]:
        return list(self.manifest["tokens"])

    @property
    def dtype(self) -> str:
        return str(self.manifest["dtype"])

    def select(self, site: str | None) -> list[CallEntry]:
        """The calls of a site or below a glob. Raises DSV4Error with a hint if there is none."""
        if site is None:
            return self.calls
        found = [call for call in self.calls if matches(call.site.path, site)]
        if not found:
            paths = dict.fromkeys(call.site.path for call in self.calls)
            raise DSV4Error(f"no captured site matches {site!r}", did_you_mean(site, paths))
        return found

    def readings(self) -> list[dict[str, Any]]:
        """What the probes read, as dictionaries."""
        if READINGS not in self.files:
            return []
        rows = self._text(READINGS).splitlines()
        return [mapping(read_json(row, READINGS), READINGS) for row in rows]

    def _text(self, name: str) -> bytes:
        self.source.small(name)  # bounded, before it is read whole
        return self.source.consume(name, self.files[name], lambda stream, size: stream.read(size))

    def storages(self, name: str) -> dict[str, Tensor]:
        """The storages of a tensor file. Raises BadBundle if the manifest does not list it."""
        check_name(name)
        if name not in self.files:
            raise BadBundle(f"{short(name)} is not in the manifest")

        def read(stream: BinaryIO, size: int) -> dict[str, Tensor]:
            return read_storages(stream, size, name)

        return self.source.consume(name, self.files[name], read)

    def verify(self) -> None:
        """Read every file once, and compare its hash. Raises BadBundle."""
        for name, entry in self.files.items():
            self.source.consume(name, entry, _skim)

    @torch.inference_mode()
    def load(self, entry: CallEntry, device: torch.device | str = "cpu") -> BundleCall:
        """The call with its tensors on `device`; its site's weights stay loaded for the next one.

        Whole storages go to a device, so strides, padding and aliasing are the same there. Raises BadBundle for anything that does not fit together.
        """
        where = f"call {entry.index} ({entry.site.path})"
        files: dict[str, dict[str, Tensor]] = {}

        def storages(name: str) -> dict[str, Tensor]:
            kept = self._weights if name.startswith("weights/") else files
            key = f"{name} on {device}"
            if key not in kept:
                if kept is self._weights:
                    kept.clear()  # one site's weights at a time
                kept[key] = {n: raw.to(device) for n, raw in self.storages(name).items()}
            return kept[key]

        size = sum(entry.bytes for entry in self.files.values())
        decoder = Decoder(storages, max(_LEAST_BUDGET, 2 * size))
        spec = spec_of(entry.site.op)
        params = _decoded(decoder, entry.site.params, f"{entry.site.path} params")
        inputs = _decoded(decoder, entry.inputs, f"{where} inputs")
        if set(params) & set(inputs) or set(params) | set(inputs) != set(spec.parameters):
            names = sorted([*params, *inputs])
            raise BadBundle(f"{where}: {spec.name} takes {list(spec.parameters)}, not {names}")
        positional = tuple(name for name in spec.parameters if name in inputs)
        if positional != spec.parameters[: len(positional)]:
            raise BadBundle(f"{where}: the arguments {list(positional)} are not the first ones")
        outputs = _decoded(decoder, entry.outputs, f"{where} outputs")
        reference = _decoded(decoder, entry.reference, f"{where} reference")
        check_call(spec, {**params, **inputs}, outputs, reference, where)
        site = Site(entry.site.path, spec, params, entry.site.layer)
        before = {name: inputs[name] for name in spec.mutates}
        args = tuple(inputs[name] for name in positional)
        captured = Captured(site, args, before, outputs)
        return BundleCall(
            captured,
            entry.forward,
            reference,
            dict(entry.checks),
            dict(entry.stamp),
            entry.signature,
        )


def _skim(stream: BinaryIO, size: int) -> None:
    while stream.read(1 << 20):
        pass


def _decoded(decoder: Decoder, table: dict[str, Any], where: str) -> dict[str, Any]:
    return {name: decoder.value(item, f"{where}: {short(name)}") for name, item in table.items()}


def open_bundle(path: Path, limits: OpenLimits | None = None) -> Bundle:
    """Open a bundle from anywhere. Raises BadBundle (exit code 4) with what is wrong and where.

    Reads manifest.json and calls.json; tensors are read, and verified, when a call is loaded.
    """
    source = open_source(path, limits or OpenLimits())
    manifest = mapping(read_json(source.small(MANIFEST), MANIFEST), MANIFEST)
    _check_manifest(manifest)
    files = _files(manifest, source)
    bundle = Bundle(path, manifest, [], files, source)
    if CALLS not in files:
        raise BadBundle(f"{MANIFEST} does not list {CALLS}")
    document = mapping(read_json(bundle._text(CALLS), CALLS), CALLS)
    sites = _sites(document)
    for index, item in enumerate(sequence(member(document, "calls", CALLS), CALLS)):
        bundle.calls.append(_call(index, item, sites))
    return bundle


def _check_manifest(manifest: dict[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise BadBundle(f"{MANIFEST}: format is {short(manifest.get('format'))}, not {FORMAT!r}")
    version = count(member(manifest, "schema_version", MANIFEST), "schema_version", 2**31)
    if version != SCHEMA_VERSION:
        raise BadBundle(
            f"{MANIFEST}: schema version {version}, this is version {SCHEMA_VERSION}",
            "open it with the dsv4-bench that wrote it",
        )
    for name in _TEXTS:
        text(member(manifest, name, MANIFEST), f"{MANIFEST}: {name}")
    for name in _MAPPINGS:
        mapping(member(manifest, name, MANIFEST), f"{MANIFEST}: {name}")
    if manifest["dtype"] not in ("float32", "bfloat16"):
        raise BadBundle(f"{MANIFEST}: dtype is {short(manifest['dtype'])}")
    for name in ("tokens", "chunks"):
        counts(member(manifest, name, MANIFEST), f"{MANIFEST}: {name}", None, 2**31)
    for name in ("command", "route"):
        for item in sequence(member(manifest, name, MANIFEST), f"{MANIFEST}: {name}"):
            text(item, f"{MANIFEST}: {name}")


def _files(manifest: dict[str, Any], source: Source) -> dict[str, FileEntry]:
    files = {}
    listed = mapping(member(manifest, "files", MANIFEST), f"{MANIFEST}: files")
    for name, item in listed.items():
        where = f"{MANIFEST}: {short(name)}"
        check_name(name)
        fields = mapping(item, where)
        size = count(member(fields, "bytes", where), where)
        digest = text(member(fields, "sha256", where), where)
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise BadBundle(f"{where}: sha256 is {short(digest)}")
        if source.sizes.get(name) != size:
            found = source.sizes.get(name, "no such file")
            raise BadBundle(f"{name}: the manifest says {size} bytes, found: {found}")
        files[name] = FileEntry(size, digest)
    return files


def _sites(document: dict[str, Any]) -> dict[str, SiteEntry]:
    sites = {}
    for path, item in mapping(member(document, "sites", CALLS), f"{CALLS}: sites").items():
        where = f"{CALLS}: site {short(path)}"
        if not _SITE.fullmatch(path):
            raise BadBundle(f"{where} is no path of a site")
        fields = mapping(item, where)
        op = text(member(fields, "op", where), where)
        if op not in OPS:
            raise BadBundle(f"{where}: unknown op {short(op)!r}", "made by another version?")
        layer = member(fields, "layer", where)
        layer = None if layer is None else count(layer, f"{where}: layer", 4096)
        params = mapping(member(fields, "params", where), where)
        digests = _texts(member(fields, "digests", where), f"{where}: digests")
        sites[path] = SiteEntry(path, op, layer, params, digests)
    return sites


def _call(index: int, item: Any, sites: dict[str, SiteEntry]) -> CallEntry:
    where = f"{CALLS}: call {index}"
    fields = mapping(item, where)
    path = text(member(fields, "site", where), where)
    if path not in sites:
        raise BadBundle(f"{where}: unknown site {short(path)!r}")
    tables = [
        mapping(member(fields, name, where), f"{where}: {name}")
        for name in ("inputs", "outputs", "reference", "checks")
    ]
    inputs, outputs, reference, checks = tables
    spec = spec_of(sites[path].op)
    names = {*spec.outputs, *spec.mutates}
    if not outputs.keys() <= reference.keys() == checks.keys() <= names:
        raise BadBundle(f"{where}: outputs {short(list(outputs))} of {spec.name} {sorted(names)}")
    signature = member(fields, "signature", where)
    return CallEntry(
        index,
        sites[path],
        count(member(fields, "forward", where), f"{where}: forward", 2**31),
        _texts(member(fields, "stamp", where), f"{where}: stamp"),
        inputs,
        outputs,
        reference,
        {name: _check(check, f"{where}: check of {name}") for name, check in checks.items()},
        None if signature is None else _texts(signature, f"{where}: signature"),
    )


def _texts(value: Any, where: str) -> dict[str, str]:
    """An object of strings."""
    return {k: text(v, f"{where}.{short(k)}") for k, v in mapping(value, where).items()}


def _check(item: Any, where: str) -> OutputCheck:
    fields = mapping(item, where)
    names = ("own_error", "row_error", "limit", "limit_row")
    values = [number(member(fields, name, where), f"{where}.{name}") for name in names]
    equal, verdict = fields.get("bits_equal"), fields.get("verdict")
    if not isinstance(equal, bool) or verdict not in _VERDICTS:
        raise BadBundle(f"{where}: {short(json.dumps(item))}")
    return OutputCheck(values[0], values[1], values[2], values[3], equal, str(verdict))
