"""The record of verified kernels: what `kernels` says of each entry, and of a damaged or absent file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda, verified
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.registry import IMPLEMENTATIONS
from dsv4_bench.workbench.cli import main
from dsv4_bench.workbench.cli.kernels import verified_text

IMPL = IMPLEMENTATIONS["rms_norm"]["sm90"]
ENTRY: dict[str, Any] = {
    "device": "NVIDIA H200",
    "date": "2026-11-23",
    "commit": "0123abc",
    "hash": "000000000000",
    "code": "",
    "error": 2.06e-7,
    "limit": 3,
    "tests": 12,
    "failed": 0,
}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package's record is looked for; no file yet."""
    path = tmp_path / "verified.json"
    monkeypatch.setattr(verified, "record_file", lambda: path)
    return path


def test_whether_a_record_still_holds() -> None:
    code = cuda.library.cuda_build("norm").identity()
    sources = code.rpartition("-")[0]
    for changes, standing in (
        ({"hash": IMPL.hash, "code": code}, "this code"),
        ({"code": f"{sources}-01234567"}, "these sources, another compiler"),
        ({"code": "norm_sm90-aaaaaaaaaaaa-01234567"}, "changed since"),
        ({"code": ""}, "changed since"),
    ):
        assert verified.Record(**{**ENTRY, **changes}).standing(IMPL) == standing


def test_a_record_of_several_builds() -> None:
    """All must be of the same sources, whatever compiled them."""
    impl = IMPLEMENTATIONS["linear"]["sm90+cutedsl"]
    *first, last = (part.rpartition("-")[0] for part in impl.code().split("+"))
    few = "+".join(f"{sources}-01234567" for sources in first)
    for code, standing in (
        (f"{few}+{last}-89abcdef", "these sources, another compiler"),
        (f"{few}+linear_dsl_sm90-aaaaaaaaaaaa-89abcdef", "changed since"),
        (few, "changed since"),
    ):
        assert verified.Record(**{**ENTRY, "code": code}).standing(impl) == standing


@pytest.mark.parametrize("op, own", [("gate", "gate"), ("shared_expert", "experts")])
def test_an_op_that_calls_linear_names_its_builds(op: str, own: str) -> None:
    """A change of linear's sources is a change of the op's."""
    code = IMPLEMENTATIONS[op]["sm90"].code
    assert code is not None
    names = [build.rsplit("-", 2)[0] for build in code().split("+")]
    assert names == [f"{name}_sm90" for name in (own, "linear", "skinny")]


def test_an_absent_record_is_empty(record: Path) -> None:
    assert verified.load() == {}


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "Expecting value"),
        ("[]", "AttributeError"),
        ('{"rms_norm/sm90": null}', "TypeError"),
        ('{"rms_norm/sm90": {}}', "device"),
        (json.dumps({"rms_norm/sm90": {**ENTRY, "tests": "many"}}), "tests is 'many'"),
        (json.dumps({"rms_norm/sm90": {**ENTRY, "error": True}}), "error is True"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_a_damaged_record_is_named(record: Path, text: str, said: str) -> None:
    record.write_text(text)
    with pytest.raises(DSV4Error, match="cannot read the record") as caught:
        verified.load()
    assert said in caught.value.message and str(record) in caught.value.message


def kernels(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert main(["kernels", *words]) == 0
    return capsys.readouterr()


def test_kernels_shows_the_record(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = {**ENTRY, "hash": IMPL.hash}
    record.write_text(json.dumps({"rms_norm/sm90": same, "rope/sm90": {**ENTRY, "failed": 2}}))
    rows = json.loads(kernels(capsys, "--json")[0])["kernels"]
    found = {f"{r['op']}/{r['implementation']}": r["verified"] for r in rows if r["verified"]}
    assert found == {
        "rms_norm/sm90": {**same, "standing": "this code"},
        "rope/sm90": {**ENTRY, "failed": 2, "standing": "changed since"},
    }
    lines = kernels(capsys)[0].splitlines()
    (norm,) = (line for line in lines if line.startswith("| rms_norm ") and "H200" in line)
    assert "NVIDIA H200 2026-11-23: error 2.1e-07 of 3.0e+00, 12 tests  " in norm
    (rope,) = (line for line in lines if line.startswith("| rope ") and "H200" in line)
    assert "12 tests, 2 FAILED; changed since |" in rope


def test_equal_bits_are_said_so() -> None:
    entry = {**ENTRY, "error": 0.0, "limit": 0.0, "standing": "this code"}
    assert verified_text(entry) == "NVIDIA H200 2026-11-23: same bits, 12 tests"


def test_kernels_survives_a_damaged_record(
    record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record.write_text('{"rms_norm/sm90"')
    out, err = kernels(capsys)
    assert err.startswith("dsv4-bench: warning: cannot read the record") and "\n" not in err[:-1]
    assert "| rms_norm " in out and "H200" not in out
