"""Which checkpoint a command means, and the demo checkpoint for machines that have none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from dsv4_bench.engine.config import TINY
from dsv4_bench.engine.errors import BadCheckpoint, CannotAnswer, DSV4Error

_LAYOUT, _SEED = "nvfp4", 0
# What the demo's bytes depend on: these sources and the tiny preset.
_GENERATOR = ("synthetic.py", "formats.py", "names.py")
_ELSEWHERE = "set DSV4_CACHE to a writable folder, or name a checkpoint (CKPT or $DSV4_CKPT)"


def cache_folder() -> Path:
    """$DSV4_CACHE, else the user's cache folder. It need not exist."""
    chosen = os.environ.get("DSV4_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("dsv4-bench"))


def resolve_checkpoint(
    argument: str | None, progress: Callable[[str, int, int], None] | None = None
) -> Path:
    """The folder a command works on: `argument`, else $DSV4_CKPT, else the demo, made if needed.

    Raises BadCheckpoint if the folder that was named is not there, CannotAnswer if the demo cannot
    be made.
    """
    named = argument or os.environ.get("DSV4_CKPT")
    if not named:
        return demo_checkpoint(progress)
    folder = Path(named).expanduser()
    if not folder.is_dir():
        source = "" if argument else " (from $DSV4_CKPT)"
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        hint = "CKPT is a folder with config.json and *.safetensors"
        raise BadCheckpoint(f"checkpoint {folder}{source} {problem}", hint)
    return folder


def demo_checkpoint(progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The tiny synthetic NVFP4 checkpoint (16 layers, 41 MB) in the cache folder.

    Made once, in about two seconds; `progress` gets (what, done, total). The folder's name holds a
    hash of the code that generates it, so an old demo is never mistaken for a new one. Safe when
    several processes make it at once: each writes beside it and the first to finish is kept.
    Raises CannotAnswer if the cache cannot be written, BadCheckpoint if files were taken out.
    """
    folder = cache_folder() / f"demo-{_generator_hash()}"
    if not folder.exists():
        _make(folder, progress)
    missing = _missing_files(folder)
    if missing:
        raise BadCheckpoint(
            f"the demo checkpoint {folder} lacks {', '.join(missing)}",
            "delete the folder; it is made again",
        )
    return folder


def _make(folder: Path, progress: Callable[[str, int, int], None] | None) -> None:
    from dsv4_bench.engine.synthetic import write_checkpoint  # imports torch

    try:
        write_checkpoint(folder, TINY, _LAYOUT, _SEED, progress)
    except DSV4Error as error:
        if not folder.exists():  # otherwise another process has just made it
            raise CannotAnswer(
                f"cannot make the demo checkpoint: {error.message}", _ELSEWHERE
            ) from None


def _generator_hash() -> str:
    digest = hashlib.sha256(f"{_LAYOUT}/{_SEED}".encode())
    digest.update(json.dumps(TINY.to_json(), sort_keys=True).encode())
    for name in _GENERATOR:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def _missing_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError):
        return [index.name]
    return [name for name in sorted({"config.json", *shards}) if not (folder / name).is_file()]
