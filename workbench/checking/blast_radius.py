"""What a fault does to what the demo model says: loss, recall by distance, first wrong token

Texts of the demo's language, never seen in training, are read by teacher forcing: a prefill, a
chunk, then decode steps, so that every mode of a kernel counts. The fault is on in every layer, the
other sites run on kernels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dsv4_bench.engine.cpu  # noqa: F401  (registers the CPU kernels)
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo import SHIPPED
from dsv4_bench.engine.demo_model import tasks
from dsv4_bench.engine.demo_model.evaluate import band, count
from dsv4_bench.engine.errors import DSV4Error
from dsv4_bench.engine.generate import teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route
from dsv4_bench.probes.faults.base import Fault, computed_by, forget

Progress = Callable[[str, int, int], None]
# Seeds with many questions: the first within the window, the second at every distance beyond.
TEXTS = (("blast/0", 600), ("blast/48", 1400))
DECODED = 24  # last tokens of each text, fed one at a time
_RECALLED = (tasks.RECALL, tasks.QUESTION)


@dataclass
class Reading:
    """Texts read once: target ids, and the predicted id at each place (-1: logits not finite)."""

    loss: float
    targets: list[Tensor]
    predicted: list[Tensor]


@torch.inference_mode()
def read(model: Transformer, texts: list[tasks.Document]) -> Reading:
    """Feed each text by itself, teacher-forced: a prefill, a chunk as long, DECODED single tokens."""
    logits = []
    for text in texts:
        ids = text.ids[:-1]
        half = (len(ids) - DECODED) // 2
        logits.append(teacher_forced_logits(model, ids, (half, len(ids) - DECODED - half, 1)))
    targets = [torch.tensor(text.ids[1:]) for text in texts]
    predicted = [torch.where(torch.isfinite(x).all(-1), x.argmax(-1), -1) for x in logits]
    loss = float(F.cross_entropy(torch.cat(logits), torch.cat(targets)))
    return Reading(loss, targets, predicted)


def metrics(reading: Reading, healthy: Reading, texts: list[tasks.Document]) -> dict[str, Any]:
    """Loss, [right, asked] by band and for copying, and the first place the healthy engine got right.

    `first_wrong_token` counts tokens of the text from 1; None if nothing went wrong.
    """
    tally = {name: [0, 0] for name in (*tasks.BAND_NAMES, "copy")}
    changed = total = 0
    first: int | None = None
    for text, target, mine, theirs in zip(
        texts, reading.targets, reading.predicted, healthy.predicted, strict=True
    ):
        right = mine == target
        for hit, kind, distance in zip(
            right.tolist(), text.kinds[1:], text.distances[1:], strict=True
        ):
            if kind in _RECALLED:
                count(tally, band(distance), hit)
            elif kind == tasks.COPY:
                count(tally, "copy", hit)
        kinds = torch.tensor(text.kinds[1:])
        wrong = (theirs == target) & ~right & (kinds != tasks.RANDOM)
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0]) + 1
            first = place if first is None else min(first, place)
        changed += int((mine != theirs).sum())
        total += len(target)
    return {
        "loss": reading.loss,
        "tally": tally,
        "first_wrong_token": first,
        "changed": changed / total,
    }


# ------------------------------------------------------------------------------ all faults


class BlastRadius:
    """Measures faults on the demo checkpoint and keeps the results in `file`, one after the other."""

    def __init__(self, file: Path, texts: tuple[tuple[str, int], ...] = TEXTS) -> None:
        self.file = file
        self.texts = [tasks.document(seed, length) for seed, length in texts]
        self.setup = {
            "texts": [list(t) for t in texts],
            "decoded": DECODED,
            "ids": hashlib.sha256(json.dumps([t.ids for t in self.texts]).encode()).hexdigest(),
            "checkpoint": hashlib.sha256(
                (SHIPPED / "model.safetensors.index.json").read_bytes()
            ).hexdigest(),
        }
        self.document: dict[str, Any] = {"setup": self.setup, "healthy": None, "faults": {}}
        if file.exists():
            self._load()

    def _load(self) -> None:
        try:
            document = json.loads(self.file.read_text())
            same = document["setup"] == self.setup and isinstance(document["faults"], dict)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DSV4Error(f"{self.file}: {error}", "remove it to start over") from None
        if not same:
            raise DSV4Error(
                f"{self.file} was measured on other texts or another checkpoint",
                "remove it to start over",
            )
        self.document = document

    def save(self) -> None:
        """Write the results beside `file` and rename, so that there is always a whole one."""
        scratch = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        scratch.write_text(json.dumps(self.document, indent=1) + "\n")
        scratch.replace(self.file)

    def run(self, faults: list[Fault], progress: Progress) -> dict[str, Any]:
        """Measure those of `faults` that `file` does not have yet; the whole document."""
        todo = [f for f in faults if f.name not in self.document["faults"]]
        if not todo:
            return self.document
        model = Transformer(Checkpoint(SHIPPED))
        progress("without a fault", 0, len(todo) + 1)
        healthy, found = self._measure(model, [], None)
        self.document["healthy"] = found
        for number, fault in enumerate(todo):
            progress(fault.name, number + 1, len(todo) + 1)
            self.document["faults"][fault.name] = self._one(model, fault, healthy)
            self.save()
        progress("blast radius", 1, 1)
        return self.document

    def _one(self, model: Transformer, fault: Fault, healthy: Reading) -> dict[str, Any]:
        started = time.monotonic()
        forget()
        about = {"family": fault.family, "doc": fault.doc, "knockout": fault.knockout}
        about["route"] = fault.everywhere
        try:
            _, found = self._measure(model, fault.everywhere, healthy)
        except Exception as error:
            found = {"crashed": f"{type(error).__name__}: {error}"}
        finally:
            forget()
        return {**about, **found, "seconds": round(time.monotonic() - started, 1)}

    def _measure(
        self, model: Transformer, route: list[str], healthy: Reading | None
    ) -> tuple[Reading, dict[str, Any]]:
        model.set_route(parse_route(["kernel", *route]))
        with computed_by("cpu"):
            reading = read(model, self.texts)
        return reading, metrics(reading, healthy or reading, self.texts)


def percent(tally: list[int]) -> str:
    """[right, asked] as a share, or a dash."""
    return f"{100 * tally[0] / tally[1]:.0f}" if tally[1] else "-"


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table: name, loss, recall by band in %, copying in %, first wrong token."""
    if "crashed" in found:
        return (name, f"crashes: {found['crashed'][:60]}", *[""] * (len(tasks.BAND_NAMES) + 2))
    loss = f"{found['loss']:.3f}" if math.isfinite(found["loss"]) else "nan"
    shares = [percent(found["tally"][band]) for band in (*tasks.BAND_NAMES, "copy")]
    first = found["first_wrong_token"]
    return (name, loss, *shares, "none" if first is None else str(first))


HEADER = (
    "fault",
    "loss",
    *(f"recall {band} %" for band in tasks.BAND_NAMES),
    "copy %",
    "first wrong",
)
