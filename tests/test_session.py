"""The session from outside: its Python API, its events, its log of commands. One worker for most."""

from __future__ import annotations

import threading

import pytest
from client import Client, is_alive

from dsv4_bench.engine.errors import DSV4Error

TOKENS = [(17 * i + 5) % 300 for i in range(40)]


@pytest.fixture(scope="module")
def shared(make_checkpoint):
    options = {"tokens": TOKENS, "max_new_tokens": 3, "probes": ("stats",)}
    with Client(checkpoint=str(make_checkpoint()), **options) as client:
        client.wait_open()
        yield client


@pytest.fixture
def client(shared):
    """At the start, with nothing logged."""
    shared.command("reset")
    for point in shared.command("breaks")["breaks"]:
        shared.command(f"delete {point['number']}")
    shared.events.clear()
    shared.commands.clear()
    return shared


def test_state_is_current_when_a_command_returns(client):
    for line in ("step", "step 3", "layer", "break */core", "continue", "back 2"):
        result = client.command(line)
        state = result if "index" in result else client.command("status")
        assert client.state["index"] == state["index"] and client.state["why"] == state["why"]


def test_a_state_document_has_what_the_ui_shows(client):
    state = client.command("until L1/attn/core")
    assert (state["state"], state["op"], state["layer"]) == ("stopped", "attention", 1)
    assert (state["forward"], state["forwards"], state["phase"]) == (0, 3, "prefill")
    assert state["tokens"] == [0, 40] and state["of"] > state["index"] > 0
    assert state["seconds"] > 0 and state["memory"]["rss"] > 10_000_000
    assert state["snapshot_error"] is None and state["shadow"] == "off"


def test_events_of_a_step(client):
    client.command("step")
    kinds = [e["event"] for e in client.events]
    assert kinds.index("enter") < kinds.index("site") < kinds.index("reply")
    site = client.kinds("site")[0]
    assert site["site"] == "embed" and site["route"] == "reference" and site["seconds"] > 0
    assert {"started", "running"}.isdisjoint(kinds)


def test_send_returns_at_once_and_replies_carry_the_line(client):
    numbers = [client.send(line) for line in ("step", "step 2", "nosite" and "status")]
    replies = [
        client.wait_for(lambda e, n=n: e["event"] == "reply" and e["id"] == n) for n in numbers
    ]
    assert [r["line"] for r in replies] == ["step", "step 2", "status"]
    assert replies[1]["result"]["index"] == 2
    with pytest.raises(DSV4Error, match="unknown command"):
        client.send("nonsense")


def test_the_log_holds_what_was_done(client, tmp_path):
    for line in ("step 2", "status", "op", "route", "print u.shape"):
        client.command(line)
    with pytest.raises(DSV4Error):
        client.command("print nothing_here")
    target = tmp_path / "session.txt"
    assert client.command(f"save {target}") == {"file": str(target), "commands": 3}
    lines = target.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1:] == ["step 2", "route", "print u.shape"]
    with pytest.raises(DSV4Error, match="cannot write"):
        client.command(f"save {tmp_path}/no/such/folder")


def test_a_paused_run_is_logged_as_steps(client):
    client.command("step 4")
    seen = len(client.events)
    client.send("continue")
    client.wait_for(lambda e: e["event"] == "enter", after=seen)
    client.send("pause")
    reply = client.wait_for(lambda e: e["event"] == "reply" and e["line"] == "continue")
    if reply["ok"] and reply["result"]["why"] == "pause":
        assert client.commands[-1] == f"step {reply['result']['ran']}"
        client.command("status")
        index, forward = reply["result"]["index"], reply["result"]["forward"]
        log = list(client.commands)
        client.command("reset")
        for line in log:
            client.command(line)
        assert (client.state["index"], client.state["forward"]) == (index, forward)
    else:  # the run was over before the pause came
        assert reply["result"]["state"] == "finished"
        client.command("status")


def test_a_listener_that_raises_does_not_stop_the_session(client, capfd):
    client.on_event, keep = (lambda event: 1 / 0), client.on_event
    try:
        assert client.command("step")["site"] == "embed"
    finally:
        client.on_event = keep
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_commands_from_several_threads_each_get_their_own_answer(client):
    client.command("step 3")
    answers = {}

    def ask(number):
        answers[number] = client.command(f"print {number}")["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: str(i) for i in range(8)}


def test_memory_of_replies_is_not_kept(client):
    for _ in range(3):
        client.command("op") if client.state["site"] else client.command("step")
    assert not client._replies and not client._awaited and not client._sent


def test_close_ends_everything_and_answers_whoever_waits(make_checkpoint):
    client = Client(checkpoint=str(make_checkpoint()), tokens=TOKENS)
    pid = client.wait_open()["pid"]
    client.command("quit")
    assert not is_alive(pid)
    for line in ("step", "restart", "status"):
        with pytest.raises(DSV4Error, match="closed"):
            client.command(line)
    client.close()
    assert not [t for t in threading.enumerate() if t in (client._worker._reader,)]


def test_a_checkpoint_that_is_not_there(tmp_path):
    with Client(checkpoint=str(tmp_path / "nowhere")) as client:
        number = client.send("step")
        with pytest.raises(DSV4Error, match="does not exist") as error:
            client.wait_open()
        assert error.value.exit_code == 4
        reply = client.wait_for(lambda e: e["event"] == "reply" and e["id"] == number)
        assert not reply["ok"] and client.state["state"] == "dead"


def test_what_a_program_asks_is_not_in_the_script(client):
    client.command("step")
    client.send("readings", log=False)
    client.command("status")  # answered after it
    client.send("readings")
    client.command("status")
    assert client.commands == ["step", "readings"]
