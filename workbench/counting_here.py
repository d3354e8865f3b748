"""`ncu` in a session: what one op's kernels do on the GPU, counted in a process of its own"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.workbench.debugger import Debugger

_LOOK = 0.2  # seconds between two looks at whether a pause was asked for


def count_here(debugger: Debugger, site: str, plugins: Sequence[str]) -> dict[str, Any]:
    """Counters of the kernels that `site` launches at the session's position, by Nsight Compute.

    The checkpoint is opened a second time, by `dsv4-bench profile --ncu`; the session stays where it
    is. Raises CannotAnswer without ncu or a GPU, with the command for a machine that has them, and
    DSV4Error for a session that has not begun or a pause.
    """
    step = debugger.step
    if step is None:
        raise DSV4Error("nothing has run yet", "`step` runs the first op")
    words = _words(debugger, site, plugins)
    reason = _missing(debugger)
    if reason:
        raise CannotAnswer(f"ncu: {reason}", f"with a GPU and ncu: dsv4-bench {shlex.join(words)}")
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        tokens.write_text(json.dumps(debugger.tokens[: debugger.span[1]]))
        command = [sys.executable, "-m", "dsv4_bench.workbench", *words]
        printed = _run(debugger, [*command, "--tokens", str(tokens), "--json"], folder)
    return {"site": site, "kernels": json.loads(printed)["kernels"]}


def _missing(debugger: Debugger) -> str:
    if debugger.model.device.type != "cuda":
        return "it counts what GPU kernels do, and this session runs on the CPU"
    return "" if shutil.which("ncu") else "Nsight Compute is not installed here"


def _words(debugger: Debugger, site: str, plugins: Sequence[str]) -> list[str]:
    """The command line of `profile` for the op as the session runs it."""
    model, step = debugger.model, debugger.step
    assert step is not None
    words = ["profile", str(model.checkpoint.folder), "--sites", site, "--ncu"]
    words += ["--phase", "decode" if step.is_decode and step.starts[0] else "prefill"]
    words += ["--context", str(debugger.span[1])]
    words += ["--dtype", str(model.dtype).removeprefix("torch."), "--device", "cuda"]
    for entry in model.route:
        words += ["--route", str(entry)]
    for plugin in plugins:
        words += ["--plugin", plugin]
    return words


def _run(debugger: Debugger, command: list[str], folder: str) -> str:
    """What `command` prints. Raises DSV4Error when it fails, or when the session is paused."""
    child = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while True:
            try:
                out, err = child.communicate(timeout=_LOOK)
                break
            except subprocess.TimeoutExpired:
                if debugger.pause:
                    raise DSV4Error("ncu: paused; nothing was counted") from None
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        lines = [line for line in err.splitlines() if line.strip()] or [f"exit {child.returncode}"]
        raise DSV4Error(f"ncu: {lines[-2] if len(lines) > 1 else lines[-1]}", lines[-1])
    return out
