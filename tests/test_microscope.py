"""The microscope against numbers counted by hand, brute force, and originals that are known."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import MakeCheckpoint
from safetensors.torch import load_file, save_file

from dsv4_bench.engine.block_census import take_block_census
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.formats import (
    E2M1_VALUES,
    Weight,
    float_to_e8m0,
    pack_e2m1,
    quantize_fp8_block,
    quantize_mxfp4,
    quantize_nvfp4,
)
from dsv4_bench.engine.microscope import examine, gate_up, measured_noise
from dsv4_bench.workbench.cli import main


def e4m3(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values).to(torch.float8_e4m3fn)


def nvfp4(values: torch.Tensor, scales: torch.Tensor, **fields: float) -> Weight:
    """A weight of these e2m1 values [n, k] and block scales [n, k/16]."""
    return Weight("w", "nvfp4", pack_e2m1(values), scales, **fields)


def test_counted_by_hand():
    """Two rows of two blocks: 6s and zeros; nothing above 3; zeros alone; under a scale of 0."""
    values = torch.zeros(2, 32)
    values[0, :16] = torch.tensor([6.0, -6.0] + [0.0] * 4 + [0.5] * 10)
    values[0, 16:] = 3.0
    values[1, 16:] = 1.0
    seen = examine(nvfp4(values, e4m3([[448.0, 2.0**-7], [1.5, 0.0]]), global_scale=0.25))
    assert seen.exponents == {8: 1, -7: 1, 0: 1}  # 448 = 1.75 * 2^8, 1.5 = 1.5 * 2^0
    assert (seen.at_max, seen.subnormal, seen.zero_scales) == (0.25, 0.25, 0.25)
    assert (seen.at_top, seen.zeros) == (2 / 64, 20 / 64)
    assert seen.codes == (20 / 64, 10 / 64, 16 / 64, 0, 0, 16 / 64, 0, 2 / 64)
    assert (seen.zero_blocks, seen.slack) == (0.25, 0.5)  # 3s and 1s do not reach half of the range
    assert (seen.scales, seen.rows, seen.searched, seen.global_scale) == (4, 2, 2, 0.25)


def round_slowly(x: float, scale: float) -> float:
    """The nearest value that e2m1 times `scale` has."""
    return min(
        (sign * v * scale for v in E2M1_VALUES for sign in (1, -1)), key=lambda y: abs(x - y)
    )


def noise_slowly(original: torch.Tensor, scales: list[float]) -> float:
    blocks = original.double().view(-1, 16).tolist()
    pairs = [(x, s) for block, s in zip(blocks, scales, strict=True) for x in block]
    error = sum((x - round_slowly(x, s)) ** 2 for x, s in pairs)
    return error / sum(x * x for x, _ in pairs)


def test_measured_noise_against_brute_force_over_all_scales():
    torch.manual_seed(3)
    original = torch.randn(2, 32)
    data, scale, factor = quantize_nvfp4(original, amax=8.0)
    weight = Weight("w", "nvfp4", data, scale, float(factor))
    actual, best = measured_noise(weight, Weight("w", "dense", original))
    stored = [float(s) * float(factor) for s in scale.float().flatten()]
    assert actual == pytest.approx(noise_slowly(original, stored), rel=1e-5)
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * factor
    found = [
        min(every.tolist(), key=lambda s, b=block: noise_slowly(b, [s]))
        for block in original.view(-1, 16)
    ]
    assert best == pytest.approx(noise_slowly(original, found), rel=1e-5)
    assert best < actual


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_the_estimate_without_the_original_is_near_the_truth(kind: str):
    torch.manual_seed(4)
    original = torch.randn(128, 512)
    if kind == "nvfp4":
        data, scale, factor = quantize_nvfp4(original)
        weight = Weight("w", kind, data, scale, float(factor))
    else:
        weight = Weight("w", kind, *quantize_mxfp4(original))
    actual, best = measured_noise(weight, Weight("w", "dense", original))
    seen = examine(weight)
    assert seen.noise == pytest.approx(actual, rel=0.4)
    assert seen.noise / seen.best_noise == pytest.approx(actual / best, rel=0.1)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_blocks_of_zeros_cost_nothing(kind: str):
    original = torch.zeros(2, 64)
    original[0, :32] = torch.randn(32)
    parts = quantize_nvfp4(original) if kind == "nvfp4" else quantize_mxfp4(original)
    factor = float(parts[2]) if kind == "nvfp4" else 1.0
    weight = Weight("w", kind, parts[0], parts[1], factor)
    actual, best = measured_noise(weight, Weight("w", "dense", original))
    assert 0 < best <= actual < 0.05
    seen = examine(weight)
    assert seen.zero_blocks == 0.75 and 0 < seen.best_noise <= seen.noise


def test_scales_twice_too_large_are_seen():
    torch.manual_seed(5)
    original = torch.randn(64, 256)
    data, scale, factor = quantize_nvfp4(original, amax=16.0)
    good = Weight("w", "nvfp4", data, scale, float(factor))
    double = (scale.float() * 2).to(torch.float8_e4m3fn)
    steps = double.float().repeat_interleave(16, 1) * factor
    coarse = Weight("w", "nvfp4", pack_e2m1(original / steps), double, float(factor))
    assert examine(good).slack < 0.01 and examine(coarse).slack > 0.99
    ratios = {
        name: (lambda seen: seen.noise / seen.best_noise)(examine(weight))
        for name, weight in (("good", good), ("coarse", coarse))
    }
    assert ratios["coarse"] > 1.1 * ratios["good"]


def test_other_formats():
    seen = examine(Weight("w", "fp8_block", *quantize_fp8_block(torch.full((130, 130), 448.0))))
    assert (seen.at_top, seen.noise, seen.exponents) == (1.0, None, {0: 4})
    values, scales = torch.full((1, 64), 6.0), torch.tensor([[2.0**-3, 2.0**5]])
    seen = examine(Weight("w", "mxfp4", pack_e2m1(values), float_to_e8m0(scales)))
    assert seen.exponents == {-3: 1, 5: 1} and seen.at_max is None and seen.at_top == 1.0
    with pytest.raises(ValueError, match="dense"):
        examine(Weight("w", "dense", torch.zeros(2, 2)))


def test_sampling_is_said():
    values = torch.ones(40, 16)
    scales = torch.ones(40, 1).to(torch.float8_e4m3fn)
    seen = examine(nvfp4(values, scales), rows=8, blocks=4)
    assert seen.sampling == "codes of 8 of 40 rows, noise of 4 of 8 blocks"
    assert examine(nvfp4(values, scales)).sampling == ""


def test_gate_up():
    weights = [
        nvfp4(torch.zeros(1, 16), e4m3([[1.0]]), global_scale=g, input_scale=i)
        for g, i in ((0.5, 3.0), (0.25, 4.0))
    ]
    assert gate_up(*weights) == {"global_ratio": 2.0, "input_ratio": 0.75}
    weights[1].input_scale = None
    assert gate_up(*weights)["input_ratio"] is None


# ------------------------------------------------------------------------------ a checkpoint


def test_the_census_and_its_command(make_checkpoint: MakeCheckpoint, capsys, tmp_path: Path):
    folder = make_checkpoint("nvfp4")
    plot = tmp_path / "blocks.svg"
    assert main(["inspect", str(folder), "--microscope", "--json", "--plot", str(plot)]) == 0
    document = json.loads(capsys.readouterr().out)
    experts = {m["name"] for m in document["matrices"] if ".ffn.experts." in m["name"]}
    assert experts == {
        f"layers.{layer}.ffn.experts.{e}.{leaf}"
        for layer, e, leaf in product(range(4), (0, 4, 7), ("w1", "w2", "w3"))
    }
    assert document["experts"] == [0, 4, 7] and document["problems"] == []
    assert document["matched"] > len(document["matrices"])
    assert len(document["pairs"]) == 12
    assert plot.read_text().lstrip().startswith("<?xml")
    assert main(["inspect", str(folder), "--microscope", "*.experts.5.*", "--all"]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 quantised matrices examined; all scales and codes" in out


def test_gate_and_up_with_scales_of_their_own(editable: MakeCheckpoint, capsys):
    folder = editable("nvfp4")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    key = next(
        k
        for k in tensors
        if "layers.1." in k and ".experts.4." in k and "w1" in k and "scale_2" in k
    )
    before = ratios_of(folder)
    tensors[key] = tensors[key] * 100
    save_file(tensors, file)
    after = ratios_of(folder)
    name = "layers.1.ffn.experts.4"
    assert after == {**before, name: pytest.approx(100 * before[name])}
    assert main(["inspect", str(folder), "--microscope", "layers.1.*"]) == 0
    assert f"x in {name}: a fused kernel must not" in capsys.readouterr().out


def ratios_of(folder: Path) -> dict[str, float]:
    return {p.expert: p.global_ratio for p in take_block_census(Checkpoint(folder)).pairs}


def test_against_the_original(make_checkpoint: MakeCheckpoint):
    ours, original = (Checkpoint(make_checkpoint(layout)) for layout in ("nvfp4", "bf16"))
    census = take_block_census(ours, "layers.0.ffn.experts.*", original=original)
    assert len(census.measured) == len(census.matrices) == 9
    assert all(best <= actual < 0.03 for actual, best in census.measured.values())


def test_what_cannot_be_examined(make_checkpoint: MakeCheckpoint, editable: MakeCheckpoint, capsys):
    with pytest.raises(DSV4Error, match=r"no quantised matrix matches 'layers\.9") as error:
        take_block_census(Checkpoint(make_checkpoint("nvfp4")), "layers.9.*")
    assert "layers." in error.value.hint
    assert main(["inspect", str(make_checkpoint("bf16")), "--microscope"]) == 2
    assert "nothing in it is quantised" in capsys.readouterr().err
    assert main(["inspect", str(make_checkpoint("bf16")), "--plot", "x.png"]) == 2
    assert main(["inspect", str(make_checkpoint("nvfp4")), "--microscope", "--plot", "x.gif"]) == 2
    folder = editable("nvfp4")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("experts.0.w1.weight_scale"))
    tensors[key].view(torch.uint8)[3, 1] = 0x7F
    save_file(tensors, file)
    assert main(["inspect", str(folder), "--microscope", "*experts.0.*", "--json"]) == 4
    assert "[3, 1] is nan" in json.loads(capsys.readouterr().out)["problems"][0]
