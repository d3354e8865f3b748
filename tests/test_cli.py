"""The command line: exit codes, one-line errors, what goes to which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.workbench import cli
from dsv4_bench.workbench.cli import common, output

CLI = [sys.executable, "-m", "dsv4_bench.workbench"]


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return str(make_checkpoint())


@pytest.fixture
def ids(tmp_path):
    """`ids(data)`: a token file with that JSON."""

    def write(data, name="ids.json"):
        file = tmp_path / name
        file.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(file)

    return write


def run(*arguments, **options):
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, **options)


@pytest.fixture
def call(capsys, monkeypatch):
    """`call(*words)`: (code, stdout, stderr) of a command inside this process."""
    monkeypatch.setattr(output, "reserve_stdout", lambda: None)

    def run_here(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run_here


def is_one_error(err):
    """One line that says what is wrong, one that helps."""
    error, hint = err.splitlines()
    return error.startswith("dsv4-bench: error: ") and hint.startswith("hint: ")


# ------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["generat"], "unknown command 'generat'", "did you mean 'generate'?"),
        (
            ["generate", "--promt", "x"],
            "unrecognized arguments: --promt",
            "dsv4-bench generate --help",
        ),
        (["generate", "--max-new-tokens", "x"], "invalid int value: 'x'", "--help"),
        (["generate", "--max-new-tokens", "0"], "at least 1", ""),
        (["generate", "--temperature", "-1"], "must be 0 or more", ""),
        (["generate", "--temperature", "nan"], "must be 0 or more", ""),
        (["generate", "--seed", str(2**70)], "does not fit", ""),
        (["generate", "--chunks", "0"], "positive integers", "e.g."),
        (["generate", "--chunks", "1,,2"], "positive integers", "e.g."),
        (["generate", "--chunks", ""], "positive integers", "e.g."),
        (["generate", "--chunks", "a"], "positive integers", "e.g."),
        (["generate", "--dtype", "float64"], "invalid choice", "--help"),
        (["logits", "--tokens", "x"], "required: -o", "--help"),
        (["profile"], "which layer", "--layer 12"),
        (["profile", "--layer", "1", "--context", "0"], "at least 1 token", ""),
        (["script"], "required: FILE", "--help"),
        (["kernels", "extra"], "unrecognized arguments: extra", "--help"),
        (["logits", "--tokens", "/no/ids", "-o", "/tmp/x"], "no such file: /no/ids", "JSON list"),
    ],
)
def test_usage_errors(call, words, message, hint):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert is_one_error(err)
    assert message in err and hint in err


def test_no_words_without_a_terminal_shows_the_help():
    done = run(stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "") and "generate" in done.stderr


def test_help_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0 and all(f"  {command.name} " in out for command in cli.COMMANDS)
    for command in cli.COMMANDS:
        code, out, _ = call(command.name, "--help")
        assert code == 0 and out.startswith(f"usage: dsv4-bench {command.name}")


def test_version(call):
    from importlib.metadata import version

    assert call("--version") == (0, f"dsv4-bench {version('dsv4-bench')}\n", "")


def test_tui_without_a_terminal(call):
    code, out, err = call("tui")
    assert (code, out) == (3, "") and "script FILE" in err


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (None, ()),
        ("128,1,1", (128, 1, 1)),
        ("128,1,...", (128, 1)),
        ("7", (7,)),
        (" 4 , 2", (4, 2)),
    ],
)
def test_chunks(text, sizes):
    assert common.parse_chunks(text) == sizes


# ------------------------------------------------------------------------------ input that is wrong


@pytest.mark.parametrize(
    "data",
    [[1, 300], [-1], [1.0], [True], [[1, 2]], [], "not json", {"a": 1}, ["1"], [None], [10**40]],
    ids=str,
)
def test_bad_token_ids_write_nothing(call, checkpoint, ids, tmp_path, data):
    target = tmp_path / "out" / "logits.safetensors"
    target.parent.mkdir()
    code, out, err = call("logits", checkpoint, "--tokens", ids(data), "-o", target)
    assert (code, out) == (2, "")
    assert is_one_error(err)
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--route", "refrence"], 2, "unknown implementation 'refrence'"),
        (["--route", "L77/*=reference"], 2, "no site matches 'L77/*'"),
        (["--plugin", "/no/such.py"], 2, "no such plugin file"),
        (["--device", "cuda"], 3, "torch sees no CUDA device"),
        (["--numerics", "official"], 3, "not built yet"),
    ],
)
def test_engine_errors(call, checkpoint, ids, tmp_path, words, code, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    target = tmp_path / "logits.safetensors"
    got, out, err = call("logits", checkpoint, "--tokens", ids([1, 2]), "-o", target, *words)
    assert (got, out) == (code, "") and message in err
    assert is_one_error(err)
    assert not target.exists()


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("missing/logits.st", 2, "no such folder"),
        ("folder", 2, "is a folder"),
        ("/proc/logits.st", 3, "cannot write into /proc"),
    ],
)
def test_output_that_cannot_be_written_is_refused_before_work(
    call, ids, tmp_path, target, code, message
):
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = ["logits", "/no/checkpoint", "--tokens", ids([1]), "-o", tmp_path / target]
    got, _, err = call(*words)
    assert got == code and message in err
    assert sorted(tmp_path.rglob("*"))[: len(before)] == before


def test_a_checkpoint_that_is_not_there(call, monkeypatch):
    for words in (["generate"], ["profile", "--layer", "0"]):
        code, out, err = call(*words, "/no/such/folder")
        assert (code, out) == (4, "") and is_one_error(err)
    monkeypatch.setenv("DSV4_CKPT", "/nowhere")
    code, _, err = call("generate")
    assert code == 4 and "(from $DSV4_CKPT)" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--prompt", ""], "the prompt is empty"), (["--prompt", "a", "--tokens", "x"], "both given")],
)
def test_bad_prompts(call, checkpoint, words, message):
    code, out, err = call("generate", checkpoint, *words)
    assert (code, out) == (2, "") and message in err


def test_an_internal_error_is_one_line_and_v_shows_the_traceback(call, monkeypatch):
    def broken(args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("dsv4_bench.workbench.cli.kernels.run", broken)
    code, _, err = call("kernels")
    assert code == 5 and is_one_error(err) and "internal: ZeroDivisionError: oops" in err
    assert "Traceback" in call("kernels", "-v")[2]


def test_interrupt(call, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsv4_bench.workbench.cli.kernels.run", interrupted)
    assert call("kernels") == (130, "", "dsv4-bench: interrupted\n")


# ------------------------------------------------------------------------------ commands


def test_logits(call, checkpoint, ids, tmp_path):
    tokens = [(17 * i + 5) % 300 for i in range(137)]
    found = []
    for number, chunks in enumerate(([], ["--chunks", "128,1"], ["--chunks", "9"])):
        target = tmp_path / f"{number}.safetensors"
        words = [
            "logits",
            checkpoint,
            "--tokens",
            ids(tokens),
            "-o",
            target,
            "--route",
            "reference",
        ]
        code, out, err = call(*words, *chunks)
        assert (code, out) == (0, "") and f"wrote {target}" in err
        tensors = load_file(target)
        assert list(tensors) == ["logits"]
        found.append(tensors["logits"])
        assert found[-1].shape == (137, 300) and found[-1].dtype == torch.float32
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-5
    code, out, _ = call(*words, "--json")  # over a file that exists
    summary = json.loads(out)
    assert summary["shape"] == [137, 300] and summary["finite"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "0.safetensors",
        "1.safetensors",
        "2.safetensors",
        "ids.json",
    ]


def test_generate(call, checkpoint, ids):
    words = ["generate", checkpoint, "--tokens", ids([3, 4, 5]), "--max-new-tokens", "4"]
    words += ["--route", "reference"]
    code, text, err = call(*words)
    assert code == 0 and "3 prompt tokens" in err
    code, out, _ = call(*words, "--json")
    document = json.loads(out)
    assert document["prompt_tokens"] == [3, 4, 5] and len(document["tokens"]) == 4
    assert document["text"] + "\n" == text and document["route"] == ["reference"]
    hot = [*words, "--json", "--temperature", "1", "--seed"]
    first, again, other = (json.loads(call(*hot, seed)[1])["tokens"] for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_takes_text(call, checkpoint):
    words = ["generate", checkpoint, "--prompt", "hello", "--max-new-tokens", "2", "--json"]
    code, out, err = call(*words, "--route", "reference")
    assert code == 0, err
    assert json.loads(out)["prompt_tokens"][0] == 0


def test_kernels(call, tmp_path):
    code, out, _ = call("kernels", "--json")
    rows = json.loads(out)["kernels"]
    assert code == 0
    references = [row["op"] for row in rows if row["implementation"] == "reference"]
    assert references[0] == "embed" and len(references) == len(set(references)) >= 17
    assert all(row["available"] or row["reason"] for row in rows)
    assert all(len(row["hash"]) == 12 for row in rows if row["available"])
    code, out, _ = call("kernels")
    assert "| attention " in out and out.splitlines()[0].startswith("| op ")


# ------------------------------------------------------------------------------ streams


def test_json_is_all_of_stdout_whatever_a_kernel_prints(checkpoint, ids, tmp_path):
    plugin = tmp_path / "loud.py"
    plugin.write_text(
        "import os\nfrom dsv4_bench.engine.registry import implementation, reference\n"
        "print('loading')\n"
        "@implementation(op='hc_post', name='loud')\n"
        "def run(*args):\n"
        "    print('in python', flush=True); os.write(1, b'in C\\n')\n"
        "    return reference('hc_post')(*args)\n"
    )
    words = ["generate", checkpoint, "--tokens", ids([1]), "--max-new-tokens", "1", "--json"]
    done = run(*words, "--plugin", str(plugin), "--route", "reference,*/hc_post=loud")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 1
    assert {"loading", "in python", "in C"} <= set(done.stderr.splitlines())


@pytest.mark.parametrize("words", [["kernels"], ["kernels", "--json"], ["--help"]])
def test_a_reader_that_goes_away_is_no_error(words):
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*CLI, *words], stdout=writing, stderr=subprocess.PIPE, text=True, env=buffered
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_stdout_that_is_full_or_closed():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLI, "kernels"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5 and "No space left" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m dsv4_bench.workbench kernels >&-"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------ printing


def test_tables_and_units():
    text = output.table(("name", "n"), [("a", "1"), ("bb", "22")])
    assert text.splitlines() == ["| name |  n |", "| ---- | -: |", "| a    |  1 |", "| bb   | 22 |"]
    assert [output.bytes_text(n) for n in (999, 1500, 2.5e12)] == ["999 B", "1.5 kB", "2.5 TB"]
    assert json.loads(output.to_json({"a": float("nan"), 3: (float("-inf"),)})) == {
        "a": "nan",
        "3": ["-inf"],
    }


def test_options_of_a_session(ids):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--plugin", action="append", default=[])
    common.add_session_arguments(parser)
    options = common.session_options(parser.parse_args(["--probes", "none", "--chunks", "3,1"]))
    assert (options.probes, options.chunks, options.max_new_tokens) == ((), (3, 1), 8)
    with pytest.raises(DSV4Error, match="negative"):
        common.session_options(parser.parse_args(["--max-new-tokens", "-1"]))
