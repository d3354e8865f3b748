"""Bundles: what goes in comes out, layout included; published whole or not at all; safe to open"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import runpy
import signal
import stat
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import MANIFEST, capture, micro_model, write
from fuzz_bundle import Base, fuzz
from safetensors import safe_open
from torch import Tensor

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.formats import Weight
from dsv4_bench.engine.ops.experts import Expert
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Site, implementation, reference, spec_of
from dsv4_bench.probes import bundle
from dsv4_bench.probes.bundle.format import OpenLimits
from dsv4_bench.probes.bundle.standalone import Weight as StandaloneWeight
from dsv4_bench.probes.capture import Capture
from dsv4_bench.probes.compare import bits_equal
from dsv4_bench.probes.layout import clone_tensors, storage_key
from dsv4_bench.probes.limits import Limits


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[bundle.BundleCall]:
    return capture(micro_model(tmp_path_factory.mktemp("micro")), ["kernel"])[0]


@pytest.fixture(scope="module")
def sound(calls: list[bundle.BundleCall], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle of one layer, as a folder; copy it before damaging it."""
    chosen = [call for call in calls if call.site.startswith("L1/")]
    return write(tmp_path_factory.mktemp("sound") / "bundle", chosen)


def values(call: bundle.BundleCall) -> dict[str, Any]:
    return {**call.captured.inputs, **call.captured.outputs}


# ------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", ["b.zip", "folder"])
def test_every_op_comes_back_with_its_bits_and_its_layout(
    calls: list[bundle.BundleCall], tmp_path: Path, name: str
) -> None:
    opened = bundle.open_bundle(write(tmp_path / name, calls))
    opened.verify()
    assert [entry.site.path for entry in opened.calls] == [call.site for call in calls]
    assert {entry.site.op for entry in opened.calls} == set(IMPLEMENTATIONS)
    for entry, call in zip(opened.calls, calls, strict=True):
        back = opened.load(entry)
        assert (back.forward, back.checks, back.stamp) == (call.forward, call.checks, call.stamp)
        for key, value in values(call).items():
            same_value(values(back)[key], value)
        again = back.captured.run(spec_of(entry.site.op).reference)
        for key, value in back.reference.items():
            assert bits_equal(again[key], value), (entry.label, key)


def same_value(a: Any, b: Any) -> None:
    if isinstance(b, Tensor):
        assert bits_equal(a, b) and a.stride() == b.stride()
    elif isinstance(b, Weight):
        assert (a.name, a.format, a.global_scale) == (b.name, b.format, b.global_scale)
        same_value(a.data.view(torch.uint8), b.data.view(torch.uint8))
    elif isinstance(b, Expert):
        for x, y in zip(a, b, strict=True):
            same_value(x, y)


@pytest.mark.parametrize("layout", ["nvfp4", "deepseek", "bf16"])
def test_weights_stay_in_the_checkpoints_format(layout: str, tmp_path: Path) -> None:
    model = micro_model(tmp_path, layout)
    calls, _ = capture(model, wanted=lambda site: site.path == "L0/ffn/experts")
    opened = bundle.open_bundle(write(tmp_path / "b.zip", calls))
    original = model.sites["L0/ffn/experts"].params["bank"]
    used = {e for call in calls for e in call.captured.inputs["experts"].flatten().tolist()}
    back = opened.load(opened.calls[0]).captured.inputs["bank"]
    assert set(back.experts) == used and len(back) == len(original)
    for expert in used:
        for mine, theirs in zip(back[expert], original[expert], strict=True):
            same_value(mine, theirs)
            assert bits_equal(mine.dequantize(), theirs.dequantize())
            plain = StandaloneWeight(
                mine.name, mine.format, mine.data, mine.scale, mine.global_scale
            )
            assert bits_equal(plain.dequantize(), theirs.dequantize())
    if len(used) < len(original):
        with pytest.raises(DSV4Error, match="is not in the bundle"):
            back[next(iter(set(range(len(original))) - used))]


def strided_call(name: str = "reference", wrong: bool = False) -> bundle.BundleCall:
    """attention over pools that are views of one packed buffer: strided, aliased, NaN in the padding.

    `wrong` spoils a row of the output, as a kernel might.
    """
    generator = torch.Generator().manual_seed(0)
    buffer = torch.full((24, 40), torch.nan)  # rows of 16 window, 16 entries, 8 padding
    window, entries = buffer[2:12, 4:20], buffer[4:14, 20:36]
    window.copy_(torch.randn(10, 16, generator=generator))
    entries.copy_(torch.randn(10, 16, generator=generator))
    q = torch.randn(3, 2, 16, generator=generator)
    index = torch.tensor([[0, 1, 2], [3, 9, -1], [5, 6, 7]], dtype=torch.int32)
    params = {"sink": torch.tensor([0.1, -0.2]), "scale": 0.25}
    site = Site("L0/attn/core", spec_of("attention"), params, 0)
    site.use(IMPLEMENTATIONS["attention"][name])
    observer = Capture()
    with torch.inference_mode():
        observer.around(site, (q, window, index, entries, index))
        observer.calls[0].outputs["o"][0] += float(wrong)
    return bundle.examine(observer.calls[0], 0, Limits(torch.float32))


@pytest.fixture
def ignores_strides() -> Any:
    """A kernel that takes a pool's rows to lie one behind the other: right on contiguous pools."""

    def packed(pool: Tensor) -> Tensor:
        flat = torch.empty(0).set_(pool.untyped_storage(), pool.storage_offset(), (pool.numel(),))
        return flat.view(pool.shape)

    @implementation(op="attention", name="unstrided")
    def attention(q, window, index, entries, entry_index, **params):
        return reference("attention")(
            q, packed(window), index, packed(entries), entry_index, **params
        )

    yield attention
    del IMPLEMENTATIONS["attention"]["unstrided"]


def test_a_stride_bug_is_in_the_bundle_and_not_in_a_contiguous_copy(
    ignores_strides: Callable[..., Any], tmp_path: Path
) -> None:
    call = strided_call("unstrided")
    assert call.verdict == "over"
    opened = bundle.open_bundle(write(tmp_path / "b.zip", [call]))
    back = opened.load(opened.calls[0])
    again = back.captured.run(ignores_strides)
    assert bits_equal(again["o"], call.captured.outputs["o"])
    assert not torch.allclose(again["o"], back.reference["o"], equal_nan=False)
    dense = {
        name: value.contiguous()
        for name, value in back.captured.inputs.items()
        if isinstance(value, Tensor) and name in ("window", "entries")
    }
    hidden = back.captured.run(ignores_strides, **dense)
    assert torch.allclose(hidden["o"], back.reference["o"])


def test_strides_offsets_aliasing_and_padding_survive(tmp_path: Path) -> None:
    call = strided_call()
    opened = bundle.open_bundle(write(tmp_path / "b.zip", [call]))
    back = opened.load(opened.calls[0]).captured.inputs
    window, entries = back["window"], back["entries"]
    assert window.stride() == entries.stride() == (40, 1)
    assert storage_key(window) == storage_key(entries)
    assert entries.storage_offset() - window.storage_offset() == 2 * 40 + 16
    around = window.as_strided((10, 40), (40, 1))  # rows with the entries' part and the padding
    assert torch.isnan(around[:, 32:]).all() and not torch.isnan(around[:2, :16]).any()
    assert bits_equal(around[2:, 16:32].contiguous(), entries[:8].contiguous())
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        name = next(n for n in archive.namelist() if n.startswith("calls/"))
        (tmp_path / "file").write_bytes(archive.read(name))
    with safe_open(
        tmp_path / "file", "pt"
    ) as file:  # one storage for both pools, one for both indices
        assert sorted(file.keys()) == ["in/q", "in/window", "in/window_index", "out/lse", "out/o"]


def test_clones_are_independent_and_keep_what_was_shared() -> None:
    base = torch.arange(60.0)
    a, b = base.as_strided((4, 6), (10, 1), 3), base.as_strided((3, 2), (20, 5), 3)
    copies = clone_tensors({"a": a, "b": b, "empty": base[:0], "scalar": base[7]})
    assert copies["a"].stride() == (10, 1) and copies["b"].stride() == (20, 5)
    copies["a"][0, 0] = -1.0
    assert copies["b"][0, 0] == -1.0 and base[3] == 3.0
    assert (copies["a"].data_ptr() - a.data_ptr()) % 64 == 0
    assert copies["scalar"] == 7.0 and copies["empty"].shape == (0,)
    odd = torch.from_numpy(np.arange(200, dtype=np.float32)[1:])  # as mapped files give it
    (copy,) = clone_tensors({"odd": odd}).values()
    assert (
        torch.equal(copy, odd)
        and odd.data_ptr() % 16
        and copy.data_ptr() % 64 == odd.data_ptr() % 64
    )


def test_the_standalone_script_needs_nothing_but_torch(
    calls: list[bundle.BundleCall], tmp_path: Path
) -> None:
    from dsv4_bench.probes.bundle.standalone_script import standalone_script

    chosen = {call.captured.site.op: call for call in calls}
    chosen["wrong"] = strided_call(wrong=True)
    folder = write(tmp_path / "b", list(chosen.values()))
    (folder / "replay.py").write_text(standalone_script())
    blocked = [
        name for name in sys.modules if name.partition(".")[0] in ("dsv4_bench", "safetensors")
    ]

    def run(*words: str) -> tuple[int, str]:
        """Exit code and output of replay.py, in a process that cannot import us or safetensors."""

        def work() -> None:
            sys.modules.update(dict.fromkeys([*blocked, "dsv4_bench", "safetensors", "numpy"]))
            sys.argv = [str(folder / "replay.py"), *words]
            with (tmp_path / "printed").open("w") as printed, redirect_stdout(printed):
                runpy.run_path(sys.argv[0], run_name="__main__")

        return in_a_child(work) >> 8, (tmp_path / "printed").read_text()

    code, printed = run()
    assert f"{len(chosen)} ops, 1 outputs over their limit, 0 ops could not be run" in printed
    assert code == 1
    assert "reference bits differ" not in printed
    assert "worst at [0, " in printed
    assert run("L2/*")[0] == 0
    mine = tmp_path / "mine.py"
    mine.write_text("def f(q, *rest, **constants):\n    return q * 0, q[..., 0] * 0\n")
    code, printed = run("--function", f"{mine}:f", "*/attn/core")
    assert code == 1 and "OVER   o" in printed
    assert run("--list", "nothing")[0] == 3


# ------------------------------------------------------------------------------ whole or not at all

DISK_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def in_a_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process; its exit status as `os.waitpid` gives it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def part_of_a_bundle(path: object) -> bool:
    """Whether a file that is opened for writing belongs to a bundle that is not published yet."""
    return any(part.endswith((".part", ".part.zip")) for part in Path(str(path)).parts)


def killed_at(number: int, signum: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, which gets the signal just before its file-system operation `number`."""

    def run() -> None:
        left = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # off in background jobs

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "open" and args[2] & os.O_WRONLY and not part_of_a_bundle(args[0]):
                os._exit(99)
            if event in DISK_EVENTS:
                left -= 1
                if left == -1:
                    signal.raise_signal(signum)

        sys.addaudithook(hook)
        work()

    return run


@pytest.mark.parametrize(
    ("name", "signum", "older"),
    [
        ("b.zip", signal.SIGKILL, True),
        ("b.zip", signal.SIGKILL, False),
        ("b", signal.SIGKILL, True),
        ("b", signal.SIGINT, True),
        ("b.zip", signal.SIGINT, False),
    ],
)
def test_killed_before_any_of_its_operations(
    tmp_path: Path, name: str, signum: int, older: bool
) -> None:
    """The old bundle, the new one or none: never half of one, and the next writer tidies up."""
    call, target = strided_call(), tmp_path / name
    seen = set()
    for number in range(200):
        if older and not target.exists():
            write(target, [call], created="old")
        status = in_a_child(
            killed_at(number, signum, lambda: write(target, [call], created="new") and None)
        )
        found = target.exists()
        if found:
            opened = bundle.open_bundle(target)
            opened.verify()
            seen.add(opened.manifest["created"])
        if signum == signal.SIGINT and number < 8:  # later ones may hit the tidying up itself
            assert [path.name for path in tmp_path.iterdir()] == [name] * found
        bundle.Writer(target)  # gives back what was moved away, removes what is left
        assert [path.name for path in tmp_path.iterdir()] == [name] * target.exists()
        assert target.exists() or not older
        assert status >> 8 != 99, "a file under its final name was opened for writing"
        if status == 0:
            break
        if older and target.exists() and bundle.open_bundle(target).manifest["created"] == "new":
            write(target, [call], created="old")
        elif target.exists() and not older:
            remove(target)
    assert number > 10 and seen == ({"old", "new"} if older else {"new"})


def remove(target: Path) -> None:
    import shutil

    shutil.rmtree(target) if target.is_dir() else target.unlink()


@pytest.mark.parametrize("name", ["b.zip", "b"])
@pytest.mark.parametrize("limit", [20_000, 3_000])
def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, name: str, limit: int) -> None:
    """A limit on file sizes stands for a full disk: the same calls fail, with EFBIG."""
    target = write(tmp_path / name, [strided_call()], created="old")
    calls = [strided_call() for _ in range(40)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DSV4Error, match=r"cannot write .*b.*: File too large") as caught:
            write(target, calls)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "--max-size" in caught.value.hint
    assert bundle.open_bundle(target).manifest["created"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.zip"
    thesis.write_bytes(b"years of work")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "photo").write_bytes(b"x")
    link = tmp_path / "link"
    link.symlink_to(folder)
    for target in (thesis, folder, link):
        with pytest.raises(DSV4Error, match="exists and is no bundle"):
            bundle.Writer(target)
    assert thesis.read_bytes() == b"years of work" and (folder / "photo").exists()
    with pytest.raises(DSV4Error, match="no such folder"):
        bundle.Writer(tmp_path / "no" / "b.zip")


def test_the_same_content_gives_the_same_zip(tmp_path: Path) -> None:
    call = strided_call()
    a, b = (write(tmp_path / f"{n}.zip", [call]).read_bytes() for n in "ab")
    assert a == b


# ------------------------------------------------------------------------------ size


def test_wrong_ops_take_the_room_of_right_ones(
    calls: list[bundle.BundleCall], tmp_path: Path
) -> None:
    right = [call for call in calls if call.site.startswith("L2/")]
    wrong = strided_call(wrong=True)
    with bundle.Writer(tmp_path / "b", max_bytes=60_000) as writer:
        added = [writer.add_call(call) for call in right]
        assert any(added) and not all(added)
        assert writer.add_call(wrong)
        writer.publish(MANIFEST)
        assert writer.nbytes <= 60_000
    opened = bundle.open_bundle(tmp_path / "b")
    kept = [entry.site.path for entry in opened.calls]
    assert kept[-1] == wrong.site and len(kept) > 1
    missing = [item["site"] for item in opened.manifest["left_out"]]
    assert sorted([*kept[:-1], *missing]) == sorted(call.site for call in right)
    stored = sum(entry.bytes for name, entry in opened.files.items() if name != "manifest.json")
    assert stored <= 60_000


# ------------------------------------------------------------------------------ strangers


def zipped(
    folder: Path, target: Path, extra: Callable[[zipfile.ZipFile], None] = lambda z: None
) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.rglob("*"):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
        extra(archive)
    return target


def refused(path: Path, message: str, limits: OpenLimits | None = None) -> None:
    with pytest.raises(bundle.BadBundle, match=message) as caught:
        opened = bundle.open_bundle(path, limits)
        opened.verify()
        for entry in opened.calls:
            opened.load(entry)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "name",
    ["../escape", "a/../../escape", "/tmp/escape", "C:/x", "a\\b", ".hidden", "a/b/c/d", "a//b"],
)
def test_names_that_lead_elsewhere(sound: Path, tmp_path: Path, name: str) -> None:
    path = zipped(sound, tmp_path / "b.zip", lambda z: z.writestr(name, b"x"))
    refused(path, "is not allowed in a bundle")
    assert not (tmp_path.parent / "escape").exists()


def test_links_duplicates_and_encryption(sound: Path, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(
        zipped(sound, tmp_path / "l.zip", lambda z: z.writestr(link, "/etc/passwd")), "is a link"
    )
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(sound, tmp_path / "d.zip", lambda z: z.writestr("calls.json", b"{}"))
    refused(path, "is in the zip twice")
    raw = bytearray(zipped(sound, tmp_path / "e.zip").read_bytes())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 8] |= 1
    (tmp_path / "e.zip").write_bytes(raw)
    refused(tmp_path / "e.zip", "is encrypted")


def test_a_folder_with_a_link(sound: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "b"
    shutil.copytree(sound, folder)
    (folder / "readings.jsonl").symlink_to("/etc/passwd")
    refused(folder, "is a link")


def test_bombs(sound: Path, tmp_path: Path) -> None:
    path = zipped(sound, tmp_path / "b.zip", lambda z: z.writestr("zeros", bytes(5_000_000)))
    assert path.stat().st_size < 1_500_000
    refused(path, "unpacks to", OpenLimits(total=4_000_000))
    many = zipped(
        sound, tmp_path / "m.zip", lambda z: [z.writestr(f"f{i}", b"") for i in range(50)]
    )
    refused(many, "at most 40", OpenLimits(files=40))
    refused(sound, "bytes, at most 100", OpenLimits(json=100))


def test_more_bytes_than_declared(sound: Path, tmp_path: Path) -> None:
    """A zip whose table says less than what its data unpacks to."""
    path = zipped(sound, tmp_path / "b.zip")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02")
    while raw[at + 46 : at + 56] != b"calls.json":
        at = raw.index(b"PK\x01\x02", at + 4)
    raw[at + 24 : at + 28] = (100).to_bytes(4, "little")
    path.write_bytes(raw)
    refused(path, "calls.json")


def edited(sound: Path, target: Path, file: str, change: Callable[[Any], None]) -> Path:
    """A copy of the bundle with a JSON file changed and the manifest's hashes put right."""
    import shutil

    shutil.copytree(sound, target)
    document = json.loads((target / file).read_text())
    change(document)
    (target / file).write_text(json.dumps(document))
    manifest = json.loads((target / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        if (target / name).exists():
            raw = (target / name).read_bytes()
            entry.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def site_call(document: Any, op: str) -> dict[str, Any]:
    return next(c for c in document["calls"] if document["sites"][c["site"]]["op"] == op)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), "schema version 2, this is version 1"),
        (lambda m: m.update(format="other"), "format is other"),
        (lambda m: m.pop("tokens"), "has no 'tokens'"),
        (lambda m: m.update(tokens=["x"]), "not a whole number"),
        (lambda m: m.update(dtype="float64"), "dtype is float64"),
        (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "is not allowed"),
        (lambda m: m["files"].update(x={"bytes": 1, "sha256": "0" * 64}), "no such file"),
    ],
)
def test_manifests(
    sound: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    refused(edited(sound, tmp_path / "b", "manifest.json", change), message)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("linear", lambda c: c["inputs"]["x"].update(offset=10**9), "ends at byte"),
        ("linear", lambda c: c["inputs"]["x"].update(stride=[-1, 1]), "not a whole number"),
        (
            "linear",
            lambda c: c["inputs"]["x"].update(shape=[2**40, 2**20], stride=[0, 0]),
            "has shape",
        ),
        (
            "linear",
            lambda c: c["inputs"]["x"].update(shape=[2**30, 32], stride=[0, 1]),
            "bytes of tensors",
        ),
        ("linear", lambda c: c["inputs"]["x"].update(dtype="F7"), "has dtype F7"),
        ("linear", lambda c: c["inputs"]["x"].update(file="calls.json"), "calls.json"),
        ("linear", lambda c: c["inputs"]["x"].update(storage="no"), "has no storage"),
        ("linear", lambda c: c["inputs"].update(x={"kind": "value", "value": 1}), "x is 1"),
        ("linear", lambda c: c["inputs"].update(y=c["inputs"]["x"]), "takes"),
        ("linear", lambda c: c["inputs"].clear(), "takes"),
        ("attention", lambda c: c["inputs"]["window"].update(shape=[1, 32]), "window_index holds"),
        ("compressor", lambda c: c["inputs"]["step"].update(lengths=[5]), "lengths sum to 5"),
        ("compressor", lambda c: c["inputs"]["step"].update(starts=[2**31 - 1]), None),
        ("index_score", lambda c: c["inputs"]["step"].update(starts=[2**30]), "keys"),
        ("cache_write", lambda c: c["inputs"]["cache"].update(shape=[1, 32]), "slots holds"),
        ("experts", lambda c: c["checks"]["y"].update(verdict="fine"), "check of y"),
        ("experts", lambda c: c["checks"]["y"].update(limit=None), "not a number"),
    ],
)
def test_calls(
    sound: Path, tmp_path: Path, op: str, change: Callable[[Any], None], message: str | None
) -> None:
    path = edited(sound, tmp_path / "b", "calls.json", lambda d: change(site_call(d, op)))
    if message is None:  # odd, but no contradiction
        opened = bundle.open_bundle(path)
        entry = next(entry for entry in opened.calls if entry.site.op == op)
        opened.load(entry)
    else:
        refused(path, message)


def test_changed_bytes_are_found_by_their_hash(sound: Path, tmp_path: Path) -> None:
    path = edited(sound, tmp_path / "b", "manifest.json", lambda m: None)
    file = next((path / "calls").iterdir())
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    refused(path, "sha256 is")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
        lambda path: path.write_text("{}"),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
    ],
)
def test_what_is_no_bundle_at_all(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "b.zip")
    refused(tmp_path / "b.zip", "b.zip")


def test_damaged_bundles_are_survived(tmp_path: Path) -> None:
    """The fuzzer of fuzz_bundle.py, briefly; `python tests/fuzz_bundle.py` runs 20,000 inputs."""
    base = Base(tmp_path)
    fuzz(base, 40)
    assert sum(base.outcomes.values()) >= 35 and base.outcomes["refused"]


# ------------------------------------------------------------------------------ verdicts


def test_a_tie_may_fall_either_way_and_nothing_else(calls: list[bundle.BundleCall]) -> None:
    """The router's sets: a swap within the noise of the scores is fine, a real one is not."""
    call = next(c for c in calls if c.captured.site.op == "gate" and c.site == "L1/ffn/gate")
    captured, truth = call.captured, call.captured.oracle()
    bounds = {name: (check.limit, check.limit_row) for name, check in call.checks.items()}
    scores = truth["scores"] + captured.site.params["bias"].double()
    order = scores.argsort(-1, descending=True)
    k = captured.outputs["experts"].shape[1]
    outputs = {name: value.clone() for name, value in captured.outputs.items()}
    with torch.inference_mode():
        outputs["experts"] = outputs["experts"].clone()
        outputs["experts"][0, -1] = order[0, k]  # the best of those that lost
    judged = bundle.judge(captured, outputs, call.reference, truth, bounds)
    assert judged["experts"].verdict == "over"
    assert judged["experts"].own_error == pytest.approx(1 / len(order))
    gap = float(scores[0, order[0, k - 1]] - scores[0, order[0, k]])
    wide = {**bounds, "scores": (1.0, 1.1 * gap / float(truth["scores"][0].norm()))}
    judged = bundle.judge(captured, outputs, call.reference, truth, wide)
    assert judged["experts"].verdict == judged["routing"].verdict == "ok"
    swapped = {**captured.outputs, "experts": captured.outputs["experts"].flip(-1)}
    swapped["routing"] = captured.outputs["routing"].flip(-1)
    judged = bundle.judge(captured, swapped, call.reference, truth, bounds)
    assert judged["experts"].verdict == judged["routing"].verdict == "ok"


def test_missing_and_misshapen_outputs_are_wrong(calls: list[bundle.BundleCall]) -> None:
    call = next(c for c in calls if c.captured.site.op == "attention")
    truth = call.captured.oracle()
    bounds = {name: (check.limit, check.limit_row) for name, check in call.checks.items()}
    for outputs in ({}, {"o": call.captured.outputs["o"][:1], "lse": call.captured.outputs["lse"]}):
        judged = bundle.judge(call.captured, outputs, call.reference, truth, bounds)
        assert judged["o"].verdict == "over" and judged["o"].own_error == float("inf")


@pytest.mark.parametrize("name", ["b.zip", "b"])
def test_reading_takes_little_more_memory_than_the_files(tmp_path: Path, name: str) -> None:
    x = torch.randn(1, 4_000_000)
    site = Site("L0/attn/norm", spec_of("rms_norm"), {"weight": None, "eps": 1e-6}, 0)
    observer = Capture()
    with torch.inference_mode():
        observer.around(site, (x,))
    call = bundle.examine(observer.calls[0], 0, Limits(torch.float32))
    path = write(tmp_path / name, [call])
    tracemalloc.start()
    try:
        opened = bundle.open_bundle(path)
        opened.verify()
        back = opened.load(opened.calls[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bits_equal(back.captured.inputs["x"], x)
    declared = sum(entry.bytes for entry in opened.files.values())
    assert declared > 32e6 and peak < declared + 8e6
