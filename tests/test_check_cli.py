"""`dsv4-bench check` from the command line: documents, exit codes, 80 columns, progress"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, MakeCheckpoint, with_ratios

from dsv4_bench.workbench.cli import main
from dsv4_bench.workbench.cli.check_text import check_text, columns, minimise_text, vary_text
from dsv4_bench.workbench.cli.progress import Progress, time_text

PLUGIN = """
from dsv4_bench.engine.registry import implementation, reference

@implementation(op="hc_post", name="bug")
def bug(y, x, post, comb):
    return 1.01 * reference("hc_post")(y, x, post, comb)

@implementation(op="hc_post", name="same")
def same(y, x, post, comb):
    return reference("hc_post")(y, x, post, comb)

@implementation(op="rms_norm", name="bug")
def crowded(x, **params):
    y = reference("rms_norm")(x, **params)
    y[30:] *= 1.01
    return y
"""

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    cache_folder: Path,
) -> Call:
    """`call(words...)`: check on a small checkpoint and 24 tokens; (exit code, stdout, stderr)."""
    checkpoint = make_checkpoint("nvfp4", with_ratios(SMALL, 0, 4))
    plugin, tokens = tmp_path / "plugin.py", tmp_path / "tokens.json"
    plugin.write_text(PLUGIN)
    tokens.write_text(json.dumps([(7 * i + 3) % 300 for i in range(24)]))
    common = ["--tokens", str(tokens), "--chunks", "20,1,3", "--plugin", str(plugin)]

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["check", str(checkpoint), *common, *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


BUG = ("--route", "reference", "--route", "*/hc_post=bug")
FAST = ("--poison", "off", "--repeats", "1")


def test_a_bug_is_found_and_explained(call: Call, tmp_path: Path) -> None:
    bundle = tmp_path / "bug.zip"
    code, out, err = call(
        "--route", "reference", "--route", "L1/ffn/hc_post=bug", *FAST, "--json",
        "--sites", "L1/ffn/*", "--bundle", str(bundle), "--limits", str(tmp_path / "limits.json"),
    )  # fmt: skip
    document = json.loads(out)
    assert code == 1 and document["status"] == "found"
    assert document["first"]["site"] == "L1/ffn/hc_post"
    assert document["kl"]["arithmetic"] > 0 and document["kl"]["unit"] == "nats"
    assert {row["site"] for row in document["decisions"]} == {
        "L0/ffn/gate",
        "L1/ffn/gate",
        "L1/attn/index/topk",
    }
    assert document["bundle"]["site"] == "L1/ffn/hc_post" and bundle.exists()
    assert "wrote" in err and "limits" in json.loads((tmp_path / "limits.json").read_text())


def test_what_was_not_asked_for_is_listed_and_is_no_failure(call: Call, tmp_path: Path) -> None:
    route = ("--route", "reference", "--route", "*/hc_post=same")
    target = str(tmp_path / "none.zip")
    words = ("--layers", "0", "--sites", "*/hc_post", "--json", "--bundle", target)
    code, out, err = call(*route, *FAST, *words)
    assert "no bundle is written" in err and not Path(target).exists()
    document = json.loads(out)
    assert (code, document["status"]) == (0, "clean")
    judged = [site["site"] for site in document["sites"] if site["verdict"] == "ok"]
    assert judged == ["L0/attn/hc_post", "L0/ffn/hc_post"]
    assert {item["why"] for item in document["uncovered"]} == {"not asked for"}
    assert len(document["uncovered"]) == len(document["sites"]) - 2


def test_a_reference_that_was_asked_for_is_not_a_pass(call: Call) -> None:
    code, out, _ = call(*FAST, "--route", "reference", "--layers", "1")
    assert code == 3 and out.startswith("PARTIAL")
    assert "not asked for: embed, " in out and "the route names the reference" in out


def test_minimise(call: Call) -> None:
    words = ("--route", "reference", "--route", "*/hc_post=bug", "--minimise", "--layers", "0-1")
    code, out, _ = call(*words, "--json")
    document = json.loads(out)
    assert code == 1
    (found,) = document["sets"]
    assert found["ops"] == ["hc_post"] and len(found["sites"]) == 1 and found["elsewhere"]
    assert document["first"]["site"] == found["sites"][0]
    reasons = {item["site"]: item["why"] for item in document["uncovered"]}
    assert reasons["embed"] == "not asked for"
    assert reasons["L0/attn/core"] == "the route names the reference"
    code, out, _ = call(*words)  # every trial is known by now
    assert code == 1 and "0 trials" in out and "alone breaks the output" in out
    code, out, _ = call(*words, "--fresh", "--json")
    assert json.loads(out)["stored"] == 0


def test_vary(call: Call) -> None:
    code, out, _ = call("--route", "reference", "--route", "L1/ffn/norm=bug", "--vary", "--json")
    document = json.loads(out)
    assert (code, document["status"]) == (1, "found")
    assert document["first"]["site"] == "L1/ffn/norm"
    verdicts = {row["variable"]: row["verdict"] for row in document["variations"]}
    assert verdicts["batch"] == "over" and verdicts["repeat"] == "same"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--minimise", "--vary"), "not allowed with"),
        (("--expect", "4"), "--expect belongs to --minimise"),
        (("--minimise", "--expect", "4", "--bad", "5"), "both given"),
        (("--minimise", "--expect", "4", *BUG), "the reference shows the symptom too"),
        (("--minimise", "--expect", "", *BUG), "the answer is empty"),
        (("--minimise", "--route", "reference"), "nothing to minimise"),
        (("--vary", "--layers", "1"), "--vary follows every site"),
        (("--vary", "--bundle", "x.zip"), "--bundle belongs to the check itself"),
        (("--layers", "5-3"), "no range of layers"),
        (("--layers", "0-7"), "the model has 2"),
        (("--layers", "1", "--sites", "L0/*"), "no site matches"),
        (("--bundle", "/no/folder/x.zip"), "no such folder"),
    ],
)
def test_what_cannot_be_meant(call: Call, words: tuple[str, ...], message: str) -> None:
    code, out, err = call(*words)
    assert code in (2, 3) and out == ""
    assert message in err and len(err.splitlines()) <= 2


# ------------------------------------------------------------------------------ text


def _site(path: str, verdict: str, own: float) -> dict[str, Any]:
    return {
        "site": path, "implementation": "cutedsl", "own_error": own, "limit": 3e-7,
        "carried_error": 1e-3, "verdict": verdict,
    }  # fmt: skip


DOCUMENT: dict[str, Any] = {
    "status": "found",
    "first": {
        "site": "L10/attn/index/compressor/wgate", "kind": "constant_factor", "own_error": 0.01,
        "limit": 3e-7, "carried_error": 0.02, "invariants": [],
        "sentence": "L10/attn/index/compressor/wgate: " + "output = 1.01 x reference, " * 5,
    },
    "findings": [
        {"site": "L10/attn/index/compressor/wgate", "own_error": 0.01, "limit": 3e-7},
        {"site": "head/norm", "own_error": 1e-6, "limit": 5e-7},
        {"site": "head/norm", "own_error": 2e-6, "limit": 5e-7},
    ],
    "sites": [_site("L10/attn/index/compressor/wgate", "over", 0.01), _site("head/norm", "over", 1e-7)]
    + [_site(f"L{i}/attn/index/compressor/wkv", "ok", 1e-7) for i in range(30)],
    "uncovered": [{"site": "L0/attn/core", "why": "no kernel for this device " * 6}],
    "kl": {
        "total": 0.25, "arithmetic": 0.05, "decisions": 0.2, "positions": 300, "worst": 3.0,
        "worst_position": 7, "top1_changed": 12, "top1_arithmetic": 2,
    },
    "decisions": [
        {"site": "L10/attn/index/topk", "flipped": 3, "flipped_unreplayed": 9, "rows": 300,
         "overlap": 0.999, "margin": 0.01, "gap": float("inf"), "against_scores": 3}
    ],
    "logits_error": 0.3,
    "seconds": 12.0,
}  # fmt: skip


def test_the_report_reads_in_80_columns() -> None:
    text = check_text(DOCUMENT, 300)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("FOUND: L10/attn/index/compressor/wgate: output = 1.01 x reference")
    for words in ("0.25 nats a token", "0.05 from", "12 of", "not covered: 1 sites", "3/300"):
        assert words in " ".join(text.split())
    over = text[text.index("over their limit, in order") :].splitlines()[2:4]
    assert [line.split()[0] for line in over] == ["L10/attn/index/compressor/wgate", "head/norm"]
    assert over[1].split()[2:4] == ["2.0e-06", "5.0e-07"]  # of its worst row, not of the tensor


def test_other_reports_read_in_80_columns() -> None:
    part = {"sites": ["L10/attn/wq_b"], "broken": False, "error": 1e-7}
    minimised = {
        "status": "found", "symptom": "logits off", "candidates": 9, "whole": {"error": 1.0},
        "sets": [{"sites": ["a", "b"], "sentence": "a and b " * 30, "subsets": [part], "confirmed": False}],
        "complete": False, "notes": ["n " * 60], "trials": 3, "stored": 1, "seconds": 2.0,
    }  # fmt: skip
    text = minimise_text(minimised, 300)
    assert max(map(len, text.splitlines())) <= 80 and "not confirmed" in text
    change = {"site": "L10/attn/index/compressor/wgate", "error": 1e-7}
    effect = {
        "variable": "companions", "label": "a sequence of 337 before it", "verdict": "rounding",
        "first": change, "logits": change, "sentence": "companions differ " * 9,
    }  # fmt: skip
    text = vary_text({"variations": [effect], "seconds": 1.0}, 300)
    assert text.startswith("CLEAN") and "L10/attn/index/compressor/wgate" in text


def test_columns() -> None:
    assert columns(("a", "n"), [("x", "10"), ("yyy", "2")]) == "  a     n\n  x    10\n  yyy   2"


# ------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 10.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress(stream)
    progress("early", 1, 4)  # too early to say
    progress("later", 2, 4)
    progress("done", 4, 4)
    assert stream.getvalue() == "later, about 10 s left\n"


def test_progress_on_a_terminal_is_one_line() -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress("one", 0, 2)
    progress("two", 1, 2)
    progress.close()
    progress.close()
    assert stream.getvalue() == "\rone\033[K\rtwo\033[K\n"
    assert [time_text(s) for s in (9, 300, 7200)] == ["9 s", "5 min", "2.0 h"]
