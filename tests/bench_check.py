"""How long `check`, its --minimise and --vary, and the fault suite take on the demo. A script, not a test.

    python tests/bench_check.py [--json FILE] [--tokens 300] [--only check,minimise,vary,faults]

Every command runs as a user would run it, in a process of its own; seconds are those of the whole process,
start included. `check` has a goal: under 60 s on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GOAL_SECONDS = 60.0
PLUGIN = """
from dsv4_bench.engine.registry import implementation, reference

@implementation(op="rms_norm", name="bug")
def bug(x, **params):
    return 1.01 * reference("rms_norm")(x, **params)
"""
COMMANDS: dict[str, list[str]] = {
    "check": ["check"],
    "check_bfloat16": ["check", "--dtype", "bfloat16"],
    "minimise": [
        "check",
        "--minimise",
        "--fresh",
        "--route",
        "kernel",
        "--route",
        "L7/attn/kv_norm=bug",
    ],
    "vary": ["check", "--vary"],
    "faults": ["faults"],
}


def demo_tokens(count: int) -> list[int]:
    """The demo's own prompt, again and again."""
    from dsv4_bench.workbench.loading import load_model, prompt_tokens

    prompt = prompt_tokens(load_model({"route": ["reference"]}), None, None)
    return (prompt * (count // len(prompt) + 1))[:count]


def timed(words: list[str], folder: Path) -> dict[str, Any]:
    """Seconds, exit code and the command's own verdict."""
    command = [sys.executable, "-m", "dsv4_bench.workbench", *words, "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=folder, check=False)
    seconds = time.perf_counter() - started
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = {}
    kept = {
        name: document[name] for name in ("status", "trials", "logits_error") if name in document
    }
    return {"seconds": round(seconds, 1), "exit_code": done.returncode, **kept}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the numbers (docs/bench/check.json)")
    parser.add_argument("--tokens", type=int, default=300, metavar="N")
    parser.add_argument("--only", metavar="a,b", help=f"of {','.join(COMMANDS)}")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(COMMANDS)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "tokens.json").write_text(json.dumps(demo_tokens(args.tokens)))
        (folder / "plugin.py").write_text(PLUGIN)
        prompt = ["--tokens", "tokens.json", "--plugin", "plugin.py"]
        for name in chosen:
            words = COMMANDS[name] + (prompt if COMMANDS[name][0] == "check" else [])
            rows[name] = timed(words, folder)
            print(f"{name:16} {rows[name]['seconds']:8.1f} s  exit {rows[name]['exit_code']}")
    document = {
        "tokens": args.tokens,
        "goal_seconds": {"check": GOAL_SECONDS},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": round(os.getloadavg()[2], 1),
        },
        "commands": rows,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n")
    late = "check" in rows and rows["check"]["seconds"] > GOAL_SECONDS
    return int(late or any(row["exit_code"] not in (0, 1) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
