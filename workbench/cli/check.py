"""`dsv4-bench check`: a route against the reference, every site, with a verdict in one sentence

Three questions about one route: is every op right (the check itself), which kernels together break
the output (--minimise), and what changes its bits (--vary).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error, ExitCode
from dsv4_bench.workbench.cli import common, output
from dsv4_bench.workbench.cli.check_text import check_text, minimise_text, vary_text
from dsv4_bench.workbench.cli.progress import Progress

if TYPE_CHECKING:
    from dsv4_bench.engine.registry import Site
    from dsv4_bench.workbench.loading import Loaded

_EXIT = {"clean": ExitCode.OK, "found": ExitCode.FOUND, "partial": ExitCode.CANNOT}
NOT_ASKED = "not asked for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_engine_arguments(parser)
    common.add_prompt_arguments(parser)
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        metavar="N",
        help="runs of every op on the same inputs, whose bits must agree (default 2)",
    )
    parser.add_argument(
        "--poison",
        choices=("on", "off"),
        default="on",
        help="one more run with NaN in recycled memory, unused rows and guard zones (default on)",
    )
    parser.add_argument(
        "--replay-decisions",
        action="store_true",
        help="the route's run goes on with the reference's experts and entries",
    )
    parser.add_argument("--layers", metavar="A-B", help="judge only these layers")
    parser.add_argument("--sites", metavar="GLOB", help="judge only these sites")
    parser.add_argument(
        "--limits", metavar="FILE", help="write the calibrated limits with their evidence, as JSON"
    )
    parser.add_argument("--bundle", metavar="OUT", help="write a bundle of the first finding")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--minimise", action="store_true", help="the fewest kernels that together break the output"
    )
    mode.add_argument(
        "--vary", action="store_true", help="what changes the bits: batch, chunks, repeats, threads"
    )
    parser.add_argument(
        "--symptom",
        choices=("logits", "top1"),
        default="logits",
        help="--minimise: broken are logits beyond rounding (default), or another top-1 token",
    )
    parser.add_argument("--expect", metavar="TEXT", help="--minimise: broken is not to answer this")
    parser.add_argument("--bad", metavar="TEXT", help="--minimise: broken is to answer this")
    parser.add_argument(
        "--fresh", action="store_true", help="--minimise: forget the trials of earlier runs"
    )


def run(args: argparse.Namespace) -> int:
    tokens = common.read_tokens(args.tokens, args.prompt)
    common.parse_chunks(args.chunks)
    _refuse_nonsense(args)
    layers = _parse_layers(args.layers)

    from dsv4_bench.workbench.checking.heap import keep_freed_memory
    from dsv4_bench.workbench.loading import load_model, prompt_tokens

    keep_freed_memory()
    loaded = load_model(common.engine_options(args))
    prompt = prompt_tokens(loaded, args.prompt, tokens)
    asked = _asked_sites(loaded, layers, args.sites)
    progress = Progress()
    try:
        if args.minimise:
            document, text = _minimise(args, loaded, prompt, asked, progress)
        elif args.vary:
            document, text = _vary(args, loaded, prompt, progress)
        else:
            document, text = _check(args, loaded, prompt, asked, progress)
    finally:
        progress.close()
    if args.json:
        output.print_json(document)
    else:
        print(text)
    return int(_EXIT[document["status"]])


def _refuse_nonsense(args: argparse.Namespace) -> None:
    """Raise DSV4Error for values that cannot be meant, before anything is loaded."""
    if args.repeats < 1:
        raise DSV4Error(f"--repeats {args.repeats}", "an op runs at least once")
    for name in ("limits", "bundle"):
        file = getattr(args, name)
        if file and not Path(file).absolute().parent.is_dir():
            raise DSV4Error(f"no such folder: {Path(file).parent}")
    for name in ("expect", "bad", "fresh"):
        if getattr(args, name) and not args.minimise:
            raise DSV4Error(f"--{name} belongs to --minimise", "add --minimise")
    if args.expect is not None and args.bad is not None:
        raise DSV4Error("--expect and --bad are both given", "one of them says what is broken")
    if args.vary and (args.layers or args.sites):
        raise DSV4Error("--vary follows every site", "leave out --layers and --sites")
    for name in ("limits", "bundle", "replay_decisions"):
        if getattr(args, name) and (args.minimise or args.vary):
            option = name.replace("_", "-")
            raise DSV4Error(
                f"--{option} belongs to the check itself", "leave out --minimise, --vary"
            )


def _parse_layers(text: str | None) -> range | None:
    """``3-5`` or ``3`` -> a range; None for none. Raises DSV4Error."""
    if text is None:
        return None
    first, dash, last = text.partition("-")
    try:
        layers = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        layers = range(0)
    if not layers or layers[0] < 0:
        raise DSV4Error(f"--layers {text!r} is no range of layers", "e.g. --layers 3-5")
    return layers


def _asked_sites(loaded: Loaded, layers: range | None, glob: str | None) -> set[str] | None:
    """The sites to judge, None for all. Raises DSV4Error where there is none."""
    if layers is None and glob is None:
        return None
    from dsv4_bench.engine.registry import select_sites

    sites = list(loaded.model.sites.values())
    if layers is not None:
        count = len(loaded.model.layers)
        if layers[-1] >= count:
            raise DSV4Error(f"--layers up to {layers[-1]}: the model has {count}", f"0-{count - 1}")
        sites = [site for site in sites if site.layer in layers]
    return {site.path for site in (select_sites(sites, glob) if glob else sites)}


# ------------------------------------------------------------------------------ the check itself


def _check(
    args: argparse.Namespace,
    loaded: Loaded,
    prompt: list[int],
    asked: set[str] | None,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    from dsv4_bench.workbench.checking.checker import Checker, default_chunks
    from dsv4_bench.workbench.checking.decision_split import SplitBaseline

    model = loaded.model
    checker = Checker(
        model,
        model.route,
        repeats=args.repeats,
        poison=args.poison == "on",
        replay_decisions=args.replay_decisions,
    )
    for path, site in checker.report.sites.items():
        if asked is not None and path not in asked:
            site.verdict, site.note = "uncovered", NOT_ASKED
    chunks = common.parse_chunks(args.chunks) or default_chunks(len(prompt))
    baseline = SplitBaseline(model, prompt, chunks, checker.chosen)
    work = baseline.work_before()
    report = checker.against(
        baseline, lambda text, done, total: progress(text, work[done], work[total])
    )
    if args.limits:
        baseline.limits.save(Path(args.limits))
    document = {**report.to_dict(), **baseline.to_dict()}
    if report.status == "partial" and all(s.note == NOT_ASKED for s in report.uncovered):
        document["status"] = "clean"  # all that was asked for was checked
    if args.bundle and report.first is not None:
        progress.close()
        document["bundle"] = _write_bundle(args, loaded, report, baseline)
    elif args.bundle:
        output.narrate("nothing was found: no bundle is written")
    return document, check_text(document, len(prompt))


def _write_bundle(args: argparse.Namespace, loaded: Loaded, report: Any, baseline: Any) -> Any:
    from dsv4_bench.workbench.checking.finding_bundle import write_finding

    written = write_finding(Path(args.bundle), loaded, report, baseline)
    output.narrate(f"wrote {written['path']} ({output.bytes_text(written['bytes'])})")
    return written


# ------------------------------------------------------------------------------ --minimise, --vary


def _minimise(
    args: argparse.Namespace,
    loaded: Loaded,
    prompt: list[int],
    asked: set[str] | None,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    from dsv4_bench.engine.demo import cache_folder
    from dsv4_bench.engine.generate import split
    from dsv4_bench.workbench.checking import layerwise
    from dsv4_bench.workbench.checking.checker import default_chunks
    from dsv4_bench.workbench.checking.minimising import minimise
    from dsv4_bench.workbench.checking.symptoms import Says, Symptom
    from dsv4_bench.workbench.checking.trials import Trials

    model = loaded.model
    chunks = common.parse_chunks(args.chunks) or default_chunks(len(prompt))
    symptom: str | Symptom = args.symptom
    fed = list(prompt)
    answer = args.expect if args.expect is not None else args.bad
    if answer is not None:
        ids = _answer_tokens(loaded, answer)
        symptom = Says(ids, len(prompt) - 1, answer, wanted=args.expect is not None)
        sizes = [stop - start for start, stop in split(len(prompt), chunks)]
        fed, chunks = [*prompt, *ids[:-1]], (*sizes, *[1] * (len(ids) - 1))
    trials = Trials(model, model.route, layerwise.forward_calls(model, [fed], [chunks]))
    if asked is not None:
        trials.sites = [path for path in trials.sites if path in asked]
    uncovered = [
        {"site": path, "why": _why_not(site, asked)}
        for path, site in model.sites.items()
        if path not in trials.sites
    ]
    try:
        result = minimise(trials, symptom, cache_folder() / "minimise", progress, args.fresh)
    except KeyboardInterrupt:
        progress.close()
        output.narrate("the trials so far are kept: the same command goes on from there")
        raise
    document: dict[str, Any] = {
        **result.to_dict(),
        "first": None,
        "sites": [{"site": s, "op": model.sites[s].op} for c in result.sets for s in c.sites],
        "uncovered": uncovered,
    }
    if result.sets:
        first = result.sets[0]
        error = first.outcome.error.error
        document["first"] = _first(
            loaded, first.sites[0], "unexplained", error, None, first.sentence
        )
    return document, minimise_text(document, len(prompt))


def _why_not(site: Site, asked: set[str] | None) -> str:
    """Why a site takes no part in the search."""
    if asked is not None and site.path not in asked:
        return NOT_ASKED
    return site.stamp.note or "the route names the reference"


def _answer_tokens(loaded: Loaded, text: str) -> tuple[int, ...]:
    """The ids of an answer. Raises DSV4Error if there is no tokenizer or nothing to say."""
    if loaded.tokenizer is None:
        raise CannotAnswer(f"no tokenizer.json in {loaded.folder}", "--symptom top1 needs none")
    ids = tuple(loaded.tokenizer.encode(text, add_special_tokens=False).ids)
    if not ids:
        raise DSV4Error("the answer is empty", "give at least one word")
    return ids


def _vary(
    args: argparse.Namespace, loaded: Loaded, prompt: list[int], progress: Progress
) -> tuple[dict[str, Any], str]:
    from dsv4_bench.workbench.checking.checker import default_chunks
    from dsv4_bench.workbench.checking.varying import standard_variations, vary

    chunks = common.parse_chunks(args.chunks) or default_chunks(len(prompt))
    result = vary(loaded.model, standard_variations(prompt, chunks, args.repeats), progress)
    document: dict[str, Any] = {**result.to_dict(), "first": None, "sites": [], "uncovered": []}
    over = next((effect for effect in result.effects if effect.first_over), None)
    if over is not None and over.first_over is not None:
        kind = "nondeterministic" if over.variable in ("repeat", "threads") else "unexplained"
        change = over.first_over
        document["first"] = _first(
            loaded, change.site, kind, change.error, change.limit, over.sentence
        )
    return document, vary_text(document, len(prompt))


def _first(
    loaded: Loaded, path: str, kind: str, error: float, limit: float | None, sentence: str
) -> dict[str, Any]:
    """`first` as every check gives it; these two measure what a run carries, not an op's own error."""
    site = loaded.model.sites[path]
    return {
        "site": path,
        "op": site.op,
        "layer": site.layer,
        "kind": kind,
        "own_error": None,
        "carried_error": error,
        "limit": limit,
        "sentence": sentence,
    }
