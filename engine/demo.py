"""Which checkpoint a command means, and where we keep what we make.

The demo checkpoint is a small trained model that ships with the package; `engine/demo_model` says
what it can do and how it was made.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dsv4_bench.engine.errors import BadCheckpoint

SHIPPED = Path(__file__).with_name("demo_model") / "checkpoint"
_INDEX = "model.safetensors.index.json"


def cache_folder() -> Path:
    """$DSV4_CACHE, else the user's cache folder. It need not exist."""
    chosen = os.environ.get("DSV4_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("dsv4-bench"))


def resolve_checkpoint(argument: str | None) -> Path:
    """The folder a command works on: `argument`, else $DSV4_CKPT, else the demo.

    The demo also goes by the name "demo", unless a folder has it. Raises BadCheckpoint if the
    folder that was named is not there.
    """
    named = argument or os.environ.get("DSV4_CKPT")
    if not named or (named == "demo" and not Path(named).exists()):
        return demo_checkpoint()
    folder = Path(named).expanduser()
    if not folder.is_dir():
        source = "" if argument else " (from $DSV4_CKPT)"
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        hint = "CKPT is a folder with config.json and *.safetensors"
        raise BadCheckpoint(f"checkpoint {folder}{source} {problem}", hint)
    return folder


def demo_checkpoint() -> Path:
    """The demo checkpoint: 16 layers, NVFP4 experts, FP8 dense, 31 MB.

    Raises BadCheckpoint if files were taken out of it.
    """
    missing = _missing_files(SHIPPED)
    if missing:
        raise BadCheckpoint(
            f"the demo checkpoint {SHIPPED} lacks {', '.join(missing)}",
            "install the package again, or name a checkpoint (CKPT or $DSV4_CKPT)",
        )
    return SHIPPED


def _missing_files(folder: Path) -> list[str]:
    try:
        shards = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError):
        return [_INDEX]
    return [name for name in sorted({"config.json", *shards}) if not (folder / name).is_file()]
