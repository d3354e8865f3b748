"""The census: counts and scale statistics against a direct look, and its cost on 160 GB."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, MakeCheckpoint
from safetensors.torch import load_file
from sparse import flash_tensors, measure, write_sparse_checkpoint

from dsv4_bench.engine import census as census_module
from dsv4_bench.engine.census import Census, e4m3_value, take_census
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import FLASH
from dsv4_bench.engine.synthetic import LAYOUTS
from dsv4_bench.workbench.cli import main


def census_of(folder: Path, **options: Any) -> Census:
    return take_census(Checkpoint(folder), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_and_bytes_add_up(make_checkpoint: MakeCheckpoint, layout: str) -> None:
    folder = make_checkpoint(layout)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    census = census_of(folder)
    assert census.problems == []
    assert census.tensors == len(tensors) == sum(t.tensors for t in census.formats.values())
    total = sum(t.nbytes for t in tensors.values())
    assert census.bytes == total == sum(t.bytes for t in census.formats.values())
    assert sum(role.bytes for role in census.roles) == total
    roles = {role.role: role for role in census.roles}
    assert roles["layers.*.ffn.experts.*.w1"].count == 4 * 8
    assert roles["layers.*.attn.indexer.wq_b"].count == 2
    assert roles["layers.*.attn.compressor.wkv"].shapes == {(256, 128), (128, 128)}
    assert next(iter(roles)) == "embed"


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("nvfp4", "ModelOpt: routed experts NVFP4, other linears FP8 128x128, original"),
        ("nvfp4-dense", "ModelOpt: routed experts NVFP4, other linears NVFP4, original"),
        ("deepseek", "the original release: routed experts MXFP4, other linears FP8 128x128"),
        ("compressed-tensors", "compressed-tensors: routed experts NVFP4"),
        ("bf16", "unquantised: routed experts bf16, other linears bf16, original"),
        (
            "transformers",
            "stacked experts): routed experts bf16, other linears bf16, transformers'",
        ),
    ],
)
def test_layout_in_words(make_checkpoint: MakeCheckpoint, layout: str, words: str) -> None:
    assert words in census_of(make_checkpoint(layout)).layout


def test_scale_ranges_equal_a_direct_look(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("nvfp4")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    rows = {row.where: row for row in census_of(folder).scales}
    assert set(rows) == {f"L{i} {what}" for i in range(4) for what in ("experts", "other")}
    for layer in range(4):
        prefix = f"layers.{layer}.ffn.experts."
        scales = torch.cat(
            [
                t.float().flatten()
                for k, t in tensors.items()
                if k.startswith(prefix) and k.endswith(".weight_scale")
            ]
        )
        row = rows[f"L{layer} experts"]
        assert (row.read, row.total) == (scales.numel(), scales.numel())
        assert (row.minimum, row.maximum) == (float(scales.min()), float(scales.max()))
        assert row.at_max == int((scales == 448).sum()) > 0
        assert row.subnormal == int(((scales > 0) & (scales < 2**-6)).sum()) > 0
        gates = [float(tensors[f"{prefix}{e}.w1.weight_scale_2"]) for e in range(8)]
        ups = [float(tensors[f"{prefix}{e}.w3.weight_scale_2"]) for e in range(8)]
        downs = [float(tensors[f"{prefix}{e}.w2.weight_scale_2"]) for e in range(8)]
        assert row.global_minimum == min(gates + ups + downs)
        assert row.global_maximum == max(gates + ups + downs)
        worst = max(max(g / u, u / g) for g, u in zip(gates, ups, strict=True))
        assert row.gate_up == pytest.approx(worst)
        assert row.gate_up_unequal == 8
        dense = rows[f"L{layer} other"]
        values = torch.cat(
            [
                t.float().flatten()
                for k, t in tensors.items()
                if k.startswith(f"layers.{layer}.") and k.endswith(".scale")
            ]
        )
        assert (dense.minimum, dense.maximum) == (float(values.min()), float(values.max()))
        assert dense.to_dict()["share_at_448"] is None  # e8m0 has no such thing


def test_global_scales_of_both_conventions_agree(make_checkpoint: MakeCheckpoint) -> None:
    ours = {r.where: r for r in census_of(make_checkpoint("nvfp4")).scales}
    theirs = {r.where: r for r in census_of(make_checkpoint("compressed-tensors")).scales}
    for where, row in ours.items():
        if "experts" in where:
            other = theirs[where]
            assert other.global_minimum == pytest.approx(row.global_minimum, rel=1e-6)
            assert other.gate_up == pytest.approx(row.gate_up, rel=1e-6)


def test_a_sample_says_so_and_all_reads_all(
    make_checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(census_module, "_QUICK_BYTES", 0)
    folder = make_checkpoint("nvfp4")
    sampled = census_of(folder).coverage
    assert sampled["experts"] == [0, 4, 7]
    assert 0 < sampled["share"] < 0.5
    assert sampled["block_scales_read"] == sampled["share"] * sampled["block_scales"]
    seen: list[tuple[str, int, int]] = []
    complete = census_of(folder, all_scales=True, progress=lambda *a: seen.append(a)).coverage
    assert complete["experts"] == "all"
    assert complete["share"] == 1.0
    assert seen[-1][1] == seen[-1][2]
    assert main(["inspect", str(folder)]) == 0
    assert "experts 0, 4, 7 of every layer; --all reads the rest" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--all"]) == 0
    assert "block scales: all were read" in capsys.readouterr().out


def test_the_report_caps_long_lists_and_json_does_not(
    editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = editable()
    config = json.loads((folder / "config.json").read_text())
    config.update(num_hidden_layers=5, compress_ratios=[0, 4, 128, 4, 4])
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(folder)]) == 4
    text = capsys.readouterr()
    listed = [line for line in text.out.splitlines() if line.startswith("  missing: ")]
    assert len(listed) == 40
    assert "more (--json lists all)" in text.out
    assert main(["inspect", str(folder), "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    problems = document["problems"]
    assert len(problems) > 40
    assert f"problems ({len(problems)})" in text.out
    assert f"{len(problems)} problems" in text.err
    assert all("layers.4." in problem for problem in problems)


def test_notes(editable: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    folder = editable("nvfp4-dense")
    assert main(["inspect", str(folder)]) == 0
    assert "attn.wo_a is not in the NVFP4 set: used as stored, dense (4 layers)" in (
        capsys.readouterr().out
    )


def test_json_is_strict_and_complete(
    make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(make_checkpoint()), "--json"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out, parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert document["problems"] == document["extra"] == []
    assert document["model"]["attention"] == {"SWA": 1, "CSA": 2, "HCA": 1}
    assert document["coverage"]["share"] == 1.0
    assert {"where", "min", "max", "share_at_448", "gate_up_ratio"} <= set(document["scales"][0])


def test_e4m3_values() -> None:
    wanted = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    assert [e4m3_value(code) for code in range(0x7F)] == wanted


# ------------------------------------------------------------------------------ size


def test_the_flash_tensor_counts_are_the_published_ones() -> None:
    names = [stored.key for stored in flash_tensors(FLASH)]
    main_model = sum(not name.startswith("mtp.") for name in names)
    assert main_model == 133_660  # 67,612 of the release, and 6 more for each of 43 x 256 experts
    total = sum(stored.nbytes for stored in flash_tensors(FLASH))
    assert 164e9 < total < 169e9


def test_a_checkpoint_far_larger_than_the_limits(tmp_path: Path) -> None:
    """Flash at a fifth of its layers: 32 GB in sparse files, 28,000 tensors. tests/sparse.py measures
    the whole of it."""
    config = replace(FLASH, num_hidden_layers=8, compress_ratios=FLASH.compress_ratios[:8])
    size = write_sparse_checkpoint(tmp_path / "sparse", config)
    assert size > 30e9
    on_disk = sum(p.stat().st_blocks * 512 for p in (tmp_path / "sparse").iterdir())
    assert on_disk < 20e6
    result = measure("inspect", tmp_path / "sparse")
    assert result["peak_bytes"] < 1e9
    assert result["seconds"] < 10


def test_sampling_does_not_hide_bad_scales_of_the_sample(tmp_path: Path) -> None:
    """One NaN written into a sparse file is found at its place."""
    config = replace(SMALL, num_hidden_layers=1, compress_ratios=(0,))
    write_sparse_checkpoint(tmp_path / "c", config, mtp=False)
    checkpoint = Checkpoint(tmp_path / "c")
    info = checkpoint.shards.tensors["layers.0.ffn.experts.4.w2.weight_scale"]
    columns = info.shape[1]
    with (tmp_path / "c" / info.file).open("r+b") as file:
        file.seek(info.start + 3 * columns + 1)
        file.write(struct.pack("BB", 0x7F, 0xC0))
    problems = census_of(tmp_path / "c").problems
    assert problems == [f"bad scale: {info.key} [3, 1] is nan (and 1 more in this tensor)"]
    assert Counter(census_of(tmp_path / "c").extra) == Counter()
