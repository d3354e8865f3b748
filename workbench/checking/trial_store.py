"""Trials on disk: what a route did to the output, so that an interrupted search goes on

One folder for each run (checkpoint, tokens, implementations, symptom), named by the hash of all that,
with a line of JSON for every trial. A line that a kill cut off is ignored.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dsv4_bench.engine
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import Implementation
from dsv4_bench.engine.step import Step
from dsv4_bench.workbench.checking.calibration import Calibration
from dsv4_bench.workbench.checking.symptoms import Outcome

TRIALS, CALIBRATION = "trials.jsonl", "calibration.json"


def run_key(
    model: Transformer,
    chosen: Mapping[str, Implementation],
    steps: Sequence[Step],
    symptom: str,
) -> str:
    """Hex hash of everything that decides what trials of a run give.

    Files count by content, weights by size and time of change: they may be hundreds of gigabytes.
    """
    facts: list[Any] = [symptom, str(model.dtype), str(model.device), torch.__version__]
    facts += [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
    facts += [[step.tokens.tolist(), step.starts, step.lengths] for step in steps]
    facts += [[path, impl.name, impl.hash] for path, impl in chosen.items()]
    for path in sorted(model.checkpoint.folder.iterdir()):
        if path.suffix == ".safetensors":
            status = path.stat()
            facts.append([path.name, status.st_size, status.st_mtime_ns])
        elif path.name == "config.json":
            facts.append([path.name, path.read_text()])
    facts += [_hash_of(path) for path in _source_files(chosen.values())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _source_files(implementations: Iterable[Implementation]) -> list[Path]:
    """The engine's files, and those of implementations that come from elsewhere."""
    root = Path(dsv4_bench.engine.__path__[0])
    files = set(root.rglob("*.py"))
    for implementation in implementations:
        try:
            source = inspect.getsourcefile(implementation.function)
        except TypeError:  # a callable without source
            source = None
        if source:
            files.add(Path(source))
    return sorted(files)


def _hash_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


class TrialStore:
    """Outcomes of one run by set of sites, and its calibration. A folder that cannot be written, or
    none, leaves them in memory; `problem` says why."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.problem: OSError | None = None
        self._outcomes: dict[str, Outcome] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._load(folder / TRIALS)
        except OSError as error:
            self._give_up(error)

    def __len__(self) -> int:
        return len(self._outcomes)

    def _load(self, file: Path) -> None:
        if not file.exists():
            return
        text = file.read_text(errors="replace")
        for line in text.splitlines():
            try:
                data = json.loads(line)
                self._outcomes[str(data["set"])] = Outcome.from_dict(data)
            except (KeyError, TypeError, ValueError):
                continue  # cut off while it was written
        if text and not text.endswith("\n"):
            self._append("")  # so that the next line stands on its own

    def calibration(self) -> Calibration | None:
        """What `keep_calibration` kept, None if there is nothing that can be read."""
        if self.folder is None:
            return None
        try:
            return Calibration(**json.loads((self.folder / CALIBRATION).read_text()))
        except (OSError, TypeError, ValueError):
            return None

    def keep_calibration(self, limits: Calibration) -> None:
        if self.folder is not None:
            try:
                (self.folder / CALIBRATION).write_text(json.dumps(limits.to_dict()) + "\n")
            except OSError as error:
                self._give_up(error)

    def get(self, sites: Iterable[str]) -> Outcome | None:
        return self._outcomes.get(_set_key(sites))

    def put(self, sites: frozenset[str], outcome: Outcome) -> None:
        key = _set_key(sites)
        self._outcomes[key] = outcome
        self._append(json.dumps({"set": key, "sites": len(sites), **outcome.to_dict()}))

    def _append(self, line: str) -> None:
        if self.folder is not None:
            try:
                with (self.folder / TRIALS).open("a") as stream:
                    stream.write(line + "\n")
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A full disk must not end the search: from now on in memory."""
        self.problem, self.folder = error, None

    def clear(self) -> None:
        """Forget everything, on disk too."""
        self._outcomes.clear()
        if self.folder is not None:
            for name in (TRIALS, CALIBRATION):
                (self.folder / name).unlink(missing_ok=True)


def _set_key(sites: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(sites)).encode()).hexdigest()[:20]
