"""`diff`: legitimate comparisons only, the op to blame first, and bits told from limits"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import MANIFEST, PLUGIN, TOKENS, capture, micro_model, write

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import IMPLEMENTATIONS
from dsv4_bench.probes import bundle
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.bundles.diffing import diff
from dsv4_bench.workbench.loading import load_plugins

WANTED = ("L1/attn/q_rope", "L1/attn/core", "L1/attn/o_rope", "L1/attn/wo_a", "L2/attn/core")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return micro_model(tmp_path_factory.mktemp("diff"))


def dump(model: Transformer, target: Path, *route: str, **manifest: Any) -> Path:
    calls, _ = capture(model, route, lambda site: site.path in WANTED)
    return write(target, calls, route=list(route), **manifest)


@pytest.fixture(scope="module")
def reference(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(model, tmp_path_factory.mktemp("a") / "a.zip", "reference")


@pytest.fixture
def buggy(model: Transformer, tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(PLUGIN)
    load_plugins([str(tmp_path / "mine.py")])
    yield dump(model, tmp_path / "bug.zip", "reference", "L1/attn/core=bug")
    del IMPLEMENTATIONS["attention"]["bug"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    def call(*words: object) -> tuple[int, Any, str]:
        code = cli.main(["diff", *map(str, words), "--json"])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if printed.out else None, printed.err

    return call


def test_the_same_run_is_bitwise_equal(
    model: Transformer, reference: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    again = dump(model, tmp_path / "again", "reference", versions={"torch": "1.0"})
    code, document, _ = run(reference, again)
    assert code == 0 and document["bitwise"] and document["status"] == "equal"
    assert document["sentence"] == "10 ops are bitwise equal"
    assert "torch: None / 1.0" in document["around"]


def test_an_honest_kernel_is_within_limits(
    model: Transformer, reference: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    kernel = dump(model, tmp_path / "k.zip", "kernel")
    code, document, _ = run(reference, kernel)
    assert code == 0 and document["status"] == "within limits" and document["first"] is None
    assert "bits differ first at L1/attn/" in document["sentence"]


def test_the_op_to_blame_is_the_one_with_equal_inputs(
    reference: Path, buggy: Path, run: Callable[..., Any]
) -> None:
    code, document, _ = run(reference, buggy)
    assert code == 1 and document["status"] == "different"
    first = document["first"]
    assert (first["site"], first["forward"], first["output"]) == ("L1/attn/core", 0, "o")
    assert first["blame"] == "here" and first["input_error"] == 0
    assert "inputs are equal" in first["sentence"]
    blame = {(op["site"], op["forward"]): op["blame"] for op in document["ops"]}
    assert blame["L1/attn/q_rope", 0] == "equal"
    assert blame["L1/attn/o_rope", 0] == blame["L1/attn/wo_a", 0] == "carried"
    assert blame["L2/attn/core", 0] in ("carried", "within")
    assert blame["L1/attn/core", 1] == "here"
    differing = first["outputs"]["o"]
    assert differing["relative_l2"] == pytest.approx(0.01 * head_share(reference), rel=1e-3)


def head_share(path: Path) -> float:
    """|o of head 1| / |o|: what 1 % more of head 1 is of the whole."""
    opened = bundle.open_bundle(path)
    entry = next(e for e in opened.calls if e.site.path == "L1/attn/core")
    o = opened.load(entry).captured.outputs["o"].double()
    return float(o[:, 1].norm() / o.norm())


def test_nan_on_one_side_is_a_difference(
    model: Transformer, reference: Path, tmp_path: Path
) -> None:
    calls, _ = capture(model, ["reference"], lambda site: site.path in WANTED)
    broken = calls[1].captured
    o = broken.outputs["o"].clone()
    with torch.inference_mode():
        o[0, 0, 0] = torch.nan
    calls[1] = replace(calls[1], captured=replace(broken, outputs={**broken.outputs, "o": o}))
    report = diff(
        bundle.open_bundle(reference),
        bundle.open_bundle(write(tmp_path / "n", calls, route=["reference"])),
    )
    assert report.first is not None and report.first.site == "L1/attn/core"
    assert report.first.output_error == float("inf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": [*TOKENS[:3], 9, *TOKENS[4:]]}, "other tokens: at 3: 17 against 9"),
        ({"tokens": TOKENS[:-1]}, "other tokens: 17 against 16"),
        ({"chunks": [8, 9]}, "other chunks: at 0: 16 against 8"),
        ({"dtype": "bfloat16"}, "other dtype of the activations"),
        ({"numerics": "official"}, "other numerics: plain against official"),
        ({"checkpoint": {"config": {"hidden_size": 7}}}, "other config: hidden_size"),
    ],
)
def test_comparisons_that_mean_nothing(
    model: Transformer,
    reference: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    change: dict[str, Any],
    reason: str,
) -> None:
    other = dump(model, tmp_path / "o.zip", "reference", **change)
    code, document, narrated = run(reference, other)
    assert code == 3 and document is None and reason in narrated
    assert MANIFEST["tokens"] == TOKENS


def test_other_coverage_and_other_weights(
    model: Transformer, reference: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    calls, _ = capture(model, ["reference"], lambda site: site.path in WANTED[:-1])
    code, _, narrated = run(reference, write(tmp_path / "fewer.zip", calls))
    assert code == 3 and "other coverage: 2 ops only in A, as L2/attn/core #0" in narrated
    weight = model.sites["L1/attn/wo_a"].params["weight"]
    data = weight.data
    try:
        weight.data = data.clone()
        weight.data.view(torch.uint8)[0, 0] ^= 1
        weight._dense = None
        other = dump(model, tmp_path / "w.zip", "reference")
    finally:
        weight.data, weight._dense = data, None
    code, _, narrated = run(reference, other)
    assert code == 3 and "other weights or constants: L1/attn/wo_a" in narrated


def test_errors_and_the_table(
    reference: Path, buggy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK no")
    assert cli.main(["diff", str(reference), str(tmp_path / "x.zip")]) == 4
    assert cli.main(["diff", str(reference), str(tmp_path / "none")]) == 4
    with bundle.Writer(tmp_path / "e") as writer:
        writer.publish(MANIFEST)
    assert cli.main(["diff", str(tmp_path / "e"), str(tmp_path / "e")]) == 3
    assert "nothing compared is no pass" in capsys.readouterr().err
    assert cli.main(["diff", str(reference), str(buggy)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("different: L1/attn/core #0: inputs are equal")
    assert "route: reference / reference, L1/attn/core=bug" in printed
    assert "| carried |" in printed
