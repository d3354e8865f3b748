"""The command line: one module per sub-command, imported only when it is the one that was asked for.

A module `cli/<name>.py` has `add_arguments(parser)` and `run(args) -> int`; its row is in COMMANDS.
Data goes to stdout, narration and progress to stderr, errors are one line and one hint.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from dataclasses import dataclass

from dsv4_bench.engine.errors import DSV4Error, ExitCode, did_you_mean
from dsv4_bench.workbench.cli import output


@dataclass(frozen=True)
class CliCommand:
    """One sub-command: its name, a line of help, and whether it takes CKPT."""

    name: str
    help: str
    checkpoint: bool = True

    @property
    def module(self) -> str:
        return f"dsv4_bench.workbench.cli.{self.name.replace('-', '_')}"


COMMANDS: tuple[CliCommand, ...] = (
    CliCommand("tui", "the terminal UI: step, switch routes, watch readings"),
    CliCommand("generate", "prefill and decode a prompt"),
    CliCommand("logits", "teacher-forced logits of every position, as safetensors"),
    CliCommand("inspect", "offline census of a checkpoint: formats, shapes, scales"),
    CliCommand(
        "check", "a route against the reference, every site: own and carried error, a verdict"
    ),
    CliCommand("dump", "captured ops, readings, plots and a report: a bundle for a bug report"),
    CliCommand("diff", "the first difference between two bundles", checkpoint=False),
    CliCommand("replay", "captured ops again, from the bundle alone", checkpoint=False),
    CliCommand("profile", "time per site of one layer, reference beside kernel"),
    CliCommand("watch", "rebuild and re-run one op whenever its code is saved", checkpoint=False),
    CliCommand("kernels", "every op x implementation: available or why not", checkpoint=False),
    CliCommand("faults", "the mutation suite: known bugs, detected and named?", checkpoint=False),
    CliCommand("script", "run a session script without a screen", checkpoint=False),
    CliCommand("make-checkpoint", "write a synthetic checkpoint", checkpoint=False),
    CliCommand("doctor", "environment report for bug reports", checkpoint=False),
    CliCommand("worker", "the session protocol on stdin/stdout", checkpoint=False),
)


class _Parser(argparse.ArgumentParser):
    """argparse with our error format and exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise DSV4Error(message, f"see `{self.prog} --help`")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("dsv4-bench")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _root_help() -> str:
    width = max(len(c.name) for c in COMMANDS)
    rows = "\n".join(f"  {c.name:<{width}}  {c.help}" for c in COMMANDS)
    return (
        "usage: dsv4-bench COMMAND [CKPT] [options]\n\n"
        "Interactive debugging and profiling workbench for DeepSeek-V4 kernels.\n\n"
        f"{rows}\n\n"
        "CKPT is a checkpoint folder; left out, it is $DSV4_CKPT, else a small demo checkpoint.\n"
        "`dsv4-bench COMMAND --help` shows a command's options; --version prints the version.\n"
    )


def _common_arguments(parser: argparse.ArgumentParser, command: CliCommand) -> None:
    if command.checkpoint:
        parser.add_argument(
            "checkpoint", nargs="?", metavar="CKPT", help="checkpoint folder (default: demo)"
        )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE.py",
        help="import a file that registers implementations or probes (repeatable)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks on errors")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dsv4-bench`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = "-v" in words or "--verbose" in words
    if sys.stdout is None:  # closed by the shell, `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # now, while a broken pipe can still be caught
        return code
    except DSV4Error as error:
        if verbose:
            traceback.print_exc()
        print(f"dsv4-bench: error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dsv4-bench: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout went away: `| head`
        _forget_stdout()
        return ExitCode.OK
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _forget_stdout()
        if verbose:
            traceback.print_exc()
        print(f"dsv4-bench: error: internal: {type(error).__name__}: {error}", file=sys.stderr)
        print("hint: run again with -v for the traceback, and report it", file=sys.stderr)
        return ExitCode.CRASHED


def _forget_stdout() -> None:
    """What is still buffered for stdout cannot be written: do not try again at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


def _dispatch(words: list[str]) -> int:
    if not words:
        if sys.stdin.isatty() and sys.stdout.isatty():
            words = ["tui"]
        else:
            sys.stderr.write(_root_help())
            return ExitCode.USAGE
    if words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_root_help())
        return ExitCode.OK
    if words[0] == "--version":
        print(f"dsv4-bench {_version()}")
        return ExitCode.OK
    command = next((c for c in COMMANDS if c.name == words[0]), None)
    if command is None:
        raise DSV4Error(
            f"unknown command {words[0]!r}", did_you_mean(words[0], (c.name for c in COMMANDS))
        )
    parser = _Parser(prog=f"dsv4-bench {command.name}", description=command.help)
    _common_arguments(parser, command)
    module = importlib.import_module(command.module)
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(words[1:])
    if args.json:
        output.reserve_stdout()
    return int(module.run(args))
