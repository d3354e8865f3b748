"""What may import what, seen from fresh interpreters. Times are printed, not judged."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_CODE = """
import json, sys, time
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
print(json.dumps([seconds, sorted(sys.modules)]), file=sys.__stdout__)
"""


def modules_after(statement: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", _CODE.format(statement=statement)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    seconds, modules = json.loads(run.stdout.splitlines()[-1])
    print(f"{statement}: {1000 * seconds:.0f} ms")
    return set(modules)


def in_package(modules, package):
    return sorted(m for m in modules if m.startswith(f"dsv4_bench.{package}"))


HELP = """
import contextlib, io
from dsv4_bench.workbench.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    try:
        main({words!r})
    except SystemExit as end:
        assert end.code == 0
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import dsv4_bench.workbench, dsv4_bench.workbench.session",
        "import dsv4_bench.workbench.commands",
        "import dsv4_bench.workbench.worker",
        "import dsv4_bench.workbench.tui.app",
        "import dsv4_bench.engine.config, dsv4_bench.engine.tokens, dsv4_bench.engine.errors",
        HELP.format(words=["--help"]),
        HELP.format(words=["--version"]),
        *(
            HELP.format(words=[name, "--help"])
            for name in ("generate", "logits", "profile", "kernels", "script", "tui", "worker")
        ),
    ],
)
def test_what_must_start_at_once_imports_no_torch(statement):
    modules = modules_after(statement)
    heavy = modules & {"torch", "numpy", "matplotlib", "safetensors", "transformers"}
    # The TUI draws its plots with textual-plot, which needs numpy.
    assert not heavy - ({"numpy"} if "tui.app" in statement else set())
    if "tui" not in statement:
        assert "textual" not in modules


def test_the_engine_knows_nothing_of_the_workbench():
    modules = modules_after(
        "import dsv4_bench.engine.model, dsv4_bench.engine.cpu, "
        "dsv4_bench.engine.generate, dsv4_bench.engine.checkpoint"
    )
    assert in_package(modules, "workbench") == []
    assert set(in_package(modules, "probes")) <= {"dsv4_bench.probes", "dsv4_bench.probes.tap"}


def test_probes_know_nothing_of_the_workbench():
    assert in_package(modules_after("import dsv4_bench.probes.catalogue"), "workbench") == []
