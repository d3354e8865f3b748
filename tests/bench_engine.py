"""What watching costs: taps that are off, probes, the session. A script, not a test.

    python tests/bench_engine.py [--json FILE]

Variants are interleaved and medians compared, so that a busy machine blurs but does not tilt them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dsv4_bench.engine.cpu  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo import demo_checkpoint
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation, Site, parse_route, spec_of
from dsv4_bench.probes.base import make_probes
from dsv4_bench.probes.observation import Watch
from dsv4_bench.probes.tap import set_taps
from dsv4_bench.workbench.cli.output import table
from dsv4_bench.workbench.commands import parse
from dsv4_bench.workbench.serving import SessionServer
from dsv4_bench.workbench.session import DEFAULT_PROBES, Session

PROMPT = [(17 * i + 5) % 400 for i in range(160)]


def interleaved(
    variants: dict[str, Callable[[], None]],
    rounds: int,
    pick: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median (or `pick`) of the seconds of each variant, in an order that changes; one warm-up round."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names, shuffle = list(variants), random.Random(0)
    for number in range(rounds + 1):
        shuffle.shuffle(names)  # whoever always followed the same one would have its warm caches
        for name in names:
            started = time.perf_counter()
            variants[name]()
            if number:
                samples[name].append(time.perf_counter() - started)
    return {name: pick(values) for name, values in samples.items()}


def tap_off() -> dict[str, float]:
    """ns of a site's call with its tap off, beyond the bare function's; none, one and two params."""
    calls = 20_000
    rows: dict[str, float] = {}
    for params in ({}, {"a": 1}, {"a": 1, "b": 2}):

        def function(x: int, y: int, *, a: int = 0, b: int = 0) -> int:
            return x

        site = Site("site", spec_of("moe_sum"), params, None)
        site.use(Implementation("moe_sum", "bare", function))

        def through_site(site: Site = site) -> None:
            for _ in range(calls):
                site(1, 2)

        def bare(f: Any = function, params: dict[str, int] = params) -> None:
            if not params:
                for _ in range(calls):
                    f(1, 2)
            elif len(params) == 1:
                for _ in range(calls):
                    f(1, 2, a=1)
            else:
                for _ in range(calls):
                    f(1, 2, a=1, b=2)

        found = interleaved({"site": through_site, "bare": bare}, 21, min)
        rows[f"{len(params)} params"] = 1e9 * (found["site"] - found["bare"]) / calls
    return rows


def without_sites(model: Transformer) -> Transformer:
    """Replace every site of the model, wherever it is kept, by its function with its constants."""

    def bare(site: Site) -> Any:
        return partial(site.impl.function, **site.params)

    stack: list[Any] = [model.embed, model.head, *model.layers]
    model.embed = bare(model.embed)  # type: ignore[assignment]
    while stack:
        owner = stack.pop()
        for name, value in vars(owner).items() if hasattr(owner, "__dict__") else ():
            if isinstance(value, Site):
                setattr(owner, name, bare(value))
            elif type(value).__module__ == Transformer.__module__:
                stack.append(value)
    return model


class Watcher:
    """A tap that only runs the op."""

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        return site.run(args)


def engine(folder: Path) -> dict[str, float]:
    """Seconds of a decode step of the demo model after 160 tokens, by variant."""
    models = {}
    for name, route in (("reference", "reference"), ("kernel", "kernel"), ("bare", "kernel")):
        model = Transformer(Checkpoint(folder))
        model.set_route(parse_route([route]))
        models[name] = model
    without_sites(models["bare"])
    watched = Transformer(Checkpoint(folder))
    watched.set_route(parse_route(["kernel"]))
    set_taps(watched.sites.values(), Watcher())
    models["kernel, every tap on"] = watched

    def decode(model: Transformer) -> Callable[[], None]:
        cache = model.new_cache()
        model.forward(cache.step([PROMPT]), cache, last_only=True)
        saved = cache.snapshot()

        def run() -> None:
            model.forward(cache.step([[5]]), cache, last_only=True)
            cache.lengths = list(saved["lengths"])  # type: ignore[call-overload]

        return run

    reference = {"reference": decode(models.pop("reference"))}
    kernels = {name: decode(model) for name, model in models.items()}
    return {**interleaved(reference, 5), **interleaved(kernels, 60)}


class Passes:
    """A model that is run over the prompt and three tokens, with `probes` on."""

    def __init__(self, folder: Path, route: str, probes: tuple[str, ...]) -> None:
        self.model = Transformer(Checkpoint(folder))
        self.model.set_route(parse_route([route]))
        self.watch = Watch(make_probes(probes))
        if probes:
            set_taps(self.model.sites.values(), self.watch)

    def __call__(self) -> None:
        cache, self.watch.readings = self.model.new_cache(), []
        for forward, piece in enumerate((PROMPT, [5], [7], [9])):
            self.watch.forward = forward
            self.model.forward(cache.step([piece]), cache, last_only=True)
            self.watch.flush()


def probes(folder: Path) -> dict[str, float]:
    """Seconds of a prefill and three decode steps of the demo, without a session, by what is on."""
    rows = {}
    for route, rounds in (("reference", 7), ("kernel", 15)):
        variants: dict[str, Callable[[], None]] = {
            f"{route}, {name}": Passes(folder, route, names)
            for name, names in (("no probes", ()), ("default probes", DEFAULT_PROBES))
        }
        rows |= interleaved(variants, rounds)
    return rows


def debugger(folder: Path) -> dict[str, float]:
    """Seconds of a session over the prompt and three tokens, in this process, by what is on."""
    rows = {}
    for route in ("reference", "kernel"):
        for name, names, shadow in (
            ("no probes", (), ""),
            ("default probes", DEFAULT_PROBES, ""),
            ("default probes and shadow", DEFAULT_PROBES, "*"),
        ):
            options = {"checkpoint": str(folder), "tokens": PROMPT, "max_new_tokens": 4}
            options |= {"route": [route], "probes": list(names), "shadow": shadow}
            rows[f"{route}, {name}"] = session_run(options)
    return rows


def session_run(options: dict[str, Any]) -> float:
    """Seconds of the better of two runs of a session's plan, served in this process."""
    with tempfile.TemporaryDirectory() as scratch:
        server = SessionServer(Path(scratch), lambda message: None)
        server.open(options)
        best = float("inf")
        for lines in (("continue",), ("reset", "continue")):
            for number, line in enumerate(lines):
                server.submit(number, parse(line))
            server.requests.put(None)
            started = time.perf_counter()
            server.run()
            best = min(best, time.perf_counter() - started)
    return best


def session(folder: Path) -> dict[str, float]:
    """Seconds until the worker is open, and medians of commands through the protocol."""
    started = time.perf_counter()
    with Session(str(folder), tokens=PROMPT, max_new_tokens=4, probes=DEFAULT_PROBES) as client:
        client.wait_open()
        rows = {"open": time.perf_counter() - started}
        client.command("layer")
        for line in ("breaks", "status", "step", "op", "sites", "layer", "rerun"):
            rows[line] = interleaved({line: lambda line=line: client.command(line)}, 9)[line]  # type: ignore[misc]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    folder = demo_checkpoint()
    with torch.inference_mode():
        taps = tap_off()
        decode = engine(folder)
    results = {"tap off, ns": taps, "decode step": decode}
    results |= {"4 passes, no session": probes(folder), "continue over 4 passes": debugger(folder)}
    results["session"] = session(folder)
    rows = [("a tap that is off", name, f"{ns:.0f} ns") for name, ns in taps.items()]
    for title in ("decode step", "4 passes, no session", "continue over 4 passes", "session"):
        rows += [(title, name, f"{1000 * s:.2f} ms") for name, s in results[title].items()]
    for title in ("4 passes, no session", "continue over 4 passes"):
        for route in ("reference", "kernel"):
            ratio = (
                results[title][f"{route}, default probes"] / results[title][f"{route}, no probes"]
            )
            rows.append((title, f"{route}: default probes against none", f"{ratio:.2f}x"))
    off = decode["kernel"] / decode["bare"] - 1
    rows.append(("decode step", "all taps off, against bare calls", f"{100 * off:+.1f} %"))
    print(table(("what", "variant", "cost"), rows))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
