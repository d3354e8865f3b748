"""generate --probes: alarms of every pass, on the CPU op by op, on a GPU in the decode graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import MakeCheckpoint

from dsv4_bench.engine import cuda
from dsv4_bench.workbench.cli import main

PROBES = "stats,nonfinite,load,index"
BAD = """
import torch
from dsv4_bench.engine.registry import implementation, reference

@implementation(op="rms_norm", name="spoilt")
def spoilt(x, *, weight, eps):
    y = reference("rms_norm")(x, weight=weight, eps=eps)
    return y.index_fill(-1, torch.tensor([3], device=y.device), float("nan"))
"""
sm90 = pytest.mark.skipif(
    cuda.library._device_reason() is not None, reason=str(cuda.library._device_reason())
)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, sm90])]


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps([5, 6, 7, 8]))
    return str(file)


@pytest.mark.parametrize("device", DEVICES)
def test_every_pass_is_watched(
    make_checkpoint: MakeCheckpoint, tokens: str, capfd: pytest.CaptureFixture[str], device: str
) -> None:
    arguments = [str(make_checkpoint("nvfp4")), "--tokens", tokens, "--max-new-tokens", "3"]
    arguments += ["--device", device, "--json"]
    assert main(["generate", *arguments, "--probes", "none"]) == 0
    plain = json.loads(capfd.readouterr().out)
    assert main(["generate", *arguments, "--probes", PROBES]) == 0
    captured = capfd.readouterr()
    watched = json.loads(captured.out)
    assert "probes" not in plain and watched["tokens"] == plain["tokens"]
    found = watched["probes"]
    assert found["alarms"] == [] and found["missed_steps"] == 0
    assert found["readings"] > 3 * 500  # three passes
    graph = "decoding from a CUDA graph" in watched["notes"]
    assert graph == (device == "cuda") == ("not in a CUDA graph: index" in captured.err)


@pytest.mark.parametrize("device", DEVICES)
def test_alarms_are_said_before_the_run_ends(
    make_checkpoint: MakeCheckpoint,
    tokens: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    device: str,
) -> None:
    plugin = tmp_path / "spoilt.py"
    plugin.write_text(BAD)
    arguments = [str(make_checkpoint("nvfp4")), "--tokens", tokens, "--plugin", str(plugin)]
    arguments += ["--route", "kernel", "--route", "L1/ffn/norm=spoilt", "--device", device]
    assert main(["generate", *arguments, "--probes", "stats,nonfinite"]) == 5
    lines = capfd.readouterr().err.splitlines()
    alarms = [line for line in lines if line.startswith("alarm: pass 0 ")]
    assert alarms[0].startswith("alarm: pass 0 L1/ffn/norm y: stats.nan 4")
    assert "nonfinite.first_nonfinite [0.0, 3.0]" in alarms[1]
    assert any(line.startswith("alarm: ") and line.endswith(" more in this pass") for line in lines)


@pytest.mark.gpu
@sm90
def test_a_step_that_no_graph_can_hold_is_watched_op_by_op(
    make_checkpoint: MakeCheckpoint, tokens: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plugin = tmp_path / "waits.py"
    plugin.write_text(BAD.replace("    return y.index_fill", "    float(y.sum())\n    return y #"))
    arguments = [str(make_checkpoint("nvfp4")), "--tokens", tokens, "--plugin", str(plugin)]
    arguments += ["--route", "kernel", "--route", "L1/ffn/norm=spoilt", "--device", "cuda"]
    arguments += ["--probes", "stats", "--max-new-tokens", "4", "--json"]
    assert main(["generate", *arguments]) == 0
    found = json.loads(capfd.readouterr().out)
    assert any("without a CUDA graph" in note for note in found["notes"])
    assert found["probes"]["missed_steps"] == 1
    assert found["probes"]["readings"] > 3 * 500


def test_unknown_probes_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "note", "--probes", "stat"]) == 2
    assert "did you mean 'stats'" in capfd.readouterr().err
