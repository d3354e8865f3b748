"""What runs compute-sanitizer and mutants on a GPU: the parts, how results are read, what is changed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import children
import mutate_cuda
import pytest
import sanitize
import sanitize_parts

import dsv4_bench.engine.implementations  # noqa: F401  (registers the kernels)
from dsv4_bench.engine import cuda, ptxas

FAKE = """#!/bin/sh
# compute-sanitizer --tool TOOL ... --part PART
for last; do :; done
case "$2.$last" in
memcheck.clean) echo "========= ERROR SUMMARY: 0 errors" ;;
memcheck.wrong) echo "========= ERROR SUMMARY: 7 errors"; exit 1 ;;
racecheck.wrong) echo "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warnings)" ;;
memcheck.failed) echo "Traceback"; echo "========= ERROR SUMMARY: 0 errors"; exit 1 ;;
memcheck.silent) ;;
*) sleep 60 ;;
esac
"""


class Named(NamedTuple):
    """What ptxas.resources_of says of a kernel, its name alone."""

    kernel: str


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sanitize.Runner:
    """Of a compute-sanitizer that says what FAKE says; processes end within a second."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return sanitize.Runner(tmp_path, 1)


def test_every_source_is_in_a_part() -> None:
    covered = {source for part in sanitize_parts.PARTS.values() for source in part.sources}
    assert covered == set(cuda.library.sources())


@pytest.mark.parametrize(
    "tool, part, errors",
    [
        ("memcheck", "clean", 0),
        ("memcheck", "wrong", 7),
        ("racecheck", "wrong", 3),
        ("memcheck", "failed", None),
        ("memcheck", "silent", None),
    ],
)
def test_results_are_read(
    runner: sanitize.Runner, tool: str, part: str, errors: int | None
) -> None:
    assert runner.check(tool, part)[:3] == (tool, part, errors)


def test_nothing_goes_on_beyond_the_end(runner: sanitize.Runner) -> None:
    began = time.monotonic()
    assert runner.check("synccheck", "clean").errors is None  # under way
    assert runner.check("synccheck", "clean").errors is None  # not begun
    assert 0.5 < time.monotonic() - began < 5


def test_what_a_stopped_process_has_started_ends_too(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 60 & echo $!; wait"]
    assert children.ended(command, tmp_path / "log", 0.5) is None
    started = int((tmp_path / "log").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until init has taken note
            os.kill(started, 0)
            time.sleep(0.1)
    assert children.ended(["sh", "-c", "exit 3"], tmp_path / "log", 5) == 3


def test_the_record_holds_every_result(
    runner: sanitize.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing, parts, clean in ((["a: b"], ["clean"], False), ([], ["clean"], True)):
        monkeypatch.setattr(runner, "missing", lambda parts, found=missing: found)
        assert sanitize.check_all(runner, ["memcheck"], parts, 2, {"device": "toy"}) == clean
    assert not sanitize.check_all(runner, ["memcheck"], ["clean", "wrong"], 2, {"device": "toy"})
    record = json.loads((runner.out / "sanitize.json").read_text())
    assert (record["device"], record["missing"]) == ("toy", [])
    assert [(r["part"], r["errors"]) for r in record["results"]] == [("clean", 0), ("wrong", 7)]


def test_kernels_that_nothing_launches_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a source in two parts: what either launched counts."""
    built = {"topk": ["a<1>", "a<2>"], "gate": ["c"], "norm": ["a<1>"]}
    parts = {
        "one": sanitize_parts.Part(lambda: None, ("topk", "gate")),
        "two": sanitize_parts.Part(lambda: None, ("topk",)),
        "three": sanitize_parts.Part(lambda: None, ("norm",)),
    }
    monkeypatch.setattr(sanitize_parts, "PARTS", parts)
    monkeypatch.setattr(cuda.library, "library_path", Path)
    monkeypatch.setattr(ptxas, "resources_of", lambda path: [Named(n) for n in built[path.name]])
    monkeypatch.setattr(ptxas, "demangled", list)
    launched = {"one": ["a<1>"], "two": ["a<2>"], "three": []}
    assert sanitize.missing_kernels(launched) == ["gate: c", "norm: a<1>"]


@pytest.mark.parametrize("mutant", mutate_cuda.MUTANTS, ids=lambda m: m.name)
def test_mutants_apply(mutant: mutate_cuda.Mutant, tmp_path: Path) -> None:
    """Their text is in the sources, once; their sources and tests exist."""
    mutate_cuda.changed(mutant, tmp_path / "csrc")
    assert set(mutant.built) <= set(cuda.library.sources())
    assert (mutate_cuda.TESTS / mutant.tests.partition(" ")[0]).exists()
