"""Layer snapshots: in memory to step back, on disk so that a dead worker loses nothing.

On disk, in the session's folder: the caches of the layers that ran, one file each time a layer has
run, and `position.safetensors`, the input of the layer that runs now with the names of the cache
files that belong to it. Replacing that one file moves the position, so that the folder is the state
at the start of some layer whenever the worker dies: layers before it have this pass's cache, the
others the last one's. The head counts as one more layer, without a cache.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_bench.engine.cache import Cache
from dsv4_bench.probes.readings import Reading

_POSITION, _READINGS = "position.safetensors", "readings.jsonl"


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
        self._files: dict[int, str] = {}  # layer -> the file with its cache as it is now
        self._stale: set[str] = set()  # replaced, but the saved position still needs them
        self._serial = 0

    def save_position(
        self, layer: int, forward: int, span: tuple[int, int], tokens: list[int], x: Tensor
    ) -> None:
        """From now on a new worker would go on at `layer`, with the caches saved so far."""
        position = {
            "layer": layer,
            "forward": forward,
            "span": list(span),
            "tokens": tokens,
            "files": self._files,
        }
        if self._save(_POSITION, {"x": x}, {"position": json.dumps(position)}):
            for name in self._stale:
                (self.folder / name).unlink(missing_ok=True)
            self._stale.clear()

    def save_layer_cache(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """The cache of `layer` as it is now; takes effect with the next position."""
        self._serial += 1
        name = f"L{layer}-{self._serial}.safetensors"
        if self._save(name, tensors, {}):
            self._stale.update({self._files[layer]} if layer in self._files else ())
            self._files[layer] = name

    def append_readings(self, readings: list[Reading]) -> None:
        """Add readings to readings.jsonl: one line a call, an array of arrays in `Reading`'s order."""
        if self.error is None and readings:
            try:
                with (self.folder / _READINGS).open("a") as file:
                    file.write(json.dumps(readings) + "\n")
            except OSError as error:
                self.error = str(error)

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bool:
        if self.error is not None:
            return False
        scratch = self.folder / f"{name}.part"
        try:
            # A layer's tensors may share storage, which safetensors refuses.
            data = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
            if len({t.untyped_storage().data_ptr() for t in data.values()}) < len(data):
                data = {k: t.clone() for k, t in data.items()}
            save_file(data, scratch, metadata)
            os.replace(scratch, self.folder / name)
            return True
        except Exception as error:  # safetensors raises its own class for a full disk
            self.error = f"{type(error).__name__}: {error}"
            try:
                scratch.unlink(missing_ok=True)
            except OSError:
                pass
            return False

    def clear(self) -> None:
        """Forget the position and the readings: the session starts over."""
        for name in [_POSITION, _READINGS, *self._files.values(), *self._stale]:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError:
                pass
        self._files, self._stale = {}, set()

    def load(self, cache: Cache) -> Resume | None:
        """Restore `cache` from the folder; None if no layer had started yet."""
        path = self.folder / _POSITION
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            position = json.loads(file.metadata()["position"])
            x = file.get_tensor("x")
        span = (int(position["span"][0]), int(position["span"][1]))
        self._files = {int(layer): name for layer, name in position["files"].items()}
        present = {p.name for p in self.folder.glob("L*.safetensors")}
        self._serial = max((_serial(name) for name in present), default=0)
        self._stale = present - set(self._files.values())
        for layer, name in self._files.items():
            cache.layers[layer].restore(load_file(self.folder / name))
        for layer_cache in cache.layers:
            layer_cache.reserve(span[1])
        cache.lengths = [span[0]]
        return Resume(
            position["layer"], position["forward"], span, position["tokens"], x.to(cache.device)
        )

    def load_readings(self) -> list[Reading]:
        """The readings written so far; a torn line is dropped."""
        readings = []
        try:
            for line in (self.folder / _READINGS).read_text(errors="replace").splitlines():
                try:
                    readings += [Reading(*row) for row in json.loads(line)]
                except (ValueError, TypeError):
                    continue
        except OSError:
            pass
        return readings


def _serial(name: str) -> int:
    return int(name.removesuffix(".safetensors").rpartition("-")[2])


def take(x: Tensor, cache: Cache, layer: int) -> LayerSnapshot:
    """A snapshot before `layer`; x is never written in place, so it is held, not copied."""
    layers = cache.layers
    return LayerSnapshot(x, layers[layer].snapshot() if layer < len(layers) else {})
