"""Synthetic checkpoints: the promised values are there, nothing is left half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint, with_ratios
from safetensors.torch import load_file

from dsv4_bench.engine import synthetic
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.names import Expected, expected_tensors
from dsv4_bench.engine.synthetic import LAYOUTS, estimated_bytes, make_tensor, write_checkpoint
from dsv4_bench.workbench.cli import main

ONE = with_ratios(SMALL, 4)


# ------------------------------------------------------------------------------ values


def test_gate_and_up_scales_differ_and_zero_blocks_exist(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint(make_checkpoint("nvfp4", replace(TINY, num_hidden_layers=4)))
    zero = low = top = 0
    for layer in range(4):
        for number in range(TINY.n_routed_experts):
            expert = checkpoint.expert(layer, number)
            ratio = expert.w1.global_scale / expert.w3.global_scale
            assert abs(ratio - 1) > 1e-3, "one scale for both halves would go unnoticed"
            for weight in expert:
                assert weight.scale is not None
                codes = weight.scale.view(torch.uint8)
                blocks = weight.dequantize().view(*codes.shape, 16).abs().amax(-1)
                zero += int((blocks == 0).sum())
                low += int((codes == 1).sum())  # 2^-9
                top += int((codes == 0x7E).sum())  # 448
    assert zero > 100
    assert low > 10
    assert top >= 4 * TINY.n_routed_experts * 3


def test_sinks_have_both_signs() -> None:
    values = [
        make_tensor(TINY, Expected(f"layers.{i}.attn.attn_sink", (4,), "plain"), 0)
        for i in range(16)
    ]
    sinks = torch.cat(values)
    assert float((sinks > 0).float().mean()) > 0.3
    assert float((sinks < 0).float().mean()) > 0.1
    assert float(sinks.abs().max()) > 1.5


@pytest.mark.parametrize("layer", range(4))
def test_mhc_mixing_is_asymmetric(layer: int) -> None:
    """Swapping comb's indices, or the order of pre, post and comb, must change a lot."""
    item = Expected(f"layers.{layer}.hc_attn_base", (24,), "plain")
    comb = make_tensor(TINY, item, 0)[8:].view(4, 4)
    assert float((comb - comb.T).norm() / comb.norm()) > 0.3
    mixing = comb.softmax(-1)
    assert float((mixing - mixing.T).abs().max()) > 0.1
    assert float(mixing.diagonal().mean()) > 0.3  # streams mostly keep themselves


def test_activations_reach_the_clamp(make_checkpoint: MakeCheckpoint) -> None:
    """w1 and w3 have rows that send a normalised input beyond the SwiGLU limit, on both sides."""
    checkpoint = Checkpoint(make_checkpoint("bf16", replace(TINY, num_hidden_layers=1)))
    x = torch.randn(200, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    up = torch.cat([x @ checkpoint.expert(0, e).w3.dequantize().T for e in range(8)])
    gate = torch.cat([x @ checkpoint.expert(0, e).w1.dequantize().T for e in range(8)])
    assert float(gate.max()) > TINY.swiglu_limit
    assert float(gate.min()) < -TINY.swiglu_limit  # must pass unclamped
    assert float(up.max()) > TINY.swiglu_limit
    assert float(up.min()) < -TINY.swiglu_limit
    assert float((gate > TINY.swiglu_limit).float().mean()) < 0.05  # and most do not


def test_hash_tables_name_different_experts() -> None:
    table = make_tensor(TINY, Expected("layers.0.ffn.gate.tid2eid", (512, 2), "ids"), 0)
    assert table.dtype == torch.int64
    assert (int(table.min()), int(table.max())) == (0, 7)
    assert bool((table[:, 0] != table[:, 1]).all())


def test_values_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    """Not on the layout, nor on how many layers there are."""
    items = {i.name: i for i in expected_tensors(TINY)}
    item = items["layers.2.attn.wq_b"]
    assert torch.equal(
        make_tensor(TINY, item, 0), make_tensor(replace(TINY, vocab_size=9), item, 0)
    )
    assert not torch.equal(make_tensor(TINY, item, 0), make_tensor(TINY, item, 1))
    other = items["layers.3.attn.wq_b"]
    assert not torch.equal(make_tensor(TINY, item, 0), make_tensor(TINY, other, 0))


# ------------------------------------------------------------------------------ files


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_named_and_indexed_as_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(synthetic, "_SHARD_BYTES", 200_000)
    folder = write_checkpoint(tmp_path / "out", ONE, layout)
    shards = sorted(folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    wanted = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert [path.name for path in shards] == wanted
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in shards}
    assert index["weight_map"] == {k: name for name, t in stored.items() for k in t}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for tensors in stored.values() for t in tensors.values()
    )
    assert all(
        sum(t.nbytes for t in tensors.values()) <= 200_000 or len(tensors) == 1
        for tensors in stored.values()
    )
    assert Checkpoint(folder).problems == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_estimate_is_close(make_checkpoint: MakeCheckpoint, layout: str) -> None:
    folder = make_checkpoint(layout)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.8 < estimated_bytes(SMALL, layout) / stored < 1.1


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = write_checkpoint(tmp_path / "out", ONE, "bf16")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_the_tokenizer_knows_every_byte(make_checkpoint: MakeCheckpoint) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(make_checkpoint() / "tokenizer.json"))
    text = "Größe 4.4.4.4.\n\x00 \U0001f600"
    ids = tokenizer.encode(text).ids
    assert max(ids) < SMALL.vocab_size
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


# ------------------------------------------------------------------------------ failures


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DSV4Error, match="exists") as caught:
        write_checkpoint(tmp_path / "out", ONE, "nvfp4")
    assert caught.value.exit_code == 2
    assert files(tmp_path) == ["out"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    original, count = make_tensor, 0

    def interrupted(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 20:
            raise stop
        return original(*args)

    monkeypatch.setattr(synthetic, "make_tensor", interrupted)
    monkeypatch.setattr(synthetic, "_SHARD_BYTES", 10_000)
    with pytest.raises(stop):
        write_checkpoint(tmp_path / "out", ONE, "nvfp4")
    assert files(tmp_path) == []


def test_ctrl_c_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dsv4_bench.workbench",
        "make-checkpoint",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen([*command, "--layers", "1000"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "writing tiny" in process.stderr.readline()
    deadline = time.monotonic() + 20
    while not files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert files(tmp_path)  # the scratch folder
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "dsv4-bench: interrupted\n"
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        synthetic.SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(synthetic, "save_file", full)
    with pytest.raises(CannotAnswer, match="No space left") as caught:
        write_checkpoint(tmp_path / "out", ONE, "nvfp4")
    assert "free some disk space" in caught.value.hint
    assert files(tmp_path) == []


def test_too_little_space_is_said_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9})())
    out = tmp_path / "out"
    assert main(["make-checkpoint", str(out), "--preset", "flash"]) == 3
    error = capsys.readouterr().err
    assert "1.0 GB free" in error
    assert "needed" in error
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--layout", "nvfp5"], 2, ["'nvfp5'", "did you mean 'nvfp4'"]),
        (["--preset", "flsh"], 2, ["'flsh'", "did you mean 'flash'?"]),
        (["--layers", "0"], 2, ["--layers 0"]),
        (["--layers", "-3"], 2, ["--layers -3"]),
        (["--layers", "two"], 2, ["'two'"]),
        (["--layers", "1000000"], 2, ["--layers 1000000"]),
    ],
)
def test_make_checkpoint_usage_errors(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: list[str],
) -> None:
    assert main(["make-checkpoint", str(tmp_path / "out"), *arguments]) == code
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert files(tmp_path) == []


def test_make_checkpoint_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    arguments = [
        "make-checkpoint",
        str(out),
        "--layers",
        "2",
        "--layout",
        "deepseek",
        "--seed",
        "5",
    ]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["layers"] == 2
    assert document["files"] == files(out)
    checkpoint = Checkpoint(out)
    assert checkpoint.config.num_hidden_layers == 2
    item = next(
        i for i in expected_tensors(checkpoint.config) if i.name == "layers.1.attn.attn_sink"
    )
    assert torch.equal(checkpoint.tensor(item.name), make_tensor(checkpoint.config, item, 5))


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["make-checkpoint", str(tmp_path / "file" / "out"), "--layers", "1"]) == 3
    assert "hint:" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """The generator of stored tensors holds one matrix at a time; the pending shard is bounded."""
    live: list[int] = []

    class Counting(synthetic._Shards):
        def add(self, name: str, tensor: torch.Tensor) -> None:
            super().add(name, tensor)
            live.append(self._size)

    original = synthetic._Shards
    config = replace(ONE, n_routed_experts=64)
    try:
        synthetic._Shards = Counting  # type: ignore[misc]
        synthetic._SHARD_BYTES = 300_000
        write_checkpoint(tmp_path / "out", config, "nvfp4")
    finally:
        synthetic._Shards = original  # type: ignore[misc]
        synthetic._SHARD_BYTES = 2 << 30
    assert max(live) <= 300_000 < sum(1 for _ in live) * 300_000
