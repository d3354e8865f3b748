"""`check --bundle`: a bundle of the op behind the first finding, as it ran in the route's own run"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsv4_bench.engine.errors import CannotAnswer
from dsv4_bench.engine.model import Transformer
from dsv4_bench.probes import nvtx
from dsv4_bench.probes.bundle import examine
from dsv4_bench.probes.capture import Capture, Captured
from dsv4_bench.workbench.bundles.bundling import RunFacts, write_bundle
from dsv4_bench.workbench.checking.baseline import Baseline, Scenario
from dsv4_bench.workbench.checking.calibration import tapped
from dsv4_bench.workbench.checking.findings import CheckReport
from dsv4_bench.workbench.loading import Loaded


def write_finding(
    target: Path, loaded: Loaded, report: CheckReport, baseline: Baseline
) -> dict[str, Any]:
    """Run up to the forward pass of the first finding again, and write its op to `target`.

    Returns path, bytes and site. Raises CannotAnswer if the op raises there: then there is no output
    to keep. Raises DSV4Error if the bundle cannot be written.
    """
    first = report.first
    assert first is not None and report.limits is not None
    before = 0  # forward passes of earlier scenarios
    for scenario in baseline.scenarios:
        passes = len(scenario.steps())
        if first.forward < before + passes:
            break
        before += passes
    number = first.forward - before
    captured = _captured(loaded.model, scenario, first.site, number)
    call = examine(captured, first.forward, report.limits)
    tokens = list(scenario.sequences[0])
    chunks = [len(pieces[0]) for pieces in scenario.steps()]
    facts = RunFacts(tokens, chunks, loaded.layout, selected=1)
    written = write_bundle(target, loaded.model, facts, [call], [], report.limits)
    return {"path": str(written.path), "bytes": written.bytes, "site": first.site}


@torch.inference_mode()
def _captured(model: Transformer, scenario: Scenario, path: str, number: int) -> Captured:
    """The call of site `path` in forward pass `number` of a scenario, on the model's route."""
    cache = model.new_cache(len(scenario.sequences))
    capture = Capture(lambda site: site.path == path)
    for tokens in scenario.steps()[: number + 1]:
        capture.calls.clear()
        step = nvtx.begin(cache.step(tokens))
        try:
            with tapped(model, capture):
                model.forward(step, cache)
        except Exception as error:  # of somebody's kernel: it may raise anything
            raise CannotAnswer(
                f"no bundle: the route raises {type(error).__name__}: {error}",
                "`dsv4-bench dump` keeps the ops before it",
            ) from error
    if not capture.calls:
        raise CannotAnswer(f"no bundle: {path} does not run again", "the finding may not repeat")
    return capture.calls[0]
