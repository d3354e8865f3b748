"""Session scripts: replay of a saved session, errors before anything runs, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from client import Client, write_plugin

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench.cli.script import read_script

TOKENS = [(17 * i + 5) % 300 for i in range(20)]
CLI = [sys.executable, "-m", "dsv4_bench.workbench"]


@pytest.fixture(scope="module")
def inputs(make_checkpoint, tmp_path_factory):
    """(arguments after the script's name, the same as fields of a Session)"""
    folder = tmp_path_factory.mktemp("inputs")
    tokens = folder / "ids.json"
    tokens.write_text(json.dumps(TOKENS))
    plugin = write_plugin(folder)
    arguments = [str(make_checkpoint()), "--tokens", str(tokens), "--plugin", plugin]
    arguments += ["--route", "reference", "--max-new-tokens", "2", "--probes", "stats"]
    fields = {"checkpoint": str(make_checkpoint()), "tokens": TOKENS, "plugins": (plugin,)}
    return arguments, {**fields, "max_new_tokens": 2, "probes": ("stats",)}


def run(file, arguments, *more, stdin=None):
    return subprocess.run(
        [*CLI, "script", str(file), *arguments, *more], input=stdin, capture_output=True, text=True
    )


def write(folder, *lines):
    file = folder / "script.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def without_times(value):
    """Without what differs from run to run."""
    if isinstance(value, dict):
        skipped = ("seconds", "memory", "times", "snapshot_error")
        return {k: without_times(v) for k, v in value.items() if k not in skipped}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_a_saved_session_gives_the_same_results(inputs, tmp_path):
    arguments, fields = inputs
    saved = tmp_path / "saved.txt"
    lines = ["step 3", "break */core", "continue", "watch o.shape", "route L0/attn/core=same"]
    lines += ["continue", "readings */core stats", "print o[0, 0, :4]", "back 3", "delete 1"]
    lines += ["route L1/attn/core=segfault", "continue", "restart", "layer", "continue", "stamps"]
    with Client(**fields) as client:
        client.wait_open()
        seen = []
        for line in lines:
            try:
                seen.append(client.command(line))
            except DSV4Error as error:
                seen.append(error.message)
        client.command(f"save {saved}")
    assert saved.read_text().splitlines()[1:] == lines
    replay = run(saved, arguments, "--json")
    assert replay.returncode == 0, replay.stderr
    done = json.loads(replay.stdout)["commands"]
    assert [entry["line"] for entry in done] == lines
    again = [e["result"] if "result" in e else e["error"]["message"] for e in done]
    for line, first, second in zip(lines, seen, again, strict=True):
        assert without_times(json.loads(json.dumps(first))) == without_times(second), line


def test_people_get_text_from_a_file_or_stdin(inputs):
    text = "# a comment\n\n  step 2\nop\nreadings\nbreak */core\nbreaks\nroute\nprint u[0, 0]\nhonesty\nquit\nstep\n"
    done = run("-", inputs[0], stdin=text)
    assert done.returncode == 0, done.stderr
    assert "> step 2\nstopped at L0/attn/hc_pre (step)" in done.stdout
    assert "output comb [20, 4, 4] float32 finite 320" in done.stdout
    assert "stats.rms" in done.stdout and "breakpoint 1: */core" in done.stdout
    assert "> honesty\n" in done.stdout and "; output bits unchanged" in done.stdout
    assert done.stdout.endswith("> quit\n{}\n")


def test_every_line_is_read_before_anything_runs(tmp_path):
    file = write(tmp_path, "step", "# fine", "brek nan > 0", "step x")
    done = run(file, ["/no/such/checkpoint"])
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0] == f"dsv4-bench: error: {file}:3: unknown command 'brek'"
    assert lines[1].startswith("hint: did you mean 'break'")
    with pytest.raises(DSV4Error, match="cannot read"):
        read_script(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("lines", "code", "error", "entries"),
    [
        (["step", "until L9/attn/core", "step"], 2, "no site matches 'L9/attn/core'", 2),
        (
            ["route L0/attn/core=segfault", "continue", "step"],
            5,
            "was killed by SIGSEGV at L0/attn",
            2,
        ),
        (["route */hc_post=segfault", "continue", "restart"], 0, "", 3),
        (["step", "print x[999]"], 2, "IndexError", 2),
    ],
)
def test_exit_codes(inputs, tmp_path, lines, code, error, entries):
    done = run(write(tmp_path, *lines), inputs[0], "--json")
    assert done.returncode == code, done.stderr
    assert error in done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads(done.stdout)["commands"]) == entries


def test_an_op_that_raises_ends_the_script(inputs, tmp_path):
    plugin = tmp_path / "raises.py"
    plugin.write_text(
        "from dsv4_bench.engine.registry import implementation\n"
        "@implementation(op='attention', name='raises')\n"
        "def run(*args, **kwargs):\n    raise RuntimeError('smem: 300 kB\\nof 228 kB')\n"
    )
    more = ("--plugin", str(plugin), "--route", "L1/attn/core=raises", "--json")
    done = run(write(tmp_path, "continue", "step"), inputs[0], *more)
    assert done.returncode == 5
    assert "L1/attn/core (raises) raised RuntimeError: smem: 300 kB\n" in done.stderr
    assert len(json.loads(done.stdout)["commands"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["/no/such/checkpoint"], 4),
        (["--device", "cuda"], 3),
        (["--route", "refrence"], 2),
        (["--probes", "statz"], 2),
        (["--shadow", "*/cor"], 2),
        (["--prompt", ""], 2),
        (["--plugin", "/no/such/plugin.py"], 2),
        (["--max-new-tokens", "-1"], 2),
    ],
)
def test_what_cannot_be_opened(inputs, tmp_path, arguments, code):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    checkpoint = [] if arguments[0].startswith("/") else inputs[0][:1]
    done = run(write(tmp_path, "step"), [*checkpoint, *arguments], "--json")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    lines = done.stderr.splitlines()
    assert lines[-2].startswith("dsv4-bench: error: ") and lines[-1].startswith("hint: ")


def test_ctrl_c_ends_the_script_and_its_worker(inputs, tmp_path):
    file = write(tmp_path, "route L0/attn/core=hang", "step", "continue")
    script = subprocess.Popen(
        [*CLI, "script", str(file), *inputs[0]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in script.stdout:
        if "stopped at embed" in line:
            break
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    watches = [os.pidfd_open(int(pid)) for pid in children]
    assert watches
    script.send_signal(signal.SIGINT)
    _, errors = script.communicate(timeout=10)
    assert script.returncode == 130 and errors.endswith("dsv4-bench: interrupted\n")
    for watch in watches:
        assert select.select([watch], [], [], 5)[0], "the worker lives on"
        os.close(watch)
