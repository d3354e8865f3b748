"""Damaged checkpoints: one message with the values and a hint, exit code 4, nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCheckpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import BadCheckpoint
from dsv4_bench.engine.shards import INDEX, read_header
from dsv4_bench.workbench.cli import main


def shard(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def open_all(folder: Path) -> None:
    """Open the checkpoint and every weight in it, as the engine would."""
    checkpoint = Checkpoint(folder)
    checkpoint.require_complete()
    for name in checkpoint.matrices:
        checkpoint.weight(name)
    for name in checkpoint.plain:
        checkpoint.tensor(name)


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*"))}


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The engine and the CLI refuse `folder`, naming `words`; returns the message."""
    before = listing(folder)
    with pytest.raises(BadCheckpoint) as caught:
        open_all(folder)
    message = caught.value.message
    assert all(word in message for word in words), message
    assert caught.value.hint, message
    capsys.readouterr()
    assert main(["inspect", str(folder), "--all"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("dsv4-bench: error: ")
    assert "\nhint: " in error
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    assert listing(folder) == before, "something was written"
    return message


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 1000, -1, -4096, 0.5])
def test_a_truncated_shard(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], keep: float
) -> None:
    folder = editable()
    file = shard(folder)
    size = file.stat().st_size
    length = int(size * keep) if 0 < keep < 1 else int(keep) % size
    os.truncate(file, length)
    refused(folder, capsys, file.name, str(length))


def test_trailing_data(editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = editable()
    with shard(folder).open("ab") as file:
        file.write(b"\0")
    refused(folder, capsys, str(shard(folder).stat().st_size))


@pytest.mark.parametrize("change", ["-1", "-100", "+8", "+1000", "zero", "huge", "2^63"])
def test_a_header_length_that_lies(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    folder = editable()
    file = shard(folder)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    special = {"zero": 0, "huge": 99_000_000, "2^63": 2**63 + 5}
    wrong = special[change] if change in special else length + int(change)
    file.write_bytes(wrong.to_bytes(8, "little") + data[8:])
    refused(folder, capsys, file.name)


@pytest.mark.parametrize("text", [b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 50_000, b"{}x"])
def test_a_header_that_is_no_json_object(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    folder = editable()
    shard(folder).write_bytes(len(text).to_bytes(8, "little") + text)
    refused(folder, capsys, shard(folder).name, "header is")


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of the only shard; the data stays."""
    file = shard(folder)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


KEY = "layers.0.attn.wkv.weight"


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [-8, 0]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": "ab"},
        {"data_offsets": [0, 1e18]},
        {"data_offsets": [0, True]},
        {"shape": [-128, -128]},
        {"shape": ["128", 128]},
        {"shape": {}},
        {"shape": [2**62, 2**62]},
        {"shape": [1] * 9},
        {"shape": None},
        {"dtype": "F8_E9M9"},
        {"dtype": ["F32"]},
        {"dtype": None},
    ],
)
def test_a_header_entry_that_is_wrong(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], entry: dict[str, Any]
) -> None:
    folder = editable()
    edit_header(folder, lambda header: header[KEY].update(entry))
    refused(folder, capsys, KEY)


@pytest.mark.parametrize("entry", [None, 3, [], "x", {}])
def test_a_header_entry_of_another_type(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], entry: Any
) -> None:
    folder = editable()
    edit_header(folder, lambda header: header.update({KEY: entry}))
    refused(folder, capsys, KEY)


def test_offsets_beyond_the_file(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = editable()

    def far(header: dict[str, Any]) -> None:
        start, stop = header[KEY]["data_offsets"]
        header[KEY]["data_offsets"] = [start + 10**12, stop + 10**12]

    edit_header(folder, far)
    refused(folder, capsys, shard(folder).name, "gap")


def test_offsets_that_overlap(editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = editable()

    def overlap(header: dict[str, Any]) -> None:
        start, stop = header[KEY]["data_offsets"]
        header[KEY]["data_offsets"] = [start - 8, stop - 8]

    edit_header(folder, overlap)
    refused(folder, capsys, shard(folder).name, KEY, "overlaps")


# ------------------------------------------------------------------------------ index and folder


def index(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / INDEX).read_text()))


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shards(editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = editable()
    write_index(folder, {**index(folder)["weight_map"], "x": "model-00002-of-00002.safetensors"})
    refused(folder, capsys, "1 of 2 shards", "model-00002-of-00002.safetensors")


def test_missing_index_and_shards(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = editable()
    (folder / INDEX).unlink()
    shard(folder).rename(folder / "model-00001-of-00046.safetensors")
    refused(folder, capsys, INDEX, "45 of 46")


def test_no_weights_at_all(editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = editable()
    shard(folder).unlink()
    (folder / INDEX).unlink()
    refused(folder, capsys, "no *.safetensors")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""]
)
def test_an_index_that_leaves_the_folder(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = editable()
    (folder.parent / "secret.safetensors").write_bytes(shard(folder).read_bytes())
    write_index(folder, {**index(folder)["weight_map"], "norm.weight": name})
    refused(folder, capsys, "outside the folder")


def test_a_key_of_the_index_that_no_shard_has(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = editable()
    name = shard(folder).name
    write_index(folder, {**index(folder)["weight_map"], "layers.77.ghost": name})
    refused(folder, capsys, "1 tensors", "layers.77.ghost")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"x": 1}']
)
def test_an_index_that_is_none(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    folder = editable()
    (folder / INDEX).write_text(text)
    refused(folder, capsys, INDEX)


def test_the_same_tensor_in_two_files(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = editable()
    (folder / INDEX).unlink()
    save_file({"norm.weight": torch.zeros(128)}, folder / "more.safetensors")
    message = "norm.weight"
    with pytest.raises(BadCheckpoint, match=message):
        open_all(folder)
    assert main(["inspect", str(folder)]) == 4


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "3", '{"hidden_size": "128"}', '{"model_type": "llama"}']
)
def test_config_json(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    folder = editable()
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text)
    refused(folder, capsys, "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", -1),
        ("hidden_size", 0),
        ("hidden_size", 10**18),
        ("n_routed_experts", 10**18),
        ("n_routed_experts", 10**8),
        ("vocab_size", "300"),
        ("compress_ratios", [0, 4]),
        ("num_attention_heads", 4.5),
    ],
)
def test_absurd_values_in_config_json(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    folder = editable()
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, name: value}))
    refused(folder, capsys, name)


@pytest.mark.parametrize("argument", ["missing", "config.json"])
def test_a_folder_that_is_not_there(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    folder = editable()
    assert main(["inspect", str(folder / argument)]) == 4
    error = capsys.readouterr().err
    assert argument in error
    assert "hint:" in error


# ------------------------------------------------------------------------------ tensors


def damage(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    file = shard(folder)
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    (folder / INDEX).unlink(missing_ok=True)
    return folder


W1 = "layers.2.ffn.experts.3.w1"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (f"{W1}.weight", None, ["missing", W1]),
        (f"{W1}.weight_scale", None, ["missing", W1, "weight_scale"]),
        (f"{W1}.weight_scale_2", None, ["missing", W1, "weight_scale_2"]),
        (KEY, None, ["missing", "layers.0.attn.wkv.weight"]),
        ("norm.weight", None, ["missing", "norm.weight", "[128]"]),
        ("layers.0.ffn.gate.tid2eid", None, ["missing", "tid2eid"]),
        (f"{W1}.weight", torch.zeros(64, 63, dtype=torch.uint8), ["[64, 63]", "[64, 64]"]),
        (f"{W1}.weight", torch.zeros(64, 128, dtype=torch.uint8), ["[64, 128]", "[64, 64]"]),
        (f"{W1}.weight_scale", torch.zeros(8, 64).to(torch.float8_e4m3fn), ["[8, 64]", "[64, 8]"]),
        (f"{W1}.weight_scale", torch.zeros(64, 8), ["F32", W1]),
        (f"{W1}.weight_scale_2", torch.ones(64), ["weight_scale_2", "[64]"]),
        (f"{W1}.weight", torch.zeros(64, 64, dtype=torch.int64), ["I64", W1]),
        (KEY, torch.zeros(128, 128, dtype=torch.float64), ["F64", KEY]),
        ("norm.weight", torch.zeros(128, dtype=torch.int8), ["I8", "norm.weight"]),
        ("norm.weight", torch.zeros(127), ["[127]", "[128]"]),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(300, 2), ["F32", "tid2eid"]),
        ("embed.weight", torch.zeros(300, 128, dtype=torch.uint8), ["embed"]),
        ("layers.0.attn.wkv.scale", torch.ones(2, 2), ["[2, 2]", "[1, 1]"]),
    ],
)
def test_missing_mis_shaped_and_mistyped_tensors(
    editable: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: Tensor | None,
    words: list[str],
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(key)
        if value is not None:
            tensors[key] = value

    refused(damage(editable(), change), capsys, *words)


def test_everything_wrong_comes_in_one_message(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["norm.weight"]
        del tensors[f"{W1}.weight"]
        tensors["head.weight"] = torch.zeros(3, 3)

    folder = damage(editable(), change)
    with pytest.raises(BadCheckpoint) as caught:
        Checkpoint(folder).require_complete()
    assert "3 problems" in caught.value.message
    assert all(word in caught.value.message for word in ("norm.weight", W1, "[3, 3]"))
    assert main(["inspect", str(folder), "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert len(document["problems"]) == 3
    # The companions of the lost weight belong to nothing now.
    assert f"{W1}.weight_scale" in document["extra"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("layout", ["nvfp4", "compressed-tensors"])
def test_global_scales_that_cannot_be(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str], layout: str, value: float
) -> None:
    name = "weight_scale_2" if layout == "nvfp4" else "weight_global_scale"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{W1}.{name}"] = torch.full_like(tensors[f"{W1}.{name}"], value)

    refused(damage(editable(layout), change), capsys, f"{W1}.{name}", str(value))


@pytest.mark.parametrize(
    ("layout", "key", "byte"),
    [
        ("nvfp4", f"{W1}.weight_scale", 0x7F),
        ("nvfp4", f"{W1}.weight_scale", 0xFF),
        ("nvfp4", f"{W1}.weight_scale", 0x81),
        ("deepseek", f"{W1}.scale", 0xFF),
        ("nvfp4", "layers.0.attn.wq_b.scale", 0xFF),
    ],
)
def test_block_scales_that_cannot_be_have_coordinates(
    editable: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    key: str,
    byte: int,
) -> None:
    where: dict[str, str] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        row, column = tensors[key].shape[0] - 1, tensors[key].shape[1] // 2
        tensors[key].view(torch.uint8)[row, column] = byte
        where["text"] = f"{key} [{row}, {column}] is "

    folder = damage(editable(layout), change)
    value = "-0.00195" if byte == 0x81 else "nan"
    refused(folder, capsys, where["text"] + value)


def test_an_e8m0_nan_stored_as_a_byte(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        scale = tensors[f"{W1}.scale"].view(torch.uint8)
        scale[5, 1] = 255
        tensors[f"{W1}.scale"] = scale

    refused(damage(editable("deepseek"), change), capsys, f"{W1}.scale [5, 1] is nan")


def test_float32_block_scales_that_cannot_be(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.attn.wq_b.scale"] = -torch.ones(4, 1)

    refused(damage(editable(), change), capsys, "layers.0.attn.wq_b.scale [0, 0] is -1.0")


def test_an_expert_id_that_is_no_expert(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.ffn.gate.tid2eid"][7, 1] = 8

    folder = damage(editable(), change)
    assert main(["inspect", str(folder)]) == 4
    assert "tid2eid [7, 1] is 8, the model has 8 experts" in capsys.readouterr().err


def test_a_shard_that_changes_while_open(editable: MakeCheckpoint) -> None:
    folder = editable()
    checkpoint = Checkpoint(folder)
    os.truncate(shard(folder), 1000)
    for name in ("attn.wkv", "ffn.experts.0.w1"):
        with pytest.raises(BadCheckpoint) as caught:
            checkpoint.weight(f"layers.0.{name}")
        assert "cut while in use" in caught.value.hint


# ------------------------------------------------------------------------------ fuzzing

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "F4", "BF16", "X"]) | _VALUES,
        "shape": st.lists(st.integers(-2, 6), max_size=3) | _VALUES,
        "data_offsets": st.tuples(st.integers(-4, 64), st.integers(-4, 64)) | _VALUES,
    },
)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(st.text(max_size=6), _ENTRIES | _VALUES, max_size=4) | _VALUES,
    data=st.binary(max_size=64),
    off_by=st.sampled_from([0, 0, 0, 1, -1, 8, 2**40]),
)
@example(header={}, data=b"", off_by=0)
@example(header={"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, data=b"xy", off_by=0)
def test_any_header_is_read_or_refused(
    tmp_path: Path, header: Any, data: bytes, off_by: int
) -> None:
    raw = json.dumps(header).encode()
    length = max(0, len(raw) + off_by)
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + raw + data)
    check_header(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data)
    check_header(path)


def check_header(path: Path) -> None:
    try:
        infos = read_header(path)
    except BadCheckpoint as error:
        assert path.name in error.message
        return
    size = path.stat().st_size
    assert sum(info.nbytes for info in infos) <= size - 8
    assert all(8 <= info.start <= info.start + info.nbytes <= size for info in infos)
