"""Fuzzing of the bundle reader: `python tests/fuzz_bundle.py [COUNT]`, 20,000 damaged bundles by default

Every damaged bundle is opened, every call loaded and replayed on the reference and on the CPU
kernels. What may happen: it works, or DSV4Error. Nothing is written, and reading takes no more memory
than twice what the files declare (plus a fixed amount for small Python objects).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import resource
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bundles import capture, micro_model, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.probes.bundle import open_bundle
from dsv4_bench.workbench.bundles.diffing import diff
from dsv4_bench.workbench.bundles.replaying import Replayer

OBJECTS = 512 << 10  # bytes that Python objects may take beside the files: JSON trees, zip tables

NASTY: list[Any] = [
    None, True, -1, 0, 1, 3, 7, 2**31, 2**63, 2**64, 10**30, -0.0, 0.5, 1e308, "nan", "inf", "",
    "../../escape", "/etc/passwd", "calls/../../x", "a\x00b", "\ud800", "x" * 300, [], {}, [[]], [-1],
    [2**40, 2**40], [1, 1, 1, 1, 1, 1, 1, 1, 1], {"kind": "tensor"}, {"kind": "experts"}, "F32", "F64",
    "I64", "U8", "BOOL", "value", "weight", "nvfp4", "mxfp4", "dense", "reference", "cpu", "over",
]  # fmt: skip


def small_bundles(folder: Path) -> list[Path]:
    """Bundles of three calls each, with a call of every op in one of them, as folders."""
    calls, _ = capture(micro_model(folder), ["kernel"])
    chosen: dict[str, Any] = {}
    for call in calls:
        chosen.setdefault(call.captured.site.op, call)
        if call.captured.site.op == "compressor" and call.captured.site.layer == 2:
            chosen["compressor 128"] = call
    calls = list(chosen.values())
    groups = [calls[first : first + 3] for first in range(0, len(calls), 3)]
    return [write(folder / f"base{number}", group) for number, group in enumerate(groups)]


class Base:
    """The files of sound bundles, and a place to put damaged copies of them."""

    def __init__(self, folder: Path) -> None:
        self.bundles = [
            {
                str(path.relative_to(source)): path.read_bytes()
                for path in sorted(source.rglob("*"))
                if path.is_file()
            }
            for source in small_bundles(folder)
        ]
        self.place = folder / "place"
        self.place.mkdir()
        self.outcomes: Counter[str] = Counter()
        self.worst_memory = -float("inf")

    def as_folder(self, files: dict[str, bytes]) -> Path:
        target = self.place / "bundle"
        for path in [path for path in target.rglob("*") if path.is_file()]:
            if str(path.relative_to(target)) not in files:
                path.unlink()
        for name, data in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return target

    def as_zip(self, files: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return buffer.getvalue()


# ------------------------------------------------------------------------------ damage


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        found.append((tree, key))
        if isinstance(value, (dict, list)):
            found += nodes(value)
    return found


def anywhere(data: st.DataObject, places: list[Any]) -> Any:
    """Any of `places`, the last as often as the first: small numbers are drawn more often."""
    return places[data.draw(st.integers(0, 2**32)) * 2654435761 % len(places)]


def damage_json(data: st.DataObject, raw: bytes) -> bytes:
    """Replace, remove or exchange up to three values anywhere in the document."""
    tree = json.loads(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        places = nodes(tree)
        if not places:
            break
        container, key = anywhere(data, places)
        what = data.draw(st.sampled_from(("nasty", "remove", "exchange", "shift")))
        if what == "remove":
            del container[key]
        elif what == "exchange":
            other, place = anywhere(data, places)
            container[key] = copy.deepcopy(other[place])
        elif what == "shift" and type(container[key]) is int:
            container[key] += data.draw(st.integers(-3, 64))
        else:
            container[key] = data.draw(st.sampled_from(NASTY))
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def damage_bytes(data: st.DataObject, raw: bytes) -> bytes:
    """Flip, cut or repeat bytes; the first few hundred more often: headers are there."""
    if not raw:
        return data.draw(st.binary(max_size=64))
    what = data.draw(st.sampled_from(("flip", "flip", "flip", "cut", "insert", "random")))
    reach = len(raw) if data.draw(st.booleans()) else min(len(raw), 600)
    at = data.draw(st.integers(0, reach - 1))
    if what == "cut":
        return raw[:at]
    if what == "insert":
        return raw[:at] + data.draw(st.binary(min_size=1, max_size=16)) + raw[at:]
    if what == "random":
        return data.draw(st.binary(max_size=200))
    changed = bytearray(raw)
    for step in range(data.draw(st.integers(1, 8))):
        changed[(at + step * 7) % len(raw)] = data.draw(st.integers(0, 255))
    return bytes(changed)


def with_right_hashes(files: dict[str, bytes]) -> dict[str, bytes]:
    """The manifest rewritten so that damage is not found by its hash, but has to be understood."""
    try:
        manifest = json.loads(files["manifest.json"])
        for name, entry in manifest["files"].items():
            data = files.get(name, b"")
            entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    except Exception:
        return files
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def damaged(data: st.DataObject, base: Base) -> Path:
    """A damaged bundle on disk, as a folder or as a zip."""
    files = dict(data.draw(st.sampled_from(base.bundles)))
    names = [*["calls.json"] * 12, *["manifest.json"] * 2, *files]
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(names))
        structured = name.endswith(".json") and data.draw(st.integers(0, 5)) < 5
        try:
            files[name] = (damage_json if structured else damage_bytes)(data, files[name])
        except (ValueError, RecursionError, UnicodeError):  # damaged before, beyond JSON
            files[name] = damage_bytes(data, files[name])
    if data.draw(st.integers(0, 39)) == 39:
        extra = data.draw(
            st.sampled_from(("../out", "x/../../out", "/tmp/out", "a/b/c/d", ".hid", "ok"))
        )
        files[extra] = b"x"
    if data.draw(st.integers(0, 5)) < 5:
        files = with_right_hashes(files)
    if any(name.startswith(("/", "..")) or "/../" in name for name in files) or data.draw(
        st.booleans()
    ):
        raw = base.as_zip(files)
        if data.draw(st.integers(0, 3)) == 3:
            raw = damage_bytes(data, raw)
        path = base.place / "bundle.zip"
        path.write_bytes(raw)
        return path
    return base.as_folder(files)


# ------------------------------------------------------------------------------ what may happen


def survive(path: Path, base: Base) -> str:
    """Open, load and replay everything; the outcome in a word. Any other exception goes through."""
    before = tree_of(base.place)
    declared = declared_size(path)
    outcome, peak = read_all(path)
    if peak > 2 * declared + OBJECTS:  # the first to come here may have imported something
        outcome, peak = read_all(path)
    base.worst_memory = max(base.worst_memory, (peak - OBJECTS) / max(declared, 1))
    assert peak <= 2 * declared + OBJECTS, f"{peak} bytes for {declared} declared"
    if outcome == "read":
        outcome = run(path)
    assert tree_of(base.place) == before, "something was written"
    base.outcomes[outcome] += 1
    return outcome


def read_all(path: Path) -> tuple[str, int]:
    """Open, verify and load everything: the outcome, and the most memory that took."""
    tracemalloc.start()
    try:
        bundle = open_bundle(path)
        bundle.verify()
        bundle.readings()
        for entry in bundle.calls:
            bundle.load(entry)
        return "read", tracemalloc.get_traced_memory()[1]
    except DSV4Error as error:
        assert error.exit_code == 4, error.message
        assert "\n" not in error.message and error.message.isprintable(), error.message
        return "refused", tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run(path: Path) -> str:
    bundle = open_bundle(path)
    try:
        Replayer(bundle).run(bundle.calls)
        diff(bundle, bundle)
    except DSV4Error as error:
        assert error.exit_code in (3, 4), error.message
        return "not runnable"
    return "replayed"


def declared_size(path: Path) -> int:
    """What the bundle says it holds: sizes in the zip's table, or of the folder's files."""
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(info.file_size for info in archive.infolist())
    except Exception:
        return path.stat().st_size


def tree_of(folder: Path) -> list[tuple[str, int, int]]:
    outside = folder.parent
    return sorted(
        (str(path), stat.st_size, stat.st_mtime_ns)
        for path in outside.rglob("*")
        for stat in [path.lstat()]
        if path.is_file()
    )


def fuzz(base: Base, count: int, progress: Callable[[int], None] = lambda done: None) -> None:
    """`count` damaged bundles, found by hypothesis; raises on the first that is not survived."""
    done = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        nonlocal done
        survive(damaged(data, base), base)
        done += 1
        progress(done)

    one()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    torch.set_num_threads(1)
    started = time.perf_counter()

    def progress(done: int) -> None:
        if done % 500 == 0:
            print(f"{done} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=os.environ.get("DSV4_FUZZ_DIR")) as folder:
        base = Base(Path(folder))
        fuzz(base, count, progress)
        print(
            json.dumps(
                {
                    "inputs": sum(base.outcomes.values()),
                    "outcomes": dict(base.outcomes),
                    "peak less 512 KiB over declared, reading": round(base.worst_memory, 2),
                    "peak RSS of the process, MB": resource.getrusage(
                        resource.RUSAGE_SELF
                    ).ru_maxrss
                    // 1000,
                    "seconds": round(time.perf_counter() - started),
                }
            )
        )


if __name__ == "__main__":
    main()
