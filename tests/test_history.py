"""The history of times: what is kept and given back, bounded, and deaf to damaged files"""

from __future__ import annotations

import json
import os

import pytest
from driver import Driver

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.cli import output
from dsv4_bench.workbench.timing import ceilings as ceiling_module
from dsv4_bench.workbench.timing import history
from dsv4_bench.workbench.timing.ceilings import Ceilings

MACHINE = Ceilings("a CPU", 2, "2", read=1e9, copy=2e9, launch=0.0, matrix={"float32": 1e10})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV4_HISTORY", str(tmp_path / "history"))
    return tmp_path / "history"


def keep(seconds, site="L1/attn/core", **more):
    entry = history.Entry(site, "sm90", "abc", seconds, **more)
    return history.keep("profile", "ckpt", "a GPU", "decode", [entry])


def test_what_was_kept_comes_back_newest_first(folder):
    keep(1.0, own_error=float("inf"), limit=1e-3, verdict="over")
    keep(2.0)
    keep(3.0, site="L2/attn/core")
    assert [row["seconds"] for row in history.rows("*/core")] == [3.0, 2.0, 1.0]
    newest, oldest = history.rows("L1/attn")
    assert (newest["what"], newest["device"], newest["hash"]) == ("profile", "a GPU", "abc")
    assert oldest["own_error"] == float("inf") and oldest["process"] == os.getpid()
    assert [row["seconds"] for row in history.rows("*", most=2)] == [3.0, 2.0]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"schema_version": 1}', "\x00\x01", "[" * 100000,
     '{"schema_version": 9, "sites": []}', {"sites": [{"site": 3, "implementation": "x"}]},
     {"sites": [{"seconds": 1}]}, {"sites": 7}, {"process": "x"},
     {"sites": [{"site": "L1/attn/core", "implementation": "a", "seconds": "fast"}]}],
)  # fmt: skip
def test_damaged_files_are_passed_over(folder, damage):
    path = keep(1.0)
    keep(2.0)
    if isinstance(damage, dict):
        damage = json.dumps({**json.loads(path.read_text()), **damage})
    path.write_text(damage)
    assert [row["seconds"] for row in history.rows("*")] == [2.0]


def test_a_file_too_large_is_not_read(folder, monkeypatch):
    path = keep(1.0)
    monkeypatch.setattr(history, "_LARGEST", path.stat().st_size - 1)
    assert history.rows("*") == []


def test_the_oldest_give_way(folder, monkeypatch):
    monkeypatch.setattr(history, "MOST_RUNS", 3)
    for seconds in range(5):
        keep(float(seconds))
    assert [row["seconds"] for row in history.rows("*")] == [4.0, 3.0, 2.0]
    size = next(folder.iterdir()).stat().st_size
    monkeypatch.setattr(history, "MOST_BYTES", 2 * size)
    keep(9.0)
    assert [row["seconds"] for row in history.rows("*")] == [9.0, 4.0]


def test_nothing_is_kept_where_that_is_not_wanted_or_not_possible(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV4_HISTORY", "")
    assert keep(1.0) is None and history.rows("*") == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSV4_HISTORY", str(tmp_path / "file"))
    assert keep(1.0) is None and history.rows("*") == []


def test_every_way_of_timing_leaves_a_run(folder, make_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "reserve_stdout", lambda: None)
    monkeypatch.setattr(ceiling_module, "measure", lambda device: MACHINE)
    monkeypatch.setattr(ceiling_module, "cache_folder", lambda: tmp_path)
    words = ["profile", str(make_checkpoint()), "--sites", "L1/attn/core", "--seconds", "0"]
    assert cli.main([*words, "--route", "reference", "--context", "9"]) == 0
    (tmp_path / "session").mkdir()
    driver = Driver(tmp_path / "session", checkpoint=str(make_checkpoint()), tokens=[1, 2, 3])
    try:
        with pytest.raises(DSV4Error, match="no op has run"):
            driver.command("history")
        driver.command("until L1/attn/core")
        driver.command("timing L1/attn/core")
        driver.command("reload")
        driver.command("step")
        found = driver.command("history L1/attn/core")
        assert driver.command("history")["rows"] == []  # of the op after it
    finally:
        driver.close()
    rows = [row for row in found["rows"] if row["implementation"] == "reference"]
    assert [row["what"] for row in rows] == ["watch", "timing", "profile"]
    assert [row["conditions"].partition(",")[0] for row in rows] == ["prefill"] * 2 + ["decode"]
    assert all(row["seconds"] > 0 and row["here"] for row in rows)


def test_ncu_says_what_it_would_run_elsewhere(make_checkpoint, tmp_path):
    driver = Driver(tmp_path, checkpoint=str(make_checkpoint()), tokens=[1, 2, 3])
    try:
        with pytest.raises(DSV4Error, match="nothing has run yet"):
            driver.command("ncu L1/attn/core")
        driver.command("until L1/attn/core")
        with pytest.raises(DSV4Error, match="runs on the CPU") as caught:
            driver.command("ncu")
        with pytest.raises(DSV4Error, match="no site"):
            driver.command("ncu L1/attn/cor")
    finally:
        driver.close()
    assert caught.value.exit_code == 3
    for part in ("dsv4-bench profile", "--sites L1/attn/core --ncu --phase prefill --context 3",
                 "--route reference"):  # fmt: skip
        assert part in caught.value.hint
