"""Content-addressed builds: keys, publication, errors. Uses a tiny source of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv4_bench.engine import build
from dsv4_bench.engine.errors import CannotAnswer

FLAGS = ("-shared", "-fPIC")

needs_compiler = pytest.mark.skipif(build.compiler()[0] is None, reason=build.compiler()[1])


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source folder with one kernel and one header, and an empty cache."""
    root = tmp_path / "csrc"
    for name, text in {
        "common/abi.h": "#define ANSWER 42\n",
        "cpu/local.h": "#define BONUS 0\n",
        "cpu/answer.cpp": '#include "../common/abi.h"\n#include "local.h"\n'
        'extern "C" int answer() { return ANSWER + BONUS; }\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(build, "csrc", lambda: root)
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path / "cache"))
    return root


def recipe(flags: tuple[str, ...] = FLAGS, arch: str = "test", **changes) -> build.Build:
    command = changes.get("compiler", build.compiler()[0])
    return build.Build("answer", ("cpu/answer.cpp",), flags, arch, command)


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def leftovers() -> list[str]:
    return [path.name for path in build.cache_dir().iterdir() if ".tmp-" in path.name]


def test_the_real_sources_are_found():
    """In a checkout and in an installed package: csrc is a package of data."""
    assert (build.csrc() / "common" / "abi.h").is_file()
    assert (build.csrc() / "cpu" / "linear.cpp").is_file()


def test_import_builds_nothing(tmp_path):
    script = "import dsv4_bench.engine.cpu as c; from dsv4_bench.engine import cpu_library as l;"
    script += "from dsv4_bench.engine.registry import Context; l.requires(Context())"
    env = {**os.environ, "DSV4_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_builds_once_and_keeps_the_evidence(tree):
    made = recipe().library()
    assert answer(made) == 42
    stamp = made.stat().st_mtime_ns
    assert recipe().library() == made and made.stat().st_mtime_ns == stamp
    kept = {path.relative_to(made.parent).as_posix() for path in made.parent.rglob("*")}
    assert {"build.log", "command.txt", "cpu/answer.cpp", "common/abi.h", "cpu/local.h"} <= kept
    assert "answer.cpp" in (made.parent / "command.txt").read_text()
    assert leftovers() == []


@needs_compiler
def test_the_key_covers_all_inputs(tree, monkeypatch):
    base = recipe().key
    assert recipe().key == base
    assert recipe((*FLAGS, "-O2")).key != base
    assert recipe(arch="other").key != base
    os.utime(tree / "cpu" / "answer.cpp", (1, 1))
    assert recipe().key == base, "a time stamp decides nothing"
    for name in ("cpu/answer.cpp", "cpu/local.h", "common/abi.h"):
        text = (tree / name).read_text()
        (tree / name).write_text(text + "// changed\n")
        assert recipe().key != base, name
        (tree / name).write_text(text)
    (tree / "cpu" / "unused.h").write_text("#define UNUSED 1\n")
    assert recipe().key == base, "a header that nothing includes decides nothing"
    (tree / "cpu" / "local.h").write_text('#include "unused.h"\n#define BONUS 0\n')
    nested = recipe().key
    (tree / "cpu" / "unused.h").write_text("#define UNUSED 2\n")
    assert base != nested != recipe().key, "a header's header does"
    monkeypatch.setattr(build, "compiler_version", lambda command: "another compiler 99")
    assert recipe().key != base


@needs_compiler
def test_an_edit_gives_the_new_code(tree):
    old = recipe().library()
    (tree / "cpu" / "local.h").write_text("#define BONUS 1\n")
    new = recipe().library()
    assert answer(new) == 43 and answer(old) == 42 and new != old


@needs_compiler
def test_what_was_hashed_is_what_is_built(tree):
    planned = recipe()
    (tree / "cpu" / "local.h").write_text("#define BONUS 1\n")
    assert answer(planned.library()) == 42


@needs_compiler
def test_a_failed_build_shows_the_compilers_lines(tree):
    (tree / "cpu" / "answer.cpp").write_text("int broken() { return undeclared_thing; }\n")
    with pytest.raises(CannotAnswer) as caught:
        recipe().library()
    message = caught.value.message
    assert "cpu/answer.cpp:1" in message and "undeclared_thing" in message
    assert "command: " in message and "-shared" in message
    log = Path(message.rpartition("log: ")[2])
    assert "undeclared_thing" in log.read_text()
    assert leftovers() == [] and recipe().find() is None
    (tree / "cpu" / "answer.cpp").write_text('extern "C" int answer() { return 7; }\n')
    assert answer(recipe().library()) == 7


def test_what_a_compiler_says_is_shown_without_colours_and_folders_of_ours(tree, tmp_path):
    script = tmp_path / "compiler"
    script.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit\n"
        "printf '\\033[91merror:\\033[0m no such name\\n   --> %s/kernel.py:7\\n 7 | code\\n' $PWD; exit 3\n"
    )
    script.chmod(0o755)
    with pytest.raises(CannotAnswer) as caught:
        recipe(compiler=str(script)).library()
    shown = caught.value.message.splitlines()
    assert shown[0] == "building answer failed (exit 3):"
    assert shown[1:3] == ["error: no such name", "   --> kernel.py:7"]
    assert shown[3].startswith("command: ")


BUILD_SCRIPT = """
import sys
from pathlib import Path
from dsv4_bench.engine import build
build.csrc = lambda: Path(sys.argv[1])
print(build.Build("answer", ("cpu/answer.cpp",), ("-shared", "-fPIC"), "test", sys.argv[2]).library())
"""


def start_build(tree: Path, compiler: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD_SCRIPT, str(tree), compiler]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def slow_compiler(tmp_path: Path, seconds: float) -> Path:
    """A compiler that says when it starts, then takes its time."""
    path = tmp_path / "slow-g++"
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] || {{ echo run >> {tmp_path}/runs; sleep {seconds}; }}\n'
        f'exec {build.compiler()[0]} "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_compiler
def test_two_processes_build_once(tree, tmp_path):
    compiler = str(slow_compiler(tmp_path, 0.5))
    running = [start_build(tree, compiler) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(paths) == 1 and answer(Path(paths.pop())) == 42
    assert (tmp_path / "runs").read_text() == "run\n"
    assert leftovers() == []


@needs_compiler
def test_a_killed_build_leaves_no_lock_and_no_half_file(tree, tmp_path):
    compiler = str(slow_compiler(tmp_path, 60))
    process = start_build(tree, compiler)
    deadline = time.monotonic() + 30
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(leftovers()) == 1 and recipe(compiler=compiler).find() is None
    slow_compiler(tmp_path, 0)
    assert answer(recipe(compiler=compiler).library()) == 42
    assert leftovers() == []


@needs_compiler
def test_a_damaged_build_is_made_again(tree):
    made = recipe().library()
    made.unlink()
    assert recipe().find() is None and answer(recipe().library()) == 42


@needs_compiler
def test_an_unwritable_cache_is_a_clear_error(tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path / "file"))
    with pytest.raises(CannotAnswer, match=r"cannot write the kernel cache .*/file") as caught:
        recipe().library()
    assert "$DSV4_CACHE" in caught.value.hint


@needs_compiler
def test_a_full_disk_is_a_clear_error(tree, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_sync", full)
    with pytest.raises(CannotAnswer, match="No space left on device"):
        recipe().library()
    assert leftovers() == [] and recipe().find() is None


def test_no_compiler_is_a_reason(tree, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build.compiler() == (None, "no C++ compiler: set $CXX or install g++")
    with pytest.raises(CannotAnswer, match="no C\\+\\+ compiler"):
        recipe(compiler=None).library()


@needs_compiler
def test_without_a_compiler_an_earlier_build_serves(tree):
    made = recipe().library()
    assert recipe(compiler=None).library() == made
    assert recipe((*FLAGS, "-O3"), compiler=None).find() is None


@needs_compiler
def test_cxx_is_honoured(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    command, reason = build.compiler()
    assert command is None and "$CXX is 'no-such-compiler -x'" in reason
    monkeypatch.delenv("CXX")
    slow = slow_compiler(tmp_path, 0)
    monkeypatch.setenv("CXX", f"{slow} -DUNUSED")
    made = build.Build("answer", ("cpu/answer.cpp",), FLAGS, "test", build.compiler()[0]).library()
    assert answer(made) == 42 and (tmp_path / "runs").exists()
    assert "-DUNUSED" in (made.parent / "command.txt").read_text()


def test_a_compiler_that_does_not_run(tree):
    with pytest.raises(CannotAnswer, match="--version failed"):
        recipe(compiler="/bin/false").library()
