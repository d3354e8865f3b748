"""`replay`: captured ops again, from the bundle alone; and the smallest input that is still wrong"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import PLUGIN, capture, micro_model, write
from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS, Function, implementation, reference
from dsv4_bench.probes import bundle
from dsv4_bench.probes.bundle.machine import machine
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.bundles.replaying import Replayer
from dsv4_bench.workbench.bundles.shrinking import shrink


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return micro_model(tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def right(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 on the CPU kernels."""
    calls, _ = capture(model, ["kernel"], lambda site: site.layer == 1)
    return write(tmp_path_factory.mktemp("right") / "b.zip", calls, versions=machine())


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    yield file
    IMPLEMENTATIONS["attention"].pop("bug", None)


@pytest.fixture
def wrong(model: Transformer, plugin: Path, tmp_path: Path) -> Path:
    """attention of layer 1 on a plugin's kernel that is wrong."""
    from dsv4_bench.workbench.loading import load_plugins

    load_plugins([str(plugin)])
    route = ["kernel", "L1/attn/core=bug"]
    calls, _ = capture(model, route, lambda site: site.path.startswith("L1/attn/core"))
    del IMPLEMENTATIONS["attention"]["bug"]
    return write(tmp_path / "wrong.zip", calls, versions=machine())


@pytest.fixture
def replay(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """`replay(*words)`: (code, the JSON document, stderr)."""

    def run(*words: object) -> tuple[int, Any, str]:
        code = cli.main(["replay", *map(str, words), "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if printed.out else None, printed.err

    return run


# ------------------------------------------------------------------------------ verdicts


def test_a_right_bundle_replays_to_the_bit(right: Path, replay: Callable[..., Any]) -> None:
    code, document, _ = replay(right)
    assert code == 0 and document["status"] == "clean" and document["first"] is None
    assert document["other_bits_expected"] == []
    assert len(document["ops"]) > 40
    for op in document["ops"]:
        assert op["reference_bits_equal"] and op["bits_equal"], op["sentence"]
        assert op["ran"] == op["captured"] == "cpu"
    code, document, _ = replay(right, "L1/attn/core", "--route", "reference")
    assert code == 0 and {op["ran"] for op in document["ops"]} == {"reference"}
    assert len(document["ops"]) == 2
    code, document, _ = replay(right, "L1/attn/core", "--forward", 1)
    assert [op["forward"] for op in document["ops"]] == [1]


def test_a_wrong_op_is_reproduced_with_its_plugin(
    wrong: Path, plugin: Path, replay: Callable[..., Any]
) -> None:
    code, document, _ = replay(wrong)  # nobody here has that kernel: no pass
    assert code == 3 and document["status"] == "partial"
    assert all(op["verdict"] == "not run" and "bug" in op["note"] for op in document["ops"])
    code, document, _ = replay(wrong, "--route", "kernel")
    assert code == 0
    assert document["ops"][0]["sentence"].endswith("not reproduced: right here, wrong there")
    code, document, _ = replay(wrong, "--plugin", plugin)
    assert code == 1 and document["first"]["sentence"] == "L1/attn/core: reproduced"
    ours, theirs = (document["first"][key]["o"] for key in ("outputs", "captured_outputs"))
    assert ours == theirs and ours["own_error"] > 1e-3


def test_a_kernel_that_raises_is_no_pass(right: Path, replay: Callable[..., Any]) -> None:
    @implementation(op="attention", name="raises")
    def attention(*args: Any, **params: Any) -> Any:
        raise RuntimeError("no\nway")

    try:
        code, document, _ = replay(right, "L1/attn/core", "--route", "L1/attn/core=raises")
    finally:
        del IMPLEMENTATIONS["attention"]["raises"]
    assert code == 3 and document["ops"][0]["note"] == "RuntimeError: no way"


def test_another_machine_is_named(right: Path, tmp_path: Path, replay: Callable[..., Any]) -> None:
    folder = tmp_path / "b"
    shutil.unpack_archive(right, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, document, _ = replay(folder, "L1/attn/norm")
    assert code == 0
    assert document["other_bits_expected"] == [f"torch {torch.__version__} here, 1.0 there"]


def test_nothing_in_a_bundle_is_executed(
    right: Path, tmp_path: Path, replay: Callable[..., Any]
) -> None:
    folder, mark = tmp_path / "b", tmp_path / "ran"
    shutil.unpack_archive(right, folder)
    for name in ("replay.py", "conftest.py", "sitecustomize.py", "torch.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    assert replay(folder)[0] == 0
    assert not mark.exists()


def test_the_table_for_people(right: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(right), "L1/attn/*"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("clean: ") and "| L1/attn/core" in printed
    assert re_count(printed) in printed


def re_count(printed: str) -> str:
    rows = sum(line.startswith("| L1/") for line in printed.splitlines())
    return f"reference: {rows} of {rows} ops give the stored bits"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["no.zip"], 4, "no such bundle"),
        (["RIGHT", "L1/attn/cor"], 2, "did you mean"),
        (["RIGHT", "--route", "cuda"], 2, "unknown implementation"),
        (["RIGHT", "--forward", "7"], 2, "nothing of it was captured"),
        (["RIGHT", "-o", "x.zip"], 2, "needs --minimise"),
        (["RIGHT", "--minimise"], 3, "nothing is over its limit"),
    ],
)
def test_errors(
    right: Path, replay: Callable[..., Any], words: list[str], code: int, message: str
) -> None:
    given = [str(right) if word == "RIGHT" else word for word in words]
    found, document, narrated = replay(*given)
    assert (found, document) == (code, None) and message in narrated


# ------------------------------------------------------------------------------ minimise


def test_minimise_writes_a_smaller_bundle_that_is_as_wrong(
    wrong: Path, plugin: Path, tmp_path: Path, replay: Callable[..., Any]
) -> None:
    out = tmp_path / "small.zip"
    code, document, _ = replay(wrong, "--plugin", plugin, "--minimise", "-o", out)
    assert code == 1
    prefill = document["minimised"]["ops"][0]
    assert prefill["sizes"]["rows"] == [16, 1] and prefill["kind"] == "constant_factor"
    code, document, _ = replay(out, "--plugin", plugin)
    assert code == 1 and len(document["ops"]) == 1
    assert bundle.open_bundle(out).manifest["minimised"]


def minimal(model: Transformer, op: str, path: str, function: Function) -> Any:
    """The minimised first call of `path` when its op is `function`."""
    implementation(op=op, name="bug")(function)
    try:
        calls, _ = capture(model, ["reference", f"{path}=bug"], lambda site: site.path == path)
        assert calls[0].verdict == "over"
        return shrink(calls[0], function)
    finally:
        del IMPLEMENTATIONS[op]["bug"]


def test_the_wrong_row_is_the_one_that_stays(model: Transformer) -> None:
    def row_of_a_token(x: Tensor, positions: Tensor, **params: Any) -> Tensor:
        y = reference("rope")(x, positions, **params).clone()
        y[positions == 11] *= -1
        return y

    found = minimal(model, "rope", "L1/attn/q_rope", row_of_a_token)
    assert found.sizes["rows"] == (16, 1) and found.sizes["heads"] == (2, 1)
    assert found.call.captured.inputs["positions"].tolist() == [11]


def test_rows_that_are_wrong_only_together_stay_together(model: Transformer) -> None:
    def pair(x: Tensor, **params: Any) -> Tensor:
        y = reference("linear")(x, **params).clone()
        if len(x) >= 5:
            y[4] = y[0]  # a tile's first row is taken for its last
        return y

    found = minimal(model, "linear", "L1/attn/wq_a", pair)
    assert found.sizes["rows"] == (16, 5)


def test_another_kind_of_wrong_is_not_the_same_bug(model: Transformer) -> None:
    def factor(x: Tensor, **params: Any) -> Tensor:
        y = reference("linear")(x, **params)
        return y * 1.5 if len(x) > 1 else y * torch.nan

    found = minimal(model, "linear", "L1/attn/wq_a", factor)
    assert found.sizes["rows"] == (16, 2)
    assert found.call.signature["kind"] == "constant_factor"


def test_experts_are_taken_away(model: Transformer) -> None:
    def third(x: Tensor, routing: Tensor, experts: Tensor, **params: Any) -> Tensor:
        y = reference("experts")(x, routing, experts, **params).clone()
        y[(experts == 2).any(1)] *= 1.5
        return y

    found = minimal(model, "experts", "L1/ffn/experts", third)
    left = found.call.captured.inputs
    assert found.sizes["rows"][1] == 1 and found.sizes["experts"][1] <= 2
    assert 2 in left["bank"].experts and 2 in left["experts"].flatten().tolist()
    assert found.bytes[1] < found.bytes[0]


def test_replayer_refuses_what_even_the_reference_cannot_run(right: Path) -> None:
    opened = bundle.open_bundle(right)
    entry = next(entry for entry in opened.calls if entry.site.op == "experts")
    call = opened.load(entry)
    x, *rest = call.captured.args
    call.captured.args = (x[:, :5], *rest)
    with pytest.raises(bundle.BadBundle, match="cannot be run: RuntimeError"):
        Replayer(opened).replay(entry, call)
