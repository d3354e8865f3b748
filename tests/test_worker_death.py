"""A worker that dies or hangs: what the session says, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from client import Client, is_alive, write_plugin

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench import session as session_module
from dsv4_bench.workbench.session import WorkerDied

TOKENS = [(17 * i + 5) % 300 for i in range(139)]
OPTIONS = {"tokens": TOKENS, "chunks": (130, 7), "max_new_tokens": 2, "probes": ("stats",)}
LAST = "print [float(v) for v in y[-1, :40]]"  # at head/logits


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    return write_plugin(tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def start(make_checkpoint, plugin, tmp_path, monkeypatch):
    """`start(**options)`: a session; at the end no process and no folder of it is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    opened = []

    def begin(**options):
        fields = {"checkpoint": str(make_checkpoint()), "plugins": (plugin,), **OPTIONS}
        client = Client(**{**fields, **options})
        opened.append(client)
        return client

    yield begin
    for client in opened:
        started = time.monotonic()
        client.close()
        assert (
            time.monotonic() - started < 5
        )  # one second, on a machine that has nothing else to do
        assert not is_alive(client._worker.pid)
    assert not list(tmp_path.glob("dsv4-session-*"))


def last_logits(client):
    """Run to the logits of the last forward pass; their printed values, and the tokens after it."""
    while client.state["forward"] < 3 or client.state["site"] != "head/logits":
        state = client.command("until head/logits")
        assert state["state"] == "stopped", state["why"]
    values = client.command(LAST)["text"]
    return values, client.command("continue")["generated"]


@pytest.fixture(scope="module")
def undisturbed(make_checkpoint):
    with Client(checkpoint=str(make_checkpoint()), **OPTIONS) as client:
        client.wait_open()
        return last_logits(client)


def die(client, line="continue"):
    with pytest.raises(WorkerDied) as death:
        client.command(line)
    return death.value.event


DEATHS = [
    ("segfault", "SIGSEGV", "L2/attn/core", "attention", "continue"),
    ("abort", "SIGABRT", "L1/attn/compressor/pool", "compressor", "continue"),
    ("exit", None, "L3/attn/index/compressor/write", "cache_write", "continue"),
    ("segfault", "SIGSEGV", "head/logits", "linear", "continue"),
]


@pytest.mark.parametrize(("how", "number", "site", "op", "line"), DEATHS)
def test_death_in_an_op_is_named_and_survived(start, undisturbed, how, number, site, op, line):
    client = start()
    client.wait_open()
    client.command("layer 6")  # into the second chunk, so that there is a cache to lose
    client.command("goto 0")
    client.command("watch 1 + 1")
    client.command("break inf > 0")
    client.command("break abs_max > 1e30")
    client.command("delete 1")
    client.command(f"route {site}={how}")
    before = client.command("readings")["readings"]

    event = die(client, line)
    assert (event["site"], event["signal"]) == (site, number)
    assert event["message"].endswith(f"at {site} ({how})")
    assert client.state["state"] == "dead"
    if number:
        assert event["stderr"][-3].startswith("Fatal Python error")
        assert "plugin.py" in event["stderr"][-1] + event["stderr"][-2]
    with pytest.raises(DSV4Error) as refused:
        client.command("status")
    assert "restart" in refused.value.hint

    client.command("restart")
    state = client.command("status")
    layer = site.split("/")[0]
    assert (
        state["why"] == f"resumed before {'the head' if layer == 'head' else 'layer ' + layer[1:]}"
    )
    assert state["route"][-1] == f"{site}=reference"
    assert [(b["number"], b["text"]) for b in state["breaks"]] == [(2, "abs_max > 1e30")]
    assert [w["expression"] for w in state["watches"]] == ["1 + 1"]
    assert state["probes"] == ["stats"]
    assert f"{site} runs the reference now" in client.log()
    kept = {(r["site"], r["name"]) for r in client.command("readings")["readings"]}
    assert kept >= {(r["site"], r["name"]) for r in before}
    with pytest.raises(DSV4Error, match="worker that is gone"):
        client.command("goto 0" if layer != "L0" else "back")
    assert last_logits(client) == undisturbed
    assert client.commands.count("continue") >= 2 and "restart" in client.commands


def test_a_second_death_is_survived_too(start, undisturbed):
    client = start(route=("reference", "L1/attn/core=segfault", "L2/attn/core=abort"))
    client.wait_open()
    assert die(client)["site"] == "L1/attn/core"
    client.command("restart")
    assert die(client)["site"] == "L2/attn/core"
    client.command("restart")
    route = client.command("route")["route"]
    assert route[-2:] == ["L1/attn/core=reference", "L2/attn/core=reference"]
    client.command("route L1/attn/core=same")  # what the user says later holds
    client._worker._process.kill()
    client.wait_for(lambda e: e["event"] == "died" and e["signal"] == "SIGKILL")
    client.command("restart")
    assert client.command("route")["route"][-1] == "L1/attn/core=same"
    assert last_logits(client) == undisturbed


@pytest.mark.parametrize("line", ["step 30", "until head/hc_head", "layer 7", "step"])
def test_a_worker_killed_while_it_waits_has_no_culprit(start, undisturbed, line):
    client = start()
    client.wait_open()
    state = client.command(line)
    os.kill(client.hello["pid"], signal.SIGKILL)
    event = client.wait_for(lambda e: e["event"] == "died")
    assert (event["site"], event["signal"]) == (state["site"], "SIGKILL")
    client.command("restart")
    if line == "until head/hc_head":
        assert client.command("status")["why"] == "resumed before the head"
    assert client.command("route")["route"] == ["reference"]
    assert last_logits(client) == undisturbed


def test_a_shadow_that_kills_is_switched_off(start, undisturbed, tmp_path):
    """The op runs its reference; it is the other route, run beside it, that crashes."""
    text = """
import ctypes
from dsv4_bench.engine.registry import implementation
@implementation(op="gather_swa", name="cpu")
def run(*args):
    ctypes.string_at(0)
"""
    client = start(plugins=(write_plugin(tmp_path, text),), shadow="L1/attn/gather_swa")
    client.wait_open()
    assert die(client)["message"].endswith("L1/attn/gather_swa (shadow cpu)")
    client.command("restart")
    state = client.command("status")
    assert (state["shadow"], state["route"]) == ("off", ["reference"])
    assert "shadow is off now" in client.log()
    assert last_logits(client) == undisturbed


def test_death_of_a_switch_at_a_stop_keeps_the_old_route(start, undisturbed):
    client = start()
    client.wait_open()
    client.command("until L1/attn/core")
    event = die(client, "route L1/attn/core=segfault")
    assert event["message"].endswith("L1/attn/core (segfault)")
    client.command("restart")
    assert "segfault" not in str(client.command("route")["route"])
    assert last_logits(client) == undisturbed


@pytest.mark.parametrize("how", ["hang", "hang_in_c"])
def test_a_hung_op_is_named_by_pause_and_ended_by_restart(start, undisturbed, monkeypatch, how):
    monkeypatch.setattr(session_module, "_HUNG_SECONDS", 0.2)
    client = start(route=("reference", f"L2/attn/core={how}"))
    client.wait_open()
    number = client.send("continue")
    client.wait_for(lambda e: e["event"] == "enter" and e["site"] == "L2/attn/core")
    client.send("pause")
    late = client.wait_for(lambda e: e["event"] == "log" and "has been running" in e["text"])
    assert late["text"].startswith(f"L2/attn/core ({how})") and "`restart`" in late["text"]
    client.command("restart")
    reply = client.wait_for(lambda e: e["event"] == "reply" and e["id"] == number)
    assert not reply["ok"] and "ended by `restart`" in reply["error"]["message"]
    state = client.command("status")
    assert state["why"] == "resumed before layer 2"
    assert state["route"][-1] == "L2/attn/core=reference"
    assert last_logits(client) == undisturbed


def test_close_does_not_wait_for_a_hung_op(start):
    client = start(route=("L0/attn/core=hang_in_c",))
    client.wait_open()
    client.send("continue")
    client.wait_for(lambda e: e["event"] == "enter" and e["site"] == "L0/attn/core")
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 2.5
    with pytest.raises(DSV4Error, match="closed"):
        client.command("step")
    with pytest.raises(DSV4Error, match="closed"):
        client.command("restart")


def test_restart_of_a_healthy_worker_goes_on_there(start, undisturbed):
    client = start()
    client.wait_open()
    client.command("layer 3")
    client.command("step 5")
    client.command("restart")
    assert client.command("status")["why"] == "resumed before layer 3"
    assert client.command("route")["route"] == ["reference"]
    assert last_logits(client) == undisturbed


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV while opening"),
        (
            "import os; os.write(2, b'no driver\\n'); os._exit(7)",
            "exit code 7 while opening: no driver",
        ),
    ],
)
def test_death_while_opening(start, tmp_path, code, words):
    bad = write_plugin(tmp_path, code)
    client = start(plugins=(bad,))
    with pytest.raises(WorkerDied, match=words) as death:
        client.wait_open()
    assert death.value.exit_code == 5
    assert client.state["state"] == "dead"
    Path(bad).write_text("raise ValueError('two\\nlines')")
    with pytest.raises(DSV4Error, match="ValueError: two lines"):
        client.command("restart")


def test_a_session_folder_that_vanishes_costs_only_the_snapshots(start, undisturbed):
    import shutil

    client = start()
    client.wait_open()
    client.command("layer")
    shutil.rmtree(client.hello["folder"])
    state = client.command("layer")
    assert "No such file" in state["snapshot_error"]
    assert last_logits(client) == undisturbed


def test_a_full_disk_costs_only_the_snapshots(start, undisturbed):
    """A limit on file sizes stands in for it: the first snapshots fit, then none does."""
    import sys

    command = f"sh -c 'ulimit -f 200; exec {sys.executable} -m dsv4_bench.workbench worker'"
    client = start(connect=command)
    client.wait_open()
    state = client.command("continue")
    assert state["state"] == "finished"
    assert state["snapshot_error"], "the limit was not reached"
    client.command("goto 1")
    client.command("reset")
    assert last_logits(client) == undisturbed


def test_noise_of_kernels_becomes_log_events(start):
    client = start(route=("reference", "L0/attn/core=noise"))
    client.wait_open()
    assert client.command("layer")["site"] == "L0/ffn/hc_post"
    client.wait_for(lambda e: e["event"] == "log" and "caf\u00e9" in e["text"])
    log = client.log()
    assert "from C\n" in log and log.count("x") >= 1_000_000
    assert "not understood" not in log
