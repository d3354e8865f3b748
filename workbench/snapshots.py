"""Layer snapshots: in memory to step back, on disk so that a dead worker loses nothing.

On disk, in the session's folder, per layer that ran: its cache after it ran; and once, the input of
the layer that is running. Together they are the engine's state at the start of that layer, in the
middle of a forward pass: layers before it have this pass's cache, the others the last one's.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_bench.engine.cache import Cache


@dataclass(frozen=True)
class LayerSnapshot:
    """The residual streams x [n, hc, d] before a layer, and the layer's cache at that moment."""

    x: Tensor
    cache: dict[str, Tensor]


@dataclass(frozen=True)
class Resume:
    """Where a new worker goes on: layer `layer` of the forward pass over tokens [start, stop)."""

    layer: int
    forward: int
    span: tuple[int, int]
    tokens: list[int]
    x: Tensor


class SnapshotStore:
    """Writes snapshots to `folder`; every file appears whole or not at all.

    After a failed write (a full disk) it stays silent for the rest of the session and `error` says
    why: a debugger must not stop because it cannot save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: str | None = None

    def save_layer_input(
        self, layer: int, forward: int, span: tuple[int, int], tokens: list[int], x: Tensor
    ) -> None:
        position = {"layer": layer, "forward": forward, "span": list(span), "tokens": tokens}
        self._save("position", {"x": x}, {"position": json.dumps(position)})

    def save_layer_cache(self, layer: int, tensors: dict[str, Tensor]) -> None:
        self._save(f"L{layer}", tensors, {})

    def append_readings(self, rows: list[dict[str, Any]]) -> None:
        """Add readings to readings.jsonl, one JSON object a line."""
        if self.error is None and rows:
            try:
                with (self.folder / "readings.jsonl").open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as error:
                self.error = str(error)

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if self.error is not None:
            return
        scratch = self.folder / f"{name}.part"
        try:
            # Clones: safetensors refuses tensors that share storage.
            data = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
            save_file(data, scratch, metadata)
            os.replace(scratch, self.folder / f"{name}.safetensors")
        except Exception as error:  # safetensors raises its own class for a full disk
            self.error = f"{type(error).__name__}: {error}"
            scratch.unlink(missing_ok=True)

    def load(self, cache: Cache) -> Resume | None:
        """Restore `cache` from the folder; None if no layer had started yet."""
        from safetensors import safe_open

        path = self.folder / "position.safetensors"
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            position = json.loads(file.metadata()["position"])
            x = file.get_tensor("x")
        span = (int(position["span"][0]), int(position["span"][1]))
        for index, layer in enumerate(cache.layers):
            saved = self.folder / f"L{index}.safetensors"
            if saved.exists():
                layer.restore(load_file(saved))
            layer.reserve(span[1])
        cache.lengths = [span[0]]
        return Resume(
            position["layer"], position["forward"], span, position["tokens"], x.to(cache.device)
        )

    def load_readings(self) -> list[dict[str, Any]]:
        """The readings written so far; a torn last line is dropped."""
        rows = []
        try:
            for line in (self.folder / "readings.jsonl").read_text().splitlines():
                rows.append(json.loads(line))
        except (OSError, json.JSONDecodeError):
            pass
        return rows


def take(x: Tensor, cache: Cache, layer: int) -> LayerSnapshot:
    """A snapshot before `layer`; x is never written in place, so it is held, not copied."""
    return LayerSnapshot(x, cache.layers[layer].snapshot())
