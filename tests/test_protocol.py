"""The worker driven by hand, over pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from client import Client, is_alive

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.protocol import (
    MAX_LINE,
    OPEN_FIELDS,
    SCHEMA_VERSION,
    check_open,
    decode,
    encode,
)

WORKER = [sys.executable, "-m", "dsv4_bench.workbench", "worker"]
TOKENS = [(17 * i + 5) % 300 for i in range(9)]


class Hand:
    """A worker, and what one writes to it and reads from it."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder)},
        )

    def write(self, line: bytes) -> None:
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def ask(self, number, line):
        self.write(json.dumps({"id": number, "line": line}).encode())
        return self.until("reply")

    def until(self, kind):
        for line in self.process.stdout:
            message = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
            if message["event"] == kind:
                return message
        pytest.fail(f"no {kind}: {self.process.stderr.read().decode()}")


@pytest.fixture
def hand(tmp_path):
    opened = Hand(tmp_path)
    yield opened
    opened.process.kill()
    opened.process.communicate()


# ------------------------------------------------------------------------------ lines


def test_numbers_that_json_lacks_travel_as_strings():
    line = encode({"a": [float("nan"), {"b": float("-inf")}], "c": 1.5, "d": (float("inf"),)})
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode(line) == {"a": ["nan", {"b": "-inf"}], "c": 1.5, "d": ["inf"]}


def test_any_text_is_one_line_of_ascii():
    text = "a\nb\u2028c\ud800 \u00e9"
    line = encode({"text": text})
    assert line.isascii() and line.count(b"\n") == 1 and decode(line)["text"] == text


@pytest.mark.parametrize("line", [b"", b"[]", b"3", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_decode_refuses(line):
    with pytest.raises(ValueError):
        decode(line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "an object was expected"),
        ({"chekpoint": "x"}, "unknown field 'chekpoint'"),
        ({"checkpoint": 3}, "checkpoint is '3', expected str"),
        ({"chunks": "128"}, "expected a list of int"),
        ({"chunks": [0]}, "positive"),
        ({"chunks": [True]}, "expected a list of int"),
        ({"max_new_tokens": -1}, "negative"),
        ({"probes": [1]}, "expected a list of str"),
    ],
)
def test_check_open_refuses(options, message):
    with pytest.raises(DSV4Error) as error:
        check_open(options)
    assert message in error.value.message


def test_check_open_takes_what_a_session_sends():
    from dataclasses import asdict

    from dsv4_bench.workbench.session import SessionOptions

    options = json.loads(json.dumps(asdict(SessionOptions())))
    options.pop("connect")
    assert set(options) <= set(OPEN_FIELDS) and "prompt" not in check_open(options)


# ------------------------------------------------------------------------------ the worker


def test_a_session_by_hand(hand, make_checkpoint, tmp_path):
    fields = {"checkpoint": str(make_checkpoint()), "tokens": TOKENS, "route": ["reference"]}
    hand.write(json.dumps({"open": fields}).encode())
    hand.write(b'{"id": 1, "line": "step 2"}')  # typed ahead
    started = hand.until("started")
    assert started["pid"] == hand.process.pid and Path(started["folder"]).parent == tmp_path
    hello = hand.until("hello")
    assert hello["schema_version"] == SCHEMA_VERSION and hello["pid"] == hand.process.pid
    assert hello["sites"][0] == {"path": "embed", "op": "embed", "layer": None, "kind": None}
    reply = hand.until("reply")
    assert reply["id"] == 1 and reply["result"]["site"] == "L0/attn/hc_pre"

    for bad in (b"garbage", b"[1]", b'{"id": "x", "line": "step"}', b'{"id": 1e999}', b"\xff" * 9):
        hand.write(bad)
        reply = hand.until("reply")
        assert (reply["id"], reply["ok"]) == (-1, False)
    assert hand.ask(7, "stepp")["error"]["hint"].startswith("did you mean 'step'")
    assert hand.ask(8, "save /tmp/x")["error"]["message"].startswith("save: done by the client")
    hand.write(b'{"id": 9, "line": "' + b"x" * (MAX_LINE + 100) + b'"}')
    assert hand.until("reply")["ok"] is False  # refused once, whole
    hand.write(b'{"id": 10}')
    assert hand.until("reply")["id"] == 10
    printed = hand.ask(11, "print [float('nan'), u.shape]")
    assert printed["ok"] and printed["result"]["text"].startswith("[nan, ")
    assert hand.ask(12, "quit") == {"event": "reply", "id": 12, "ok": True, "result": {}}
    assert hand.process.wait(10) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [b"hello", b'{"id": 1}', b'{"open": 3}', b'{"open": {"x": 1}}'])
def test_a_bad_first_line_is_fatal_and_says_what_is_expected(hand, tmp_path, line):
    hand.write(line)
    error = hand.until("fatal")["error"]
    assert "open" in error["message"] and error["exit_code"] == 2
    assert hand.process.wait(10) == 2
    assert not list(tmp_path.iterdir()) and hand.process.stderr.read() == b""


def test_a_client_that_goes_away_takes_the_worker_along(hand, make_checkpoint, tmp_path):
    """Even while an op hangs; and before a single line has come."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import time\nfrom dsv4_bench.engine.registry import implementation\n"
        "@implementation(op='embed', name='hang')\n"
        "def run(*args, **kwargs):\n    time.sleep(10_000)\n"
    )
    fields = {"checkpoint": str(make_checkpoint()), "tokens": TOKENS, "plugins": [str(plugin)]}
    hand.write(json.dumps({"open": {**fields, "route": ["embed=hang"]}}).encode())
    hand.write(b'{"id": 1, "line": "step"}')
    hand.until("enter")
    hand.process.stdin.close()
    hand.process.stdin = None
    assert hand.process.wait(10) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["plugin.py"]


def test_a_closed_pipe_before_the_first_line(hand):
    hand.process.stdin.close()
    hand.process.stdin = None
    assert hand.process.wait(10) == 0 and hand.process.stderr.read() == b""


_CLIENT = """
import sys
sys.path.insert(0, {tests!r})
from client import Client
client = Client(checkpoint={checkpoint!r}, tokens=[1, 2, 3])
print(client.wait_open()["pid"], flush=True)
client._worker._reader.join()
"""


def test_a_killed_client_leaves_no_worker(make_checkpoint):
    code = _CLIENT.format(tests=str(Path(__file__).parent), checkpoint=str(make_checkpoint()))
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pid = int(client.stdout.readline())
    watch = os.pidfd_open(pid)
    client.send_signal(signal.SIGKILL)
    client.communicate()
    import select

    assert select.select([watch], [], [], 10)[0], "the worker lives on"
    os.close(watch)


def test_a_worker_behind_a_shell_stands_in_for_ssh(make_checkpoint, tmp_path):
    command = f"sh -c 'echo banner; exec {' '.join(WORKER)} --plugin {tmp_path}/there.py'"
    (tmp_path / "there.py").write_text(
        "from dsv4_bench.engine.registry import implementation, reference\n"
        "@implementation(op='hc_post', name='there')\n"
        "def run(*args):\n    return reference('hc_post')(*args)\n"
    )
    with Client(checkpoint=str(make_checkpoint()), tokens=TOKENS, connect=command) as client:
        folder = Path(client.wait_open()["folder"])
        client.command("until L0/attn/hc_post")
        changed = client.command("route */hc_post=there")["changed"]
        assert changed[0]["effect"] == "NO EFFECT: same output bits"
        assert "banner" in client.log()
        client.command("restart")
        assert client.command("status")["why"] == "resumed before layer 0"
    assert not folder.exists() and not is_alive(client.hello["pid"])


@pytest.mark.parametrize(
    ("command", "message", "code"),
    [
        ("/no/such/program worker", "cannot start /no/such/program worker: No such file", 3),
        ("sh -c 'unbalanced", "No closing quotation", 2),
        ("  ", "the command is empty", 2),
    ],
)
def test_a_connection_that_cannot_start(command, message, code):
    with pytest.raises(DSV4Error) as error:
        Client(connect=command)
    assert message in error.value.message and error.value.exit_code == code


def test_a_connection_that_breaks_off_says_its_last_words():
    words = "exit code 255 while opening: no route to host"
    connect = "sh -c 'echo no route to host >&2; exit 255'"
    with Client(connect=connect) as client, pytest.raises(DSV4Error, match=words):
        client.wait_open()
