"""Every layout read back: names, companions and scales against quantisation redone here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, MakeCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.names import Expected, canonical, expected_tensors
from dsv4_bench.engine.shards import INDEX, read_header
from dsv4_bench.engine.synthetic import LAYOUTS, make_tensor, transformers_name

EXPERT_FORMAT = {
    "nvfp4": "nvfp4",
    "nvfp4-dense": "nvfp4",
    "deepseek": "mxfp4",
    "compressed-tensors": "nvfp4",
    "bf16": "dense",
    "transformers": "dense",
}
LINEARS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3")  # quantised when not experts


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> Path:
    """Load all tensors of a (small) checkpoint, change them, write them back as one file."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    tensors = change(tensors) or tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


# ------------------------------------------------------------------------------ quantise-dequantise


def e2m1_grid() -> Tensor:
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    return torch.cat((-half.flip(0), half))


def nearest(value: Tensor, grid: Tensor) -> Tensor:
    """To the nearest of `grid`; of two equally near ones the larger (callers avoid ties)."""
    return grid[(value[..., None] - grid).abs().argmin(-1)]


def expected_value(item: Expected, value: Tensor, form: str) -> Tensor:
    """float64 [n, k]: what a reader must get, from the recipe of each format alone."""
    n, k = item.shape
    v = value.double()
    if form == "dense":
        return value.bfloat16().double()
    if form == "fp8_block":
        out = torch.zeros_like(v)
        for r in range(0, n, 128):
            for c in range(0, k, 128):
                block = v[r : r + 128, c : c + 128]
                scale = 2.0 ** math.ceil(math.log2(max(float(block.abs().max()), 1e-4) / 448))
                rounded = (block / scale).float().to(torch.float8_e4m3fn).double()
                out[r : r + 128, c : c + 128] = rounded * scale
        return out
    if form == "mxfp4":
        blocks = v.view(n, k // 32, 32)
        amax = blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
        scale = 2.0 ** torch.ceil(torch.log2(amax / 6))
        return (nearest(blocks / scale, e2m1_grid()) * scale).view(n, k)
    g = v.abs().max() / 2688
    blocks = v.view(n, k // 16, 16)
    scale = blocks.abs().amax(-1, keepdim=True) / (6 * g)
    scale = torch.where(scale == 0, 1.0, scale.clamp(2.0**-9, 448))
    scale = scale.float().to(torch.float8_e4m3fn).double()
    return (nearest((blocks / (scale * g)).clamp(-6, 6), e2m1_grid()) * scale * g).view(n, k)


def form_of(name: str, layout: str) -> str:
    if ".ffn.experts." in name:
        return EXPERT_FORMAT[layout]
    leaf = name.rsplit(".", 1)[-1]
    if leaf not in LINEARS or ".compressor." in name or layout in ("bf16", "transformers"):
        return "dense"
    if layout == "nvfp4-dense":
        return "dense" if leaf == "wo_a" else "nvfp4"
    return "fp8_block"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_every_layout(make_checkpoint: MakeCheckpoint, layout: str) -> None:
    checkpoint = Checkpoint(make_checkpoint(layout))
    assert checkpoint.problems == []
    assert checkpoint.extra == []
    assert checkpoint.config == SMALL
    for item in expected_tensors(SMALL):
        value = make_tensor(SMALL, item, seed=0)
        if item.kind == "ids":
            assert torch.equal(checkpoint.tensor(item.name), value)
        elif item.kind == "plain":
            norm = item.name.endswith("norm.weight")
            assert torch.equal(checkpoint.tensor(item.name), value.bfloat16() if norm else value)
        else:
            form = form_of(item.name, layout)
            weight = checkpoint.weight(item.name)
            assert (weight.format, weight.shape) == (form, item.shape), item.name
            wanted = expected_value(item, value, form)
            # Values that are float32 products; rare near-ties may round to the other neighbour.
            off = (weight.dequantize().double() - wanted).abs() > 1e-6 * wanted.abs()
            share = float(off.double().mean())
            assert share <= (2e-4 if form == "nvfp4" else 0), (item.name, share)


@pytest.mark.parametrize("layout", ["nvfp4", "compressed-tensors"])
def test_gate_and_up_have_global_scales_of_their_own(
    make_checkpoint: MakeCheckpoint, layout: str
) -> None:
    checkpoint = Checkpoint(make_checkpoint(layout))
    for layer in range(SMALL.num_hidden_layers):
        for number in range(SMALL.n_routed_experts):
            expert = checkpoint.expert(layer, number)
            for leaf, weight in zip(("w1", "w3"), (expert.w1, expert.w3), strict=True):
                name = f"layers.{layer}.ffn.experts.{number}.{leaf}"
                item = Expected(name, weight.shape, "matrix")
                peak = float(make_tensor(SMALL, item, 0).abs().max())
                # exact, but for the rounding of the stored reciprocal
                exact = float(torch.tensor(peak / 2688))
                tolerance = 0 if layout == "nvfp4" else 2**-23
                assert weight.global_scale == pytest.approx(exact, rel=tolerance, abs=0)
            assert expert.w1.global_scale != expert.w3.global_scale


def test_compressed_tensors_store_reciprocals_of_shape_1(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("compressed-tensors")
    name = "layers.1.ffn.experts.3.w2"
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        for key in ("weight_global_scale", "input_global_scale"):
            assert stored.get_slice(f"{name}.{key}").get_shape() == [1]
        reciprocal = float(stored.get_tensor(f"{name}.weight_global_scale"))
        inputs = float(stored.get_tensor(f"{name}.input_global_scale"))
    weight = Checkpoint(folder).weight(name)
    assert reciprocal > 100
    assert weight.global_scale == pytest.approx(1 / reciprocal, rel=1e-7)
    assert weight.input_scale == pytest.approx(1 / inputs, rel=1e-7)
    plain = Checkpoint(make_checkpoint("nvfp4")).weight(name)
    assert weight.global_scale == pytest.approx(plain.global_scale, rel=1e-6)


# ------------------------------------------------------------------------------ spellings


def same_weights(a: Checkpoint, b: Checkpoint, exact: bool = True) -> None:
    assert a.problems == b.problems == []
    assert set(a.matrices) == set(b.matrices)
    for name in a.matrices:
        left, right = a.weight(name).dequantize(), b.weight(name).dequantize()
        if exact:
            assert torch.equal(left, right), name
        else:
            torch.testing.assert_close(left, right, rtol=1e-6, atol=0)
    for name in a.plain:
        assert torch.equal(a.tensor(name), b.tensor(name)), name


def test_e8m0_scales_stored_as_bytes(
    make_checkpoint: MakeCheckpoint, editable: MakeCheckpoint
) -> None:
    def as_bytes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            k: v.view(torch.uint8) if v.dtype == torch.float8_e8m0fnu else v
            for k, v in tensors.items()
        }

    changed = Checkpoint(rewrite(editable("deepseek"), as_bytes))
    assert changed.matrices["layers.0.ffn.experts.0.w1"].roles["scale"].dtype == "U8"
    scale = changed.weight("layers.0.ffn.experts.0.w1").scale
    assert scale is not None
    assert scale.dtype == torch.float8_e8m0fnu  # what kernels and checks for NaN go by
    same_weights(Checkpoint(make_checkpoint("deepseek")), changed)


def test_float32_block_scales_and_the_weight_scale_inv_spelling(
    make_checkpoint: MakeCheckpoint, editable: MakeCheckpoint
) -> None:
    """FP8 scales renamed as transformers' quantiser does, in float32, all below `model.`."""

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key, value in tensors.items():
            if key.endswith(".scale"):
                key, value = key.replace(".scale", ".weight_scale_inv"), value.float()
            out[f"model.{key}"] = value
        return out

    changed = Checkpoint(rewrite(editable("nvfp4"), rename))
    wq_a = changed.matrices["layers.0.attn.wq_a"].roles["scale"]
    assert (wq_a.key, wq_a.dtype) == ("model.layers.0.attn.wq_a.weight_scale_inv", "F32")
    same_weights(Checkpoint(make_checkpoint("nvfp4")), changed)


def test_transformers_names_with_companions(
    make_checkpoint: MakeCheckpoint, editable: MakeCheckpoint
) -> None:
    """The NVFP4 set under transformers' names, experts one by one (not stacked)."""

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        suffixes = (".weight_scale_2", ".weight_scale", ".input_scale", ".scale")
        out = {}
        for key, value in tensors.items():
            suffix = next((s for s in suffixes if key.endswith(s) and "hc_" not in key), "")
            stem = transformers_name(key.removesuffix(suffix) + (".weight" if suffix else ""))
            out[stem.removesuffix(".weight") + suffix if suffix else stem] = value
        assert "model.layers.1.mlp.experts.0.gate_proj.weight_scale_2" in out
        assert "model.layers.1.self_attn.compressor.indexer.q_b_proj.scale" in out
        return out

    same_weights(
        Checkpoint(make_checkpoint("nvfp4")), Checkpoint(rewrite(editable("nvfp4"), rename))
    )


def test_stacked_experts(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("transformers")
    stacked, flat = Checkpoint(folder), Checkpoint(make_checkpoint("bf16"))
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        shape = stored.get_slice("model.layers.2.mlp.experts.gate_up_proj").get_shape()
        gate_up = stored.get_tensor("model.layers.2.mlp.experts.gate_up_proj")
    assert shape == [8, 2 * 64, 128]
    assert torch.equal(stacked.expert(2, 5).w1.data, gate_up[5, :64])  # gate first
    same_weights(flat, stacked)


def test_transformers_loads_the_transformers_layout(make_checkpoint: MakeCheckpoint) -> None:
    """The names are transformers' own: its loader finds every tensor, and the same values."""
    from transformers import DeepseekV4ForCausalLM

    folder = make_checkpoint("transformers")
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    checkpoint = Checkpoint(folder)
    state = model.state_dict()
    for name in checkpoint.matrices:
        if ".ffn.experts." not in name:
            wanted = checkpoint.weight(name).dequantize()
            assert torch.equal(state[transformers_name(f"{name}.weight")].float(), wanted), name
    for name in checkpoint.plain:
        assert torch.equal(state[transformers_name(name)].float(), checkpoint.tensor(name).float())


def test_canonical_names_are_fixed_points_and_inverses() -> None:
    config = replace(SMALL, num_hash_layers=2)
    for item in expected_tensors(config):
        name = item.name if item.kind != "matrix" else f"{item.name}.weight"
        assert canonical(name) == name
        assert canonical(f"model.{name}") == name
        assert canonical(transformers_name(name)) == name, transformers_name(name)


# ------------------------------------------------------------------------------ unusual but fine


def test_wo_a_without_a_scale_is_used_as_stored(editable: MakeCheckpoint) -> None:
    stored: dict[str, Tensor] = {}

    def drop(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            del tensors[f"layers.{layer}.attn.wo_a.scale"]
        stored["data"] = tensors["layers.0.attn.wo_a.weight"]

    checkpoint = Checkpoint(rewrite(editable("nvfp4"), drop))
    assert checkpoint.problems == []
    assert any("wo_a" in note and "2 layers" in note for note in checkpoint.notes)
    got = checkpoint.weight("layers.0.attn.wo_a").dequantize()
    assert torch.equal(got, stored["data"].float())


def test_only_wo_a_may_lack_its_scale(editable: MakeCheckpoint) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["layers.0.attn.wo_b.scale"]

    checkpoint = Checkpoint(rewrite(editable("nvfp4"), drop))
    assert len(checkpoint.problems) == 1
    assert "layers.0.attn.wo_b.scale" in checkpoint.problems[0]


def test_wo_a_outside_the_nvfp4_set_is_noted(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint(make_checkpoint("nvfp4-dense"))
    assert checkpoint.weight("layers.0.attn.wo_a").format == "dense"
    assert any("wo_a is not in the NVFP4 set" in note for note in checkpoint.notes)


def test_mtp_tensors_are_ignored(editable: MakeCheckpoint) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.0.e_proj.weight"] = torch.zeros(4, 4)
        tensors["mtp.0.ffn.experts.0.w1.weight"] = torch.zeros(4, 2, dtype=torch.int8)
        tensors["vision.patch"] = torch.zeros(3)

    checkpoint = Checkpoint(rewrite(editable(), add))
    assert checkpoint.problems == []
    assert sorted(i.key for i in checkpoint.mtp) == [
        "mtp.0.e_proj.weight",
        "mtp.0.ffn.experts.0.w1.weight",
    ]
    assert [i.key for i in checkpoint.extra] == ["vision.patch"]


def split(folder: Path, parts: int) -> Path:
    """The same checkpoint in several shards with an index."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {k: v for i, (k, v) in enumerate(tensors.items()) if i % parts == part}
        save_file(mine, folder / name)
        weight_map.update(dict.fromkeys(mine, name))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_several_shards_with_and_without_an_index(
    make_checkpoint: MakeCheckpoint, editable: MakeCheckpoint
) -> None:
    folder = split(editable(), 3)
    whole = Checkpoint(make_checkpoint())
    same_weights(whole, Checkpoint(folder))
    (folder / INDEX).unlink()
    without = Checkpoint(folder)
    same_weights(whole, without)
    assert any(INDEX in note for note in without.notes)


def test_the_index_decides_between_two_copies(editable: MakeCheckpoint) -> None:
    """A stale file beside the shards is not read when the index does not name it."""
    folder = split(editable(), 2)
    save_file({"norm.weight": torch.zeros(SMALL.hidden_size)}, folder / "consolidated.safetensors")
    assert bool(Checkpoint(folder).tensor("norm.weight").any())


def test_mapped_tensors_equal_what_safetensors_reads(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("compressed-tensors")
    shards = Checkpoint(folder).shards
    (file,) = folder.glob("*.safetensors")
    for key, value in load_file(file).items():
        got = shards.read(key)
        assert (got.dtype, got.shape) == (value.dtype, value.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_an_unaligned_file_is_read_all_the_same(tmp_path: Path) -> None:
    """The format does not promise alignment; a byte tensor first shifts all others."""
    big = torch.arange(40_000, dtype=torch.float32)
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [200, 200], "data_offsets": [3, 160_003]},
        "c": {"dtype": "F4", "shape": [1, 4], "data_offsets": [160_003, 160_005]},
    }
    raw = json.dumps(header).encode()
    data = b"\1\2\3" + big.numpy().tobytes() + b"\x21\x43"
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert [i.nbytes for i in read_header(path)] == [3, 160_000, 2]
    from dsv4_bench.engine.shards import Shards

    shards = Shards(tmp_path)
    assert torch.equal(shards.read("b"), big.view(200, 200))
    assert shards.read("b").data_ptr() % 4 == 0
    assert shards.read("a").tolist() == [1, 2, 3]
    assert shards.read("c").view(torch.uint8).tolist() == [[0x21, 0x43]]


def test_opening_reads_no_weights(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4_bench.engine.shards import Shards

    def fail(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Shards, "read", fail)
    monkeypatch.setattr(Shards, "read_bytes", fail)
    checkpoint = Checkpoint(make_checkpoint())
    assert len(checkpoint.experts(0)) == SMALL.n_routed_experts
