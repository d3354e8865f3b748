"""Nsight Systems: databases with its schema, damaged ones, and a real recording where nsys is"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest
from conftest import SMALL

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import with_layers
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Site
from dsv4_bench.probes import nvtx
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.cli import output
from dsv4_bench.workbench.timing import nsys, trace
from dsv4_bench.workbench.timing import recording as recordings

THREAD, OTHER = 7, 8
SCHEMA = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT);
CREATE TABLE META_DATA_EXPORT (name TEXT, value TEXT);
CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER,
    textId INTEGER, domainId INTEGER, uint64Value INTEGER, int64Value INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, streamId INTEGER,
    correlationId INTEGER, demangledName INTEGER, shortName INTEGER, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER,
    correlationId INTEGER);
"""


@pytest.fixture
def database(tmp_path):
    """Two calls of L1/attn/core by `sm90`, one of `reference`; a kernel outside; times in ns.

    Per sm90 call: gemm 400 ns and, 100 ns later, combine 50 ns, launched asynchronously: they run
    after the range has ended.
    """
    path = tmp_path / "report.sqlite"
    base = sqlite3.connect(path)
    base.executescript(SCHEMA)
    strings = {1: "L1/attn/core", 2: "gemm", 3: "combine", 4: "sm90", 5: "reference", 6: "stray"}
    base.executemany("INSERT INTO StringIds VALUES (?, ?)", strings.items())
    base.executemany(
        "INSERT INTO META_DATA_EXPORT VALUES (?, ?)",
        [("EXPORT_SCHEMA_VERSION", "3.7.2"), ("EXPORT_PRODUCT_VERSION", "2023.4.4.54")],
    )
    add = "INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    base.execute(add, (0, None, 75, "dsv4", THREAD, None, 3, None, None))
    base.execute(add, (0, None, 75, "other", THREAD, None, 4, None, None))
    base.execute(add, (5, 9000, 59, "measure", THREAD, None, 3, None, None))
    for start, route in ((100, 4), (1100, 4), (2100, 5)):
        payload = 1 * nvtx.LAYER + 237
        base.execute(add, (start, start + 500, 59, None, THREAD, 1, 3, None, payload))
        base.execute(add, (start + 10, start + 490, 59, None, THREAD, route, 3, None, None))
    base.execute(add, (100, 600, 59, "L1/attn/core", THREAD, None, 4, None, None))  # not ours
    base.execute(add, (100, 600, 59, "L9/attn/core", OTHER, None, 3, None, None))
    launch = "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)"
    kernel = "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?)"
    for number, start in enumerate((100, 1100)):
        base.execute(launch, (start + 100, start + 130, THREAD, 10 + number))
        base.execute(launch, (start + 200, start + 220, THREAD, 20 + number))
        base.execute(kernel, (start + 550, start + 950, 13, 10 + number, 2, 2, None))
        base.execute(kernel, (start + 1050, start + 1100, 13, 20 + number, 3, 3, None))
    base.execute(launch, (9500, 9510, THREAD, 30))
    base.execute(kernel, (9600, 9700, 13, 30, 6, 6, None))
    base.execute(kernel, (9800, 9900, 13, 99, 6, 6, None))  # its launch was not recorded
    base.commit()
    base.close()
    return path


def test_kernels_are_joined_to_the_range_of_their_launch(database):
    recording = recordings.read(database)
    rows = {(row["site"], row["route"]): row for row in recordings.summary(recording)}
    assert set(rows) == {
        ("L1/attn/core", "sm90"),
        ("L1/attn/core", "reference"),
        ("L9/attn/core", ""),
    }
    ours = rows["L1/attn/core", "sm90"]
    assert (ours["calls"], ours["host"]) == (2, pytest.approx(480e-9))
    assert (ours["gpu"], ours["gaps"]) == (pytest.approx(450e-9), pytest.approx(100e-9))
    assert ours["launch"] == pytest.approx(50e-9)
    assert [(k["name"], k["calls"]) for k in ours["kernels"]] == [("gemm", 1), ("combine", 1)]
    assert rows["L1/attn/core", "reference"]["kernels"] == []
    assert recording.unjoined == 2 and len(recording.kernels) == 6


@pytest.fixture
def graph(database):
    """The same, and a graph of three kernels: captured at 3100 to 3700, copied twice, replayed twice.

    In the second replay everything takes twice as long.
    """
    base = sqlite3.connect(database)
    base.execute("INSERT INTO StringIds VALUES (7, 'L1/attn/wo_b')")
    base.execute(
        "CREATE TABLE CUDA_GRAPH_NODE_EVENTS (start INTEGER, end INTEGER, nameId INTEGER, "
        "globalTid INTEGER, graphNodeId INTEGER, originalGraphNodeId INTEGER)"
    )
    add = "INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    for start, site in ((3000, 1), (3600, 7)):
        base.execute(add, (start, start + 500, 59, None, THREAD, site, 3, None, nvtx.LAYER + 237))
        base.execute(add, (start + 10, start + 490, 59, None, THREAD, 4, 3, None, None))
    node = "INSERT INTO CUDA_GRAPH_NODE_EVENTS VALUES (?, ?, NULL, ?, ?, ?)"
    for number, start in ((101, 3100), (102, 3200), (103, 3700)):
        base.execute(node, (start, start, THREAD, number, None))
        base.execute(node, (4200, 4200, THREAD, number + 100, number))
        base.execute(node, (4300, 4300, THREAD, number + 200, number + 100))
    kernel = "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?)"
    launch = "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)"
    for replay, (start, scale) in enumerate(((5000, 1), (6000, 2))):
        base.execute(launch, (start, start + 10, THREAD, 50 + replay))
        for number, at, length, name in ((301, 50, 40, 2), (302, 95, 5, 3), (303, 110, 30, 2)):
            begin = start + scale * at
            base.execute(
                kernel, (begin, begin + scale * length, 13, 50 + replay, name, name, number)
            )
    base.commit()
    base.close()
    return database


def test_kernels_of_a_graph_belong_to_the_range_in_which_they_were_captured(graph):
    recording = recordings.read(graph)
    rows = {(row["site"], row["route"]): row for row in recordings.summary(recording)}
    core, output = rows["L1/attn/core", "sm90 graph"], rows["L1/attn/wo_b", "sm90 graph"]
    assert (core["calls"], core["host"], core["layer"]) == (2, 0, 1)
    assert core["gpu"] == pytest.approx(1.5 * 45e-9) and core["gaps"] == pytest.approx(1.5 * 5e-9)
    assert [(k["name"], k["calls"]) for k in core["kernels"]] == [("gemm", 1), ("combine", 1)]
    assert output["gpu"] == pytest.approx(45e-9) and output["launch"] == 0
    assert rows["L1/attn/core", "sm90"]["calls"] == 2  # launched from Python, as before
    assert ("L1/attn/wo_b", "sm90") not in rows and recording.unjoined == 2


def test_a_graph_captured_before_the_recording_is_not_guessed_at(graph):
    change(graph, "DELETE FROM CUDA_GRAPH_NODE_EVENTS WHERE graphNodeId < 200")
    recording = recordings.read(graph)
    assert recording.unjoined == 2 + 6
    change(graph, "DROP TABLE CUDA_GRAPH_NODE_EVENTS")
    assert recordings.read(graph).unjoined == 2 + 6


def test_copies_of_each_other_end(graph):
    change(
        graph, "UPDATE CUDA_GRAPH_NODE_EVENTS SET originalGraphNodeId = 301 WHERE graphNodeId = 201"
    )
    assert recordings.read(graph).unjoined == 2 + 2


def test_an_older_export_without_graph_nodes(database):
    change(database, "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN graphNodeId")
    assert recordings.read(database).unjoined == 2


def test_idle_time_counts_overlapping_kernels_once():
    kernels = [recordings.Kernel("k", s, e, 1) for s, e in ((0, 10), (5, 8), (20, 30), (25, 40))]
    assert recordings._idle(kernels) == 10


def test_a_recording_as_a_trace(database):
    events = trace.of_recording(recordings.read(database))["traceEvents"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert "GPU stream 13" in names
    gemm = next(e for e in events if e["name"] == "gemm")
    assert (gemm["ts"], gemm["dur"]) == (pytest.approx(0.645), pytest.approx(0.4))


def change(path, *statements):
    base = sqlite3.connect(path)
    for statement in statements:
        base.execute(statement)
    base.commit()
    base.close()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DROP TABLE NVTX_EVENTS", "no NVTX events"),
        ("DELETE FROM NVTX_EVENTS WHERE domainId = 3", "domain dsv4"),
        ("UPDATE NVTX_EVENTS SET end = NULL", "was closed"),
        ("DROP TABLE META_DATA_EXPORT", "META_DATA_EXPORT is missing"),
        ("UPDATE META_DATA_EXPORT SET value = '9.1'", "export schema 9.1"),
        ("DELETE FROM META_DATA_EXPORT", "schema unknown"),
        ("ALTER TABLE NVTX_EVENTS DROP COLUMN textId", "not a database that nsys exported"),
        ("DROP TABLE StringIds", "not a database that nsys exported"),
    ],
)
def test_databases_that_cannot_be_read(database, statement, message, capsys):
    change(database, statement)
    with pytest.raises(DSV4Error, match=message) as caught:
        recordings.read(database)
    assert caught.value.exit_code == 4
    assert cli.main(["profile", "--import", str(database)]) == 4


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, 0.5, 0.95])
def test_truncated_databases(database, keep):
    data = database.read_bytes()
    database.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(DSV4Error) as caught:
        recordings.read(database)
    assert caught.value.exit_code == 4


def test_without_kernels_the_ranges_remain(database):
    change(database, "DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL")
    rows = recordings.summary(recordings.read(database))
    assert [row["gpu"] for row in rows] == [0, 0, 0]
    change(database, "DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME")
    assert len(recordings.summary(recordings.read(database))) == 3


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setattr(output, "reserve_stdout", lambda: None)

    def run(*words):
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_import_through_the_command(call, database, tmp_path):
    code, out, _ = call("profile", "--import", database, "--trace", tmp_path / "t.json")
    assert code == 0 and out.startswith("nsys 2023.4.4.54: 6 GPU kernels, 2 of them outside")
    assert "gemm x1" in out and json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    code, out, _ = call("profile", "--import", database, "--json")
    assert json.loads(out)["sites"][1]["site"] == "L1/attn/core"
    assert call("profile", "--import", tmp_path / "none.sqlite")[0] == 4
    assert call("profile", "--import", tmp_path / "none.nsys-rep")[0] == 4


def test_without_nsys_the_command_for_another_machine_is_shown(call, monkeypatch, tmp_path):
    monkeypatch.setattr(nsys.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    code, out, err = call("profile", "--layer", "12", "--nsys")
    assert (code, out) == (3, "") and err.startswith("dsv4-bench: error: nsys is not installed")
    assert "--nvtx-capture=measure@dsv4" in err and "--under nsys" in err
    (tmp_path / "r.nsys-rep").touch()
    code, _, err = call("profile", "--import", tmp_path / "r.nsys-rep")
    assert code == 3 and "nsys export --type sqlite" in err
    assert [p.name for p in tmp_path.iterdir()] == ["r.nsys-rep"]


def test_a_child_that_fails_under_nsys(monkeypatch, tmp_path):
    tool = tmp_path / "nsys"
    tool.write_text("#!/bin/sh\necho 'layer 99 does not exist' >&2; exit 2\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DSV4Error, match="layer 99") as caught:
        nsys.record(tmp_path / "r.nsys-rep", ["true"], False)
    assert caught.value.exit_code == 2
    tool.write_text("#!/bin/sh\nenv; exit 0\n")
    monkeypatch.setenv("MY_API_TOKEN", "hidden")
    with pytest.raises(CannotAnswer, match="made no report"):
        nsys.record(tmp_path / "r.nsys-rep", ["true"], False)


def test_secrets_do_not_reach_the_report(monkeypatch, tmp_path):
    tool = tmp_path / "nsys"
    tool.write_text(f"#!/bin/sh\ntouch {tmp_path}/r.nsys-rep; env\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("MY_API_TOKEN", "hidden")
    printed = nsys.record(tmp_path / "r.nsys-rep", ["true"], False)
    assert "PATH=" in printed and "hidden" not in printed


def test_ranges_cost_nothing_where_nothing_records(monkeypatch):
    monkeypatch.delenv("NVTX_INJECTION64_PATH", raising=False)
    nvtx._domain.cache_clear()
    with nvtx.site_range("L1/attn/core", 1, 5):
        pass
    assert nvtx._domain() is None and not nvtx.annotate() and Site.wrap is None


def test_payload_reads_as_layer_and_token():
    assert nvtx.payload(12, 237) == 12_000_000_237
    assert nvtx.payload(0, 5) == 5 and nvtx.payload(None, 5) == -6


@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed")
def test_a_real_recording(make_checkpoint, tmp_path):
    words = [sys.executable, "-m", "dsv4_bench.workbench", "profile", str(make_checkpoint())]
    words += ["--layer", "1", "--nsys", "--seconds", "0", "--json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    recorded = document["recorded"]["sites"]
    assert {row["site"] for row in recorded} == {site["site"] for site in document["sites"]}
    assert {row["route"] for row in recorded} >= {"reference"}
    assert all(row["layer"] == 1 and row["calls"] >= 5 and row["host"] > 0 for row in recorded)
    assert (tmp_path / document["recorded"]["report"]).exists()


def test_ranges_are_named_by_site_and_route_and_count_the_tokens(model, monkeypatch):
    """Passes count themselves; a step that is begun says where it stands, and what was is kept."""
    opened = []
    monkeypatch.setattr(nvtx, "_domain", lambda: object())
    monkeypatch.setattr(
        nvtx, "site_range", lambda *place: opened.append(place) or contextlib.nullcontext()
    )
    monkeypatch.setattr(Site, "wrap", None)
    assert nvtx.annotate()
    monkeypatch.setattr(nvtx, "_pass", nvtx._Pass())
    for site in model.sites.values():
        site.use(site.impl)
    cache = model.new_cache()
    for tokens in ([1, 2, 3], [4]):
        model.forward(cache.step([tokens]), cache)
    step = nvtx.begin(cache.step([[5, 6]]))
    model.layers[1](model.embed(step.tokens), cache.layers[1], step)
    assert [p[2] for p in opened if p[0] == "embed"] == [0, 3, 4]
    assert [p for p in opened if p[0] == "L1/attn/core"] == [
        ("L1/attn/core", 1, position) for position in (0, 3, 4)
    ]
    assert opened[1] == ("reference",) and len(opened) % 2 == 0


@pytest.fixture
def model(make_checkpoint):
    model = Transformer(Checkpoint(make_checkpoint()))
    yield model
    Site.wrap = None


EVERY_COMMAND = """
import sys
from dsv4_bench.probes.nvtx import site_range
from dsv4_bench.workbench import cli
common = ["--tokens", "T", "--chunks", "4,1"]
for words in (["generate", "--max-new-tokens", "2"], ["check"],
              ["dump", "--layers", "2", "--quick", "-o", "d.zip"],
              ["script", "session", "--max-new-tokens", "0"]):
    with site_range(words[0]):
        assert cli.main([words[0], *words[1:2 if words[0] == "script" else 1], sys.argv[1],
                         *words[2 if words[0] == "script" else 1:], *common]) in (0, 1)
"""


@pytest.mark.skipif(shutil.which("nsys") is None, reason="nsys is not installed")
def test_every_command_is_annotated_while_nsys_records(make_checkpoint, tmp_path):
    """nsys started by hand: every site that runs, with layer, position and route."""
    (tmp_path / "T").write_text("[1, 2, 3, 4, 5]")
    (tmp_path / "session").write_text("continue\n")
    tool = ["nsys", "profile", "--trace=nvtx", "--sample=none", "--cpuctxsw=none"]
    tool += ["--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0", "--output=all"]
    small = make_checkpoint(config=with_layers(SMALL, 3))
    child = [sys.executable, "-c", EVERY_COMMAND, str(small)]
    done = subprocess.run(tool + child, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    nsys.export(tmp_path / "all.nsys-rep", tmp_path / "all.sqlite")
    found = collections.defaultdict(set)
    for item in recordings.read(tmp_path / "all.sqlite").ranges:
        chain = [item]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        if len(chain) > 1 and chain[1].name == "L2/attn/core":
            command = chain[2].name if len(chain) > 2 else "session"  # its worker is a process
            found[command].add((chain[1].payload - 2 * nvtx.LAYER, item.name))
    both = {(position, route) for position in (0, 4) for route in ("cpu", "reference")}
    kernel = {(0, "cpu"), (4, "cpu")}
    assert found["generate"] == kernel | {(5, "cpu")} and found["session"] == kernel
    assert found["check"] == both and found["dump"] >= kernel
