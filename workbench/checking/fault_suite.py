"""The mutation suite: switches known bugs on, one at a time, and scores what `check` says of each

`check` sees a small model on kernels with one fault switched on, as a user's model would be; it knows
nothing of the catalogue. Verdicts are compared with what the catalogue says, which was decided before.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import dsv4_bench.engine.cpu  # noqa: F401  (registers the CPU kernels)
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import TINY, Config
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import OPS, RouteEntry, implementation, matches, parse_route
from dsv4_bench.engine.synthetic import write_checkpoint
from dsv4_bench.probes.capture import Captured
from dsv4_bench.probes.faults.base import PREFIX, Fault, forget, registered_for_a_while
from dsv4_bench.workbench.checking.baseline import Baseline, Piece
from dsv4_bench.workbench.checking.checker import Checker, CheckReport

Progress = Callable[[str, int, int], None]

# Every kind of layer and op; the layers have the kinds that the demo checkpoint's first five have.
SMALL = replace(
    TINY,
    vocab_size=300,
    hidden_size=128,
    num_hidden_layers=5,
    num_attention_heads=8,
    head_dim=128,
    qk_rope_head_dim=32,
    q_lora_rank=64,
    o_lora_rank=64,
    moe_intermediate_size=64,
    num_hash_layers=3,
    index_n_heads=8,
    index_head_dim=64,
    index_topk=16,
    compress_ratios=(0, 0, 4, 128, 4),
)
LENGTH = 292  # beyond the window (128), two HCA entries (256) and what the indexer keeps (64)
CHUNKS = (200, 90, 1, 1)  # a prefill, a chunk on a full ring that closes an HCA entry, decode
# What a release must reach, as shares of all faults.
THRESHOLDS = {"detected": 1.0, "op": 0.95, "layer": 0.95, "kind": 0.85}


def prompt(length: int, vocab: int, seed: int = 5) -> list[int]:
    """Random token ids, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (length,), generator=generator).tolist()


# ------------------------------------------------------------------------------ one fault


@dataclass
class Outcome:
    """What `check` said with one fault switched on, beside what it should have said."""

    fault: str
    family: str
    doc: str
    expected_op: list[str]
    expected_sites: list[str]
    expected_layer: int | None
    expected_kinds: list[str]
    detected: bool = False
    op_right: bool = False
    layer_right: bool = False
    kind_right: bool = False
    site: str = ""
    op: str = ""
    kind: str = ""
    sentence: str = ""
    own_error: float = 0.0
    also_blamed: list[str] = field(default_factory=list)  # sites that the fault is not at
    crashed: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(fault: Fault, sites: list[str], layers: list[int | None], report: CheckReport) -> Outcome:
    """Compare the first finding of `report` with the fault; `sites` and `layers` are where it is on."""
    outcome = _expected(fault, sites, layers)
    outcome.seconds = report.seconds
    outcome.detected = bool(report.findings)
    if report.findings:
        first = report.findings[0]
        outcome.site, outcome.op, outcome.kind = first.site, first.op, first.signature.kind
        outcome.sentence, outcome.own_error = first.sentence, first.own_error
        outcome.op_right = first.op in fault.parts and first.site in sites
        outcome.layer_right = first.layer == outcome.expected_layer
        outcome.kind_right = outcome.kind in fault.kinds
        outcome.also_blamed = sorted({f.site for f in report.findings} - set(sites))
    return outcome


def _expected(fault: Fault, sites: list[str], layers: list[int | None]) -> Outcome:
    return Outcome(
        fault.name,
        fault.family,
        fault.doc,
        list(fault.parts),
        sites,
        layers[0] if layers else None,
        list(fault.kinds),
    )


class _OnceChecker(Checker):
    """Judges a kernel on the reference's inputs once a baseline: where it was clean, it stays clean.

    The kernels beside the fault are the same for every fault; judging them is most of a check.
    """

    def __init__(self, model: Transformer, route: list[RouteEntry], clean: set[Any]) -> None:
        super().__init__(model, route)
        self._clean = clean

    def _check_own(self, call: Captured, piece: Piece) -> bool:
        chosen = self.chosen[call.site.path]
        key = (id(call), chosen.name, chosen.hash)
        if key in self._clean:
            return False
        found = super()._check_own(call, piece)
        if not found and not chosen.name.startswith(PREFIX):
            self._clean.add(key)
        return found


class Suite:
    """Small checkpoints in the layouts that faults ask for, each with one reference run to compare."""

    def __init__(self, folder: Path, config: Config = SMALL, length: int = LENGTH) -> None:
        self.folder = folder
        self.config = config
        self.tokens = prompt(length, config.vocab_size)
        self._baselines: dict[Any, Baseline] = {}
        self._clean: set[Any] = set()  # calls live as long as their baseline, so ids stay unique

    def baseline(self, fault: Fault) -> Baseline:
        """The reference's run of the checkpoint that shows `fault`, made at first use."""
        key = (fault.layout, fault.prepare)
        if key not in self._baselines:
            path = self.folder / fault.layout
            if not path.exists():
                write_checkpoint(path, self.config, fault.layout, seed=1)
            model = Transformer(Checkpoint(path))
            if fault.prepare is not None:
                fault.prepare(model)
            self._baselines[key] = Baseline(model, self.tokens, CHUNKS, pair=False)
        return self._baselines[key]

    def score(self, fault: Fault) -> Outcome:
        """Check the kernels with `fault` switched on. Never raises for what check or the fault does."""
        started = time.perf_counter()
        sites: list[str] = []
        layers: list[int | None] = []
        try:
            baseline = self.baseline(fault)
            table = baseline.model.sites.values()
            on = [s for s in table if any(matches(s.path, glob) for glob in fault.sites)]
            sites, layers = [s.path for s in on], [s.layer for s in on]
            forget()
            route = parse_route(["kernel", *fault.route])
            report = _OnceChecker(baseline.model, route, self._clean).against(baseline)
            outcome = judge(fault, sites, layers, report)
        except Exception as error:
            outcome = _expected(fault, sites, layers)
            outcome.crashed = f"{type(error).__name__}: {error}"
        finally:
            forget()
        outcome.seconds = time.perf_counter() - started
        return outcome


def run_faults(faults: Iterable[Fault], progress: Progress) -> list[Outcome]:
    """Score every fault on checkpoints that are written for it and removed again."""
    chosen = list(faults)
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dsv4-faults-") as folder:
        suite = Suite(Path(folder))
        for done, fault in enumerate(chosen):
            progress(f"{fault.name}{_left(started, done, len(chosen))}", done, len(chosen))
            outcomes.append(suite.score(fault))
    progress("faults", len(chosen), len(chosen))
    return outcomes


def _left(started: float, done: int, total: int) -> str:
    """`, 40 s left`, once there is something to judge by."""
    if not done:
        return ""
    seconds = (time.perf_counter() - started) / done * (total - done)
    return f", {seconds:.0f} s left"


# ------------------------------------------------------------------------------ the score


def score(outcomes: list[Outcome]) -> dict[str, Any]:
    """Shares of all faults that were detected, and named rightly, and whether that is enough."""
    total = len(outcomes)
    counts = {
        "detected": sum(o.detected for o in outcomes),
        "op": sum(o.op_right for o in outcomes),
        "layer": sum(o.layer_right for o in outcomes),
        "kind": sum(o.kind_right for o in outcomes),
    }
    passed = all(counts[name] >= THRESHOLDS[name] * total for name in counts)
    return {"faults": total, **counts, "thresholds": THRESHOLDS, "passed": passed}


# ------------------------------------------------------------------------------ no fault


@dataclass(frozen=True)
class CleanCase:
    """A checkpoint without a fault, and how it is run."""

    layout: str
    ratios: tuple[int, ...]
    length: int
    chunks: tuple[int, ...]
    dtype: str
    route: str  # kernel, or honest: the reference's own code, judged as if it were a kernel
    seed: int

    @property
    def name(self) -> str:
        ratios = "-".join(map(str, self.ratios))
        return f"{self.layout} {ratios} {self.length} tokens {self.dtype} {self.route}"


def clean_cases(count: int) -> Iterator[CleanCase]:
    """Layouts, patterns, lengths, dtypes and routes in turn, each with its own seed."""
    layouts = ("nvfp4", "deepseek", "bf16", "nvfp4-dense", "compressed-tensors")
    patterns = ((0, 0, 4, 128, 4), (128, 4, 0), (4, 4, 128), (0, 128, 4, 0))
    runs = ((LENGTH, CHUNKS), (33, (32, 1)), (150, (64, 64, 1)), (268, (268,)), (7, (1,)))
    for number in range(count):
        length, chunks = runs[number % 5]
        yield CleanCase(
            layouts[(number + number // 5) % 5],
            patterns[number % 4],
            length,
            chunks,
            ("float32", "bfloat16")[number // 2 % 2],
            "honest" if number % 3 == 2 else "kernel",
            100 + number,
        )


def run_clean(count: int, progress: Progress) -> list[dict[str, Any]]:
    """Check `count` clean checkpoints: each with the alarms there were, which should be none."""
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="dsv4-clean-") as folder,
        registered_for_a_while(),
    ):
        for spec in OPS.values():
            implementation(op=spec.name, name="honest")(spec.reference)
        for number, case in enumerate(clean_cases(count)):
            progress(f"{case.name}{_left(started, number, count)}", number, count)
            rows.append(_check_clean(Path(folder) / str(number), case))
    progress("clean checkpoints", count, count)
    return rows


def _check_clean(folder: Path, case: CleanCase) -> dict[str, Any]:
    config = replace(
        SMALL,
        num_hidden_layers=len(case.ratios),
        compress_ratios=case.ratios,
        num_hash_layers=case.seed % 3,
    )
    started = time.perf_counter()
    write_checkpoint(folder, config, case.layout, case.seed)
    model = Transformer(Checkpoint(folder), getattr(torch, case.dtype))
    tokens = prompt(case.length, config.vocab_size, case.seed)
    report = Checker(model, parse_route([case.route])).run(
        tokens, case.chunks, lambda *progress: None
    )
    return {
        "case": case.name,
        **asdict(case),
        "alarms": [finding.sentence for finding in report.findings],
        "sites": len(report.sites),
        "seconds": time.perf_counter() - started,
    }
