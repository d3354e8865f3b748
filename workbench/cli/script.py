"""`dsv4-bench script FILE [CKPT]`: session commands from a file, without a screen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_bench.engine.errors import DSV4Error, ExitCode
from dsv4_bench.workbench.cli import common, output
from dsv4_bench.workbench.commands import parse

if TYPE_CHECKING:
    from dsv4_bench.workbench.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="one session command a line; # comments; - for stdin"
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT")
    common.add_session_arguments(parser)


def run(args: argparse.Namespace) -> int:
    lines = read_script(args.file)
    options = common.session_options(args)
    from dsv4_bench.workbench.session import Session

    done: list[dict[str, Any]] = []
    with Session(options, on_event=_narrate_log) as session:
        hello = session.wait_open()
        for note in hello["notes"]:
            output.narrate(f"note: {note}")
        try:
            for number, line in enumerate(lines):
                goes_on = lines[number + 1 : number + 2] == ["restart"]
                done.append(_run_line(session, line, goes_on))
                if not args.json:
                    print(f"> {line}\n{describe(done[-1])}", flush=True)
                if line == "quit":
                    break
        except _Stopped as stopped:
            done.append(stopped.entry)
            raise stopped.error from None
        finally:
            if args.json:
                output.print_json({"commands": done})
    return ExitCode.OK


class _Stopped(Exception):
    """The script ends here: `entry` is what is known of the command, `error` says why."""

    def __init__(self, entry: dict[str, Any], error: DSV4Error) -> None:
        super().__init__(error.message)
        self.entry, self.error = entry, error


def _run_line(session: Session, line: str, goes_on: bool) -> dict[str, Any]:
    """One command and its result or error. Raises _Stopped unless `goes_on` after a death.

    An op that raised ends the script too: a person would switch its route or look around, but a
    script that goes on would show numbers of a run that stands still.
    """
    from dsv4_bench.workbench.session import WorkerDied

    try:
        result = session.command(line)
    except DSV4Error as error:
        entry = {"line": line, "error": error.to_dict()}
        if goes_on and isinstance(error, WorkerDied):
            return entry
        raise _Stopped(entry, error) from None
    entry = {"line": line, "result": result}
    if result.get("state") == "failed" and parse(line).command.runs:
        raise _Stopped(entry, DSV4Error(result["why"], "", ExitCode.CRASHED))
    return entry


def _narrate_log(event: dict[str, Any]) -> None:
    if event["event"] == "log":
        sys.stderr.write(event["text"])


def read_script(file: str) -> list[str]:
    """The commands of a script; every line is parsed before anything runs."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DSV4Error(f"cannot read {file}: {error}") from None
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        try:
            parse(line)
        except DSV4Error as error:
            raise DSV4Error(f"{file}:{number}: {error.message}", error.hint) from None
        lines.append(line)
    return lines


def describe(entry: dict[str, Any]) -> str:
    """A command's result in a few lines, for people; --json has it all."""
    if "error" in entry:
        return f"error: {entry['error']['message']}"
    result = entry["result"]
    if "text" in result and "expression" in result:
        return result["text"]
    if "inputs" in result:
        return _describe_op(result)
    if "slow_down" in result:  # honesty
        return str(result["sentence"])
    if "readings" in result:
        rows = [
            (r["site"], f"{r['probe']}.{r['name']}", r["output"], _value(r["value"]), r["verdict"])
            for r in result["readings"]
        ]
        return output.table(("site", "reading", "of", "value", "verdict"), rows)
    if "changed" in result:
        if not result["changed"]:
            return f"route: {', '.join(result['route'])}"
        return "\n".join(
            f"{c['site']}: {c['before']['implementation']} -> {c['after']['implementation']} "
            f"{c['effect']}".rstrip()
            for c in result["changed"]
        )
    if "bundle" in result:
        return result["text"]
    if "breaks" in result and "text" in result and "site" not in result:
        return result["text"]
    if "site" in result:
        return f"{result['state']} at {result['site']} ({result['why']})"
    return output.to_json(result)


def _describe_op(view: dict[str, Any]) -> str:
    lines = [f"{view['site']} ({view['op']}) on {view['route']} {view['effect']}".rstrip()]
    for kind in ("inputs", "outputs"):
        for tensor in view[kind]:
            stats = tensor.get("stats") or {}
            text = ", ".join(f"{name} {_value(value)}" for name, value in stats.items())
            shape = tensor.get("shape", tensor.get("value"))
            lines.append(f"  {kind[:-1]} {tensor['name']} {shape} {tensor.get('dtype', '')} {text}")
    times = ", ".join(f"{name} {1e6 * s:.0f} us" for name, s in view["times"].items())
    lines.append(f"  time {times or 'not run'}")
    if view["own_error"]:
        error = view["own_error"]
        lines.append(
            f"  own error {error['relative_l2']} (limit {error['limit']}): {error['verdict']}"
        )
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(v) for v in value[:8]) + (", ...]" if len(value) > 8 else "]")
    return str(value)
