"""The scorer of `faults` is honest, names real bugs, and `--blast` counts what it says"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsv4_bench.probes.faults.catalogue  # noqa: F401
from dsv4_bench.engine.demo_model import tasks
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import teacher_forced_logits
from dsv4_bench.engine.registry import parse_route, reference
from dsv4_bench.probes.faults.base import FAULTS, fault, registered_for_a_while
from dsv4_bench.probes.signatures import Signature
from dsv4_bench.workbench.checking import blast_radius, fault_suite
from dsv4_bench.workbench.checking.blast_radius import BlastRadius, Reading, metrics, read
from dsv4_bench.workbench.checking.checker import Checker
from dsv4_bench.workbench.checking.fault_suite import Suite
from dsv4_bench.workbench.checking.findings import CheckReport, Finding
from dsv4_bench.workbench.cli import main

PLUGIN = '''
from dsv4_bench.engine.registry import reference
from dsv4_bench.probes.faults.base import fault


@fault(op="hc_post", sites="L2/attn/hc_post", kinds="constant_factor")
def two_percent(y, x, post, comb):
    """Everything is 2 % too large."""
    return 1.02 * reference("hc_post")(y, x, post, comb)
'''
HONEST = PLUGIN.replace("1.02 * ", "").replace("two_percent", "nothing_wrong")


def silent(*progress: object) -> None:
    pass


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("suite"), length=140)


# ------------------------------------------------------------------------------ detection


@pytest.mark.parametrize(
    "name",
    [
        "scale_2_dropped",
        "last_expert_skipped",
        "sink_missing",
        "comb_transposed",
        "position_plus_1",
        "worst_entries_kept",
        "k_and_n_exchanged",  # its output has a shape that the next kernel refuses
        "comb_strides_ignored",
    ],
)
def test_check_names_a_fault_of_every_sort(suite: Suite, name: str) -> None:
    outcome = suite.score(FAULTS[name])
    assert not outcome.crashed
    assert outcome.detected and outcome.op_right and outcome.layer_right, outcome
    assert outcome.kind_right, (outcome.kind, outcome.expected_kinds)


def test_clean_checkpoints_raise_no_alarm() -> None:
    rows = fault_suite.run_clean(2, silent)
    assert [row["alarms"] for row in rows] == [[], []]
    assert {row["dtype"] for row in rows} == {"float32"} and rows[0]["layout"] != rows[1]["layout"]


def test_the_clean_cases_cover_what_they_promise() -> None:
    cases = list(fault_suite.clean_cases(20))
    assert len({case.seed for case in cases}) == 20
    for field, least in (("layout", 5), ("ratios", 4), ("length", 5), ("dtype", 2), ("route", 2)):
        assert len({getattr(case, field) for case in cases}) >= least, field


# ------------------------------------------------------------------------------ honesty


def test_a_fault_that_is_none_is_not_detected(suite: Suite) -> None:
    with registered_for_a_while():

        @fault(op="hc_post", sites="L2/attn/hc_post", kinds="rows")
        def nothing(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
            """The reference under another name."""
            return reference("hc_post")(y, x, post, comb)

        outcome = suite.score(FAULTS["nothing"])
    assert (outcome.detected, outcome.op_right, outcome.kind_right) == (False, False, False)
    assert fault_suite.score([outcome])["passed"] is False


def test_a_wrong_expectation_scores_wrong(suite: Suite) -> None:
    def scaled(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Twice as much."""
        return 2 * reference("hc_post")(y, x, post, comb)

    with registered_for_a_while():
        fault(op="hc_post", sites="L2/attn/hc_post", kinds="nan", name="x")(scaled)
        kind = suite.score(FAULTS["x"])
        FAULTS["x"].kinds = ("constant_factor",)
        good = suite.score(FAULTS["x"])
        FAULTS["x"].sites = ("L3/attn/hc_post", "L2/attn/hc_post")
        both = suite.score(FAULTS["x"])
        FAULTS["x"].parts = {"hc_pre": scaled}
        other_op = suite.score(FAULTS["x"])
    assert kind.detected and kind.op_right and kind.layer_right and not kind.kind_right
    assert good.kind_right and good.layer_right and good.also_blamed == []
    assert both.expected_layer == 2  # the first in the model's order, not in the list's
    assert not other_op.op_right


def test_op_and_layer_are_those_of_the_first_finding() -> None:
    def first(site: str, op: str, layer: int) -> fault_suite.Outcome:
        signature = Signature("transposed", "is transposed")
        finding = Finding(site, op, layer, 0, "x", 0.1, 1e-6, signature)
        sites = ["L2/attn/hc_post", "L3/attn/hc_post"]
        report = CheckReport(findings=[finding])
        return fault_suite.judge(FAULTS["comb_transposed"], sites, [2, 3], report)

    right = first("L2/attn/hc_post", "hc_post", 2)
    assert right.op_right and right.layer_right and right.kind_right
    later = first("L3/attn/hc_post", "hc_post", 3)
    assert later.op_right and not later.layer_right  # it was on in layer 2 already
    other_site = first("L2/ffn/hc_post", "hc_post", 2)
    assert not other_site.op_right and other_site.also_blamed == ["L2/ffn/hc_post"]
    assert not first("L2/attn/hc_post", "hc_pre", 2).op_right


def test_a_crash_is_one_faults_result(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(self: Checker, *args: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Checker, "against", break_down)
    outcome = suite.score(FAULTS["comb_transposed"])
    assert outcome.crashed == "RuntimeError: boom" and not outcome.detected


def test_thresholds_are_shares_of_all_faults() -> None:
    def outcome(**right: bool) -> Any:
        empty = fault_suite.Outcome("f", "x", "d", [], [], None, [])
        for name, value in right.items():
            setattr(empty, name, value)
        return empty

    right = {"detected": True, "op_right": True, "layer_right": True}
    rows = [outcome(**right, kind_right=number < 17) for number in range(20)]
    assert fault_suite.score(rows)["passed"] is True  # 17 of 20 kinds are 85 %
    rows[0].kind_right = False
    assert fault_suite.score(rows)["passed"] is False
    rows[0].kind_right, rows[3].detected = True, False
    assert fault_suite.score(rows)["passed"] is False


# ------------------------------------------------------------------------------ the command


def test_a_plugins_fault_is_scored_like_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_suite, "Suite", partial(Suite, length=140))
    assert len(PLUGIN.strip().splitlines()) <= 15  # the documented example is short
    bad, good = tmp_path / "bad.py", tmp_path / "good.py"
    good.write_text(PLUGIN)
    bad.write_text(HONEST)
    with registered_for_a_while():
        words = ["faults", "two_percent", "--plugin", str(good)]
        assert main([*words, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert main(["faults", "nothing_wrong", "--plugin", str(bad), "--markdown"]) == 1
    assert document["status"] == "passed" and document["score"]["faults"] == 1
    assert document["faults"][0]["kind"] == "constant_factor"
    assert document["faults"][0]["site"] == "L2/attn/hc_post"
    table = capsys.readouterr().out
    assert "1 faults: detected 0 (0%)" in table and "| nothing_wrong |" in table


def test_list_and_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "--list", "router"]) == 0
    assert "hash_table_ignored" in capsys.readouterr().out
    assert main(["faults", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["faults"]
    assert len(listed) == len([f for f in FAULTS.values() if not f.knockout])
    for words in (["no_such_fault"], ["--clean", "0"], ["--blast", "/no/such/folder/x.json"]):
        assert main(["faults", *words]) == 2


# ------------------------------------------------------------------------------ blast radius

TEXTS = (("blast/0", 60), ("blast/1", 80))


def test_texts_are_read_as_the_engine_reads_them(tmp_path: Path) -> None:
    """In chunks and decode steps against each text in one piece."""
    documents = [tasks.document(seed, length) for seed, length in TEXTS]
    model = blast_radius.Transformer(blast_radius.Checkpoint(blast_radius.SHIPPED))
    model.set_route(parse_route(["kernel"]))
    logits = torch.cat([teacher_forced_logits(model, d.ids[:-1]) for d in documents])
    target = torch.cat([torch.tensor(d.ids[1:]) for d in documents])
    reading = read(model, documents)
    assert reading.loss == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-4)
    assert torch.cat(reading.predicted).equal(logits.argmax(-1))


def test_a_logit_that_is_nan_predicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(59, tasks.VOCAB_SIZE)
    logits[:, 5], logits[3, 7] = 1.0, torch.nan
    monkeypatch.setattr(blast_radius, "teacher_forced_logits", lambda *args: logits)
    reading = read(None, [tasks.document("blast/0", 60)])  # type: ignore[arg-type]
    assert reading.predicted[0].tolist() == [5, 5, 5, -1] + [5] * 55


def test_metrics_by_hand() -> None:
    text = tasks.Document(
        ids=[0, 5, 6, 7, 8, 9],
        kinds=[tasks.TEXT, tasks.RECALL, tasks.RANDOM, tasks.QUESTION, tasks.COPY, tasks.TEXT],
        distances=[0, 100, 0, 600, 0, 0],
    )
    target = torch.tensor(text.ids[1:])
    healthy = Reading(1.0, [target], [torch.tensor([5, 6, 7, 8, 1])])
    mine = Reading(2.0, [target], [torch.tensor([5, 1, -1, 8, 2])])
    found = metrics(mine, healthy, [text])
    assert found["tally"] == {
        "d<128": [1, 1],
        "128-511": [0, 0],
        "512-1023": [0, 1],
        ">=1024": [0, 0],
        "copy": [1, 1],
    }
    # Token 2 is random and does not count, token 5 was wrong before; 3 is the first that matters.
    assert found["first_wrong_token"] == 3
    assert found["changed"] == 3 / 5
    assert metrics(healthy, healthy, [text])["first_wrong_token"] is None


def test_blast_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "blast.json"
    chosen = [FAULTS["without_entries"], FAULTS["k_and_n_exchanged"], FAULTS["output_heads_first"]]
    document = BlastRadius(file, TEXTS).run(chosen, silent)
    assert json.loads(file.read_text()) == json.loads(json.dumps(document))
    assert "crashed" in document["faults"]["k_and_n_exchanged"]
    assert document["faults"]["output_heads_first"]["loss"] > document["healthy"]["loss"] + 0.5
    monkeypatch.setattr(blast_radius, "read", None)  # nothing is measured twice
    again = BlastRadius(file, TEXTS).run(chosen, silent)
    assert again == json.loads(file.read_text())
    with pytest.raises(DSV4Error, match="measured on other texts"):
        BlastRadius(file, TEXTS[:1])
    file.write_text("[1, 2")
    with pytest.raises(DSV4Error, match=r"blast\.json"):
        BlastRadius(file, TEXTS)
