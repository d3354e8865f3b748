"""The record of what was verified: from a test's `measured` through a JUnit report into verified.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULE = """\
import dsv4_bench.engine.ops, verified
verified._machine = lambda: {"device": "toy", "date": "2026-01-02"}
from verified import measured

def test_small():
    measured("hc_post", "reference", 1e-4, 1e-3)
    measured("hc_post", "reference", 1e-6, 2e-6)  # nearer to its limit
    measured("embed", "reference", 0.0, 0.0)

def test_large():
    measured("hc_post", "reference", 2e-4, 1e-3)

def test_wrong():
    measured("embed", "reference", 0.5, 0.0)
    assert False

def test_silent():
    pass
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JUnit report of MODULE."""
    folder = tmp_path_factory.mktemp("record")
    (folder / "test_toy.py").write_text(MODULE)
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    options = ["--rootdir", str(folder), "--junitxml", str(folder / "junit.xml")]
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r}); import pytest; pytest.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
    subprocess.run([*command, *options, str(folder)], capture_output=True, check=False, timeout=60)
    return folder / "junit.xml"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TESTS / "gpu_record.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_error_nearest_to_its_limit_is_kept_and_failures_are_counted(
    report: Path, tmp_path: Path
) -> None:
    out, tests = tmp_path / "verified.json", tmp_path / "tests.json"
    out.write_text(json.dumps({"gone/sm90": {"tests": 3}, "embed/reference": {"tests": 99}}))
    done = run(report, "--commit", "abc", "--verified", out, "--tests", tests)
    assert done.returncode == 0, done.stderr
    table = json.loads(out.read_text())
    post, embed = table["hc_post/reference"], table["embed/reference"]
    assert (post["error"], post["limit"]) == (1e-6, 2e-6)
    assert (post["tests"], post["failed"]) == (2, 0)
    assert (post["device"], post["date"], post["commit"]) == ("toy", "2026-01-02", "abc")
    assert len(post["hash"]) == 12
    assert (embed["tests"], embed["failed"], embed["error"]) == (1, 1, 0.0)
    assert table["gone/sm90"] == {"tests": 3}  # not in this run: kept
    record = json.loads(tests.read_text())
    assert record["files"] == {"test_toy": {"passed": 3, "failed": 1}}
    assert record["failed"] == ["test_toy::test_wrong"]


def test_a_report_without_measurements_is_refused(report: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.xml"
    empty.write_text("<testsuites><testsuite><testcase name='a'/></testsuite></testsuites>")
    done = run(empty, "--commit", "abc")
    assert done.returncode != 0 and "0 machines" in done.stderr
