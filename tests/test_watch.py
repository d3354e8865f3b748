"""Hot reload: saved code is taken up at the op the session stands at, and nothing is lost when it is bad"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from driver import Driver

from dsv4_bench.engine import registry
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench import reloading
from dsv4_bench.workbench.reloading import sources
from dsv4_bench.workbench.saving import fingerprint

SITE = "L1/attn/hc_post"
CODE = """
from dsv4_bench.engine.registry import implementation, reference

@implementation(op="hc_post", name="watched")
def mine(*args, **kwargs):
    return reference("hc_post")(*args, **kwargs) * FACTOR
"""


def save(path, factor):
    path.write_text(CODE.replace("FACTOR", factor))
    return path


@pytest.fixture
def driver(make_checkpoint, tmp_path):
    plugin = save(tmp_path / "plugin.py", "1.0")
    folder = tmp_path / "session"
    folder.mkdir()
    driver = Driver(
        folder,
        checkpoint=str(make_checkpoint()),
        plugins=[str(plugin)],
        route=["reference", "*/hc_post=watched"],
        tokens=[1, 2, 3, 4, 5],
        shadow=SITE,
    )
    driver.plugin = plugin
    driver.command(f"until {SITE}")
    yield driver
    driver.close()
    registry.IMPLEMENTATIONS["hc_post"].pop("watched", None)


def test_every_save_is_one_attempt_with_hash_error_and_time(driver):
    first = driver.command("reload")
    assert first["reloaded"] and first["files"] == [str(driver.plugin)]
    save(driver.plugin, "1.01")
    second = driver.command("reload")
    right, wrong = second["history"]
    assert (right["verdict"], wrong["verdict"]) == ("ok", "over")
    assert wrong["own_error"] == pytest.approx(0.01, rel=1e-3) and right["own_error"] == 0
    assert right["hash"] != wrong["hash"] and min(right["seconds"], wrong["seconds"]) > 0
    save(driver.plugin, "1.0")
    assert driver.command("reload")["history"][2]["hash"] == right["hash"]


def test_what_nobody_compares_is_compared_here(driver):
    driver.command("shadow off")
    save(driver.plugin, "1.01")
    (attempt,) = driver.command("reload")["history"]
    assert attempt["verdict"] == "over"
    assert driver.debugger.shadow.pattern == ""


def test_a_dsl_compiler_is_warm_before_the_first_save(make_checkpoint, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(reloading.dsl_library, "keep_warm", lambda: started.append(True))
    plugin = save(tmp_path / "plugin.py", "1.0")
    plugin.write_text(plugin.read_text().replace("watched", "cutedsl"))
    route = ["reference", "*/hc_post=cutedsl"]
    driver = Driver(
        tmp_path,
        checkpoint=str(make_checkpoint()),
        plugins=[str(plugin)],
        route=route,
        tokens=[1, 2],
    )
    try:
        driver.command("until L1/attn/norm")
        driver.command("reload")
        assert not started
        driver.command(f"until {SITE}")
        assert driver.command("reload")["history"][-1]["verdict"] == "ok"
        assert started
    finally:
        driver.close()
        registry.IMPLEMENTATIONS["hc_post"].pop("cutedsl", None)


def test_what_flows_on_is_what_the_new_code_gave(driver):
    before = driver.debugger.held.result.clone()
    save(driver.plugin, "2.0")
    driver.command("reload")
    assert driver.debugger.held.result.equal(before * 2)


def test_nothing_happens_without_a_change(driver):
    driver.command("reload")
    count = len(driver.events)
    driver.plugin.touch()
    assert not driver.command("reload")["reloaded"]
    assert [e["event"] for e in driver.events[count:]] == ["reply"]


@pytest.mark.parametrize(
    ("code", "message"),
    [("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("", "")],
)
def test_code_that_does_not_load_changes_nothing(driver, code, message):
    driver.command("reload")
    good = driver.debugger.held.result.clone()
    driver.plugin.write_text(code)
    attempt = driver.command("reload")["history"][-1]
    assert message in attempt["error"]
    assert driver.debugger.held.result.equal(good)
    save(driver.plugin, "1.0")
    assert driver.command("reload")["history"][-1]["verdict"] == "ok"


def test_code_that_raises_is_an_attempt_and_the_op_stands(driver):
    driver.command("reload")
    good = driver.debugger.held.result.clone()
    save(driver.plugin, "undefined_name")
    attempt = driver.command("reload")["history"][-1]
    assert "NameError" in attempt["error"]
    assert driver.debugger.held.result.equal(good)


def test_there_must_be_an_op(make_checkpoint, tmp_path):
    driver = Driver(tmp_path, checkpoint=str(make_checkpoint()), tokens=[1, 2])
    with pytest.raises(DSV4Error, match="stands at no op"):
        driver.command("reload")
    driver.close()


def test_sources_of_compiled_and_reference_code():
    impl = registry.IMPLEMENTATIONS["hc_post"]
    assert sources(impl["reference"]) == []
    names = {path.name for path in sources(impl["cpu"])}
    assert {"hyper.cpp", "abi.h"} <= names and not any(name.endswith(".cu") for name in names)
    names = {path.name for path in sources(registry.IMPLEMENTATIONS["linear"]["cutedsl"])}
    assert {"linear_sm90.py", "codes.py", "linear.py", "library.py"} <= names
    both = {path.name for path in sources(registry.IMPLEMENTATIONS["linear"]["sm90+cutedsl"])}
    assert names | {"linear_sm90.cu", "abi.h"} <= both


def test_sources_can_be_asked_for_before_anything_runs(driver):
    found = driver.command(f"sources {SITE}")
    assert (found["implementation"], found["files"]) == ("watched", [str(driver.plugin)])
    with pytest.raises(DSV4Error, match="no site matches"):
        driver.command("sources L1/nothing")


def test_a_fingerprint_goes_by_content(tmp_path):
    path = tmp_path / "k.cu"
    assert fingerprint([path]) == fingerprint([path])
    seen = {fingerprint([path])}
    for text in ("", "a", "b"):
        path.write_text(text)
        seen.add(fingerprint([path]))
    assert len(seen) == 3  # no file and an empty one are the same


def test_watch_in_a_terminal(make_checkpoint, tmp_path):
    """The command, a save while it runs, a kernel that kills the worker, and the repair."""
    plugin = save(tmp_path / "plugin.py", "1.0")
    words = [sys.executable, "-m", "dsv4_bench.workbench", "watch", SITE, str(make_checkpoint())]
    words += ["--plugin", str(plugin), "--route", "*/hc_post=watched", "--attempts", "4"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline()]
        for factor in ("1.5", "__import__('os').abort()", "1.0"):
            time.sleep(0.3)
            save(plugin, factor)
            lines.append(process.stdout.readline())
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert ": ok" in lines[0] and ": over" in lines[1] and ": ok" in lines[3]
    assert "SIGABRT" in lines[2] and SITE in lines[2]


def test_a_worker_that_dies_before_the_first_attempt_is_one(make_checkpoint, tmp_path):
    """The code that is there kills the worker at once: that is said, and the next save is tried."""
    plugin = save(tmp_path / "plugin.py", "__import__('os').abort()")
    words = [sys.executable, "-m", "dsv4_bench.workbench", "watch", SITE, str(make_checkpoint())]
    words += ["--plugin", str(plugin), "--route", "*/hc_post=watched", "--attempts", "2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        first = process.stdout.readline()
        save(plugin, "1.0")
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert first.startswith("watched: ") and "SIGABRT" in first and "/hc_post" in first
    assert ": ok" in out


def test_watch_as_json(make_checkpoint, tmp_path):
    plugin = save(tmp_path / "plugin.py", "1.5")
    words = [sys.executable, "-m", "dsv4_bench.workbench", "watch", SITE, str(make_checkpoint())]
    words += ["--plugin", str(plugin), "--route", "*/hc_post=watched", "--attempts", "1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    (attempt,) = json.loads(done.stdout)["attempts"]
    assert attempt["verdict"] == "over" and attempt["own_error"] == pytest.approx(0.5, rel=1e-3)
