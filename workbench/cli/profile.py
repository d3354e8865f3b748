"""`dsv4-bench profile`: where the time of layers goes, site by site, beside their error"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, ExitCode
from dsv4_bench.workbench.cli import common, output

_PROFILERS = ("nsys", "ncu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is timed")
    what.add_argument("--layer", "--layers", metavar="N|A-B", help="one layer, or some in a row")
    what.add_argument("--sites", metavar="GLOB", help="only these sites, e.g. '*/core' or head")
    what.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    what.add_argument(
        "--context", type=int, metavar="T", help="tokens of a sequence (the prompt's)"
    )
    what.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (default 1)")
    common.add_engine_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--tokens", metavar="FILE", help="a JSON list of token ids")
    how = parser.add_argument_group("how")
    how.add_argument("--seconds", type=float, default=0.4, metavar="S", help="for each site")
    how.add_argument(
        "--graph", action="store_true", help="a decode step as its CUDA graph runs it (GPU)"
    )
    how.add_argument("--ceilings", action="store_true", help="measure the machine's ceilings anew")
    how.add_argument("--nsys", action="store_true", help="record it under Nsight Systems too")
    how.add_argument("--ncu", action="store_true", help="counters of every kernel, Nsight Compute")
    how.add_argument(
        "--import", dest="imported", metavar="FILE", help="a .nsys-rep or .sqlite instead of a run"
    )
    how.add_argument("--under", choices=_PROFILERS, help=argparse.SUPPRESS)
    out = parser.add_argument_group("what comes out")
    out.add_argument("--kernels", action="store_true", help="list the kernels inside every site")
    out.add_argument("--trace", metavar="OUT.json", help="for Perfetto or chrome://tracing")
    out.add_argument("--plot", metavar="OUT.png|svg", help="roofline, time by layer, both routes")
    out.add_argument("--against", metavar="BASE.json", help="compare; exit 1 beyond a gate")
    out.add_argument("--gate-time", default="3%", metavar="G", help="slower than this (3%%)")
    out.add_argument("--gate-error", default="2x", metavar="G", help="more wrong than this (2x)")


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.imported:
        return _import(args)
    if args.nsys or args.ncu:
        return _under_profiler(args)
    gates = _gates(args)
    document = _measure(args)
    if args.under:  # the parent renders
        output.print_json(document)
        return 0
    return _present(args, document, gates)


def _check(args: argparse.Namespace) -> None:
    """Raise for what can be seen before anything large is opened."""
    if args.imported:
        return
    if args.layer is None and args.sites is None:
        raise DSV4Error("which layer?", "e.g. --layer 12, --layers 10-12, or --sites '*/core'")
    if args.context is not None and args.context < 1:
        raise DSV4Error(f"--context {args.context}: at least 1 token is needed", "e.g. 256")
    if args.graph and args.phase != "decode":
        raise DSV4Error(f"--graph: a {args.phase} is not run from a CUDA graph", "--phase decode")
    if args.batch < 1:
        raise DSV4Error(f"--batch {args.batch}: at least 1 sequence is needed", "e.g. 8")
    if not 0 <= args.seconds < 3600:
        raise DSV4Error(f"--seconds {args.seconds}: 0 to 3600", "e.g. 0.4")
    for name in filter(None, (args.trace, args.plot)):
        if not Path(name).absolute().parent.is_dir():
            raise DSV4Error(f"no such folder: {Path(name).parent}")
    if args.plot:
        from dsv4_bench.workbench.timing.plots import check_path

        check_path(Path(args.plot))


def _gates(args: argparse.Namespace) -> tuple[dict[str, Any], float, float] | None:
    from dsv4_bench.workbench.timing.document import parse_gate, read_document

    time, error = parse_gate(args.gate_time, "time"), parse_gate(args.gate_error, "error")
    return (read_document(Path(args.against)), time, error) if args.against else None


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    tokens = common.read_tokens(args.tokens, args.prompt)

    from dsv4_bench.workbench.loading import load_model, prompt_tokens
    from dsv4_bench.workbench.timing.capturing import parse_layers, sequences
    from dsv4_bench.workbench.timing.profile import Request, count, profile
    from dsv4_bench.workbench.timing.sites import Effort

    loaded = load_model(common.engine_options(args))
    layers: tuple[int, ...] = ()
    if args.layer is not None:
        layers = tuple(parse_layers(args.layer, len(loaded.model.layers)))
    fed = sequences(prompt_tokens(loaded, args.prompt, tokens), args.context, args.batch)
    request = Request(
        layers,
        args.sites or "",
        args.phase,
        Effort(args.seconds),
        args.ceilings,
        args.kernels,
        args.graph,
        args.under == "nsys",
    )
    if args.under == "ncu":
        return {"ops": count(loaded.model, fed, request, _say)}
    document = profile(loaded.model, fed, request, _say)
    _clear()
    if not args.under:
        _remember(document)
    return {**document, "notes": loaded.notes}


def _remember(document: dict[str, Any]) -> None:
    """Add the times to the history that `history` in a session shows."""
    from dsv4_bench.workbench.timing import history

    conditions = "{phase}, {batch} x {context} tokens, {dtype}".format(**document)
    history.keep(
        "profile",
        document["checkpoint"],
        document["ceilings"]["device"],
        conditions,
        [entry for row in document["sites"] for entry in history.of_row(row)],
    )


def _present(
    args: argparse.Namespace,
    document: dict[str, Any],
    gates: tuple[dict[str, Any], float, float] | None,
) -> int:
    """Print, draw and compare one document; the exit code."""
    from dsv4_bench.workbench.timing.document import regressions, report

    if args.trace and "recorded" not in document:
        from dsv4_bench.workbench.timing import trace

        _write(Path(args.trace), trace.of_document(document))
    if args.plot:
        from dsv4_bench.workbench.timing.plots import draw

        draw(document, Path(args.plot))
    worse = regressions(gates[0], document, gates[1], gates[2]) if gates else []
    if gates:
        document["regressions"] = [item.to_dict() for item in worse]
    if args.json:
        output.print_json(document)
    else:
        print(report(document))
        if gates:
            print(f"\n{len(worse)} of {len(document['sites'])} sites worse than {args.against}")
            for item in worse:
                print(f"  {item}")
    return int(ExitCode.FOUND if worse else ExitCode.OK)


# ------------------------------------------------------------------------------ NVIDIA's profilers


def _child(args: argparse.Namespace, tool: str) -> list[str]:
    """This very command for the profiled process: measured there, printed here."""
    words = [sys.executable, "-m", "dsv4_bench.workbench", *sys.argv[1:]]
    dropped = {"--nsys", "--ncu", "--json"}
    return [word for word in words if word not in dropped] + ["--json", "--under", tool]


def _under_profiler(args: argparse.Namespace) -> int:
    if args.nsys and args.ncu:
        raise DSV4Error("--nsys and --ncu are both given", "one at a time: each disturbs the other")
    gates = _gates(args)
    cuda = args.device == "cuda" or (args.device is None and _has_cuda())
    if args.ncu:
        return _ncu(args, cuda)
    from dsv4_bench.workbench.timing import nsys

    name = (args.layer or "sites").replace("-", "to")
    report = Path(f"dsv4-L{name}-{args.phase}.nsys-rep").absolute()
    printed = nsys.record(report, _child(args, "nsys"), cuda)
    document = _last_json(printed, "nsys")
    recording = _read_report(report)
    document["recorded"] = {"report": report.name, **_recorded(recording)}
    if args.trace:
        from dsv4_bench.workbench.timing import trace

        _write(Path(args.trace), trace.of_recording(recording))
    return _present(args, document, gates)


def _ncu(args: argparse.Namespace, cuda: bool) -> int:
    from dsv4_bench.workbench.timing import ncu
    from dsv4_bench.workbench.timing.document import ncu_report

    log = Path(
        f"dsv4-L{(args.layer or 'sites').replace('-', 'to')}-{args.phase}.ncu.csv"
    ).absolute()
    child = _child(args, "ncu")
    if not cuda:
        import shlex

        raise CannotAnswer(
            "--ncu counts what GPU kernels do, and torch sees no CUDA device here",
            f"where there is one: {shlex.join(ncu.command(log, child))}",
        )
    rows = ncu.record(log, child)
    if args.json:
        output.print_json({"kernels": rows})
    else:
        print(ncu_report(rows))
    return 0


def _import(args: argparse.Namespace) -> int:
    from dsv4_bench.workbench.timing import trace
    from dsv4_bench.workbench.timing.document import recorded_report

    recording = _read_report(Path(args.imported))
    recorded = _recorded(recording)
    if args.trace:
        _write(Path(args.trace), trace.of_recording(recording))
    if args.json:
        output.print_json({"imported": args.imported, **recorded})
    else:
        print(recorded_report(recorded))
    return 0


def _read_report(path: Path) -> Any:
    from dsv4_bench.workbench.timing import nsys, recording

    if path.suffix != ".nsys-rep":
        return recording.read(path)
    if not path.is_file():
        raise DSV4Error(f"{path}: no such file", exit_code=ExitCode.BAD_INPUT)
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "report.sqlite"
        nsys.export(path, database)
        return recording.read(database)


def _recorded(recording: Any) -> dict[str, Any]:
    from dsv4_bench.workbench.timing.recording import summary

    return {
        "nsys": recording.version,
        "sites": summary(recording),
        "kernels": len(recording.kernels),
        "kernels_outside": recording.unjoined,
    }


def _last_json(printed: str, tool: str) -> dict[str, Any]:
    """The child's document; profilers print lines of their own around it."""
    start = printed.find("\n{\n") + 1 if not printed.startswith("{") else 0
    try:
        document, _ = json.JSONDecoder().raw_decode(printed[start:])
    except ValueError:
        raise DSV4Error(f"under {tool} nothing was measured", printed.strip()[-200:],
                        ExitCode.CRASHED) from None  # fmt: skip
    return dict(document)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _write(path: Path, data: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(data) + "\n")
    except OSError as error:
        raise DSV4Error(f"{path}: {error.strerror}") from None


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
