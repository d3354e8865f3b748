"""Opening a checkpoint for a command: device, dtype, plugins, route, tokenizer, prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dsv4_bench.engine.census import layout_words
from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo import resolve_checkpoint
from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import RouteEntry, parse_route
from dsv4_bench.engine.streaming import Progress, open_model, parse_size
from dsv4_bench.engine.tokens import check_token_ids
from dsv4_bench.probes import nvtx

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_PROMPT = (
    "A residual stream carries what every layer adds. Attention reads the last tokens from a "
    "window and older ones from compressed entries; experts do the rest. If one kernel is wrong, "
    "this is where you see it."
)


@dataclass
class Loaded:
    """An open model with what belongs to it."""

    model: Transformer
    tokenizer: Any = None
    layout: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.model.checkpoint.folder


def load_plugins(files: list[str]) -> None:
    """Import users' files. Raises DSV4Error with the exception when one fails."""
    for number, file in enumerate(files):
        path = Path(file)
        if not path.is_file():
            raise DSV4Error(f"no such plugin file: {file}", "--plugin takes a Python file")
        if path.suffix != ".py":
            raise DSV4Error(f"plugin {file} is not a Python file", "its name must end in .py")
        module = ModuleType(f"dsv4_plugin_{number}_{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # dataclasses look their module up there
        try:
            with redirect_stdout(sys.stderr):  # stdout is for data
                # Not through the import system: its bytecode cache goes by time stamps, so a file
                # saved twice within a second could run as it was before.
                exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        except DSV4Error as error:
            raise DSV4Error(f"plugin {file}: {error.message}", error.hint) from error
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            raise DSV4Error(
                f"plugin {file}: {type(error).__name__}: {text}", "-v shows the traceback"
            ) from error


def read_route(texts: Iterable[str]) -> list[RouteEntry]:
    """`parse_route`, where `*/core=fault/sink_missing` names a fault: that loads the catalogue."""
    texts = list(texts)
    if any("fault/" in text for text in texts):
        import dsv4_bench.probes.faults.catalogue  # noqa: F401  (registers the faults)
    return parse_route(texts)


def pick_device(name: str | None) -> torch.device:
    """`name`, or CUDA if there is one. Raises CannotAnswer for a device this machine lacks."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise CannotAnswer(
            "--device cuda: torch sees no CUDA device", "`dsv4-bench doctor` says more"
        )
    if name not in ("cpu", "cuda"):
        raise DSV4Error(f"unknown device {name!r}", "cpu or cuda")
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """`name`, or float32 on the CPU and bfloat16 on CUDA."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise DSV4Error(f"unknown dtype {name!r}", f"known: {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(options: dict[str, Any], progress: Progress | None = None) -> Loaded:
    """Open `options["checkpoint"]` (None: the default) and set the route.

    Uses checkpoint, plugins, device, dtype and route; raises DSV4Error, changing nothing on disk.
    With `gpu_memory` (a size, or None for the default), a GPU gets as many layers as fit, the others
    are streamed, and `progress` is told of layers read; without it weights are read when used. `kv`
    says how the cache holds keys.
    """
    import dsv4_bench.engine.implementations  # noqa: F401  (registers them)

    load_plugins(list(options.get("plugins") or []))
    device = pick_device(options.get("device"))
    dtype = pick_dtype(options.get("dtype"), device)
    route = read_route(options.get("route") or ["kernel"])
    checkpoint = Checkpoint(resolve_checkpoint(options.get("checkpoint")))
    checkpoint.require_complete()
    nvtx.annotate()
    model, notes = _open_model(checkpoint, dtype, device, options, progress)
    model.set_route(route)
    loaded = Loaded(model, load_tokenizer(checkpoint.folder), layout_words(checkpoint))
    fallbacks = sorted({f"{s.op}: {s.stamp.note}" for s in model.sites.values() if s.stamp.note})
    loaded.notes = [*notes, *(f"reference instead of a kernel for {text}" for text in fallbacks)]
    return loaded


def _open_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
    progress: Progress | None,
) -> tuple[Transformer, list[str]]:
    """The model where the options want it, and notes about that."""
    kv, size = options.get("kv", "dtype"), options.get("gpu_memory")
    budget = None if size is None else parse_size(size)
    if device.type == "cuda" and "gpu_memory" in options:
        return open_model(checkpoint, dtype, device, kv, budget, progress)
    if budget is not None:
        raise DSV4Error(
            f"--gpu-memory {size}, but the model runs on the CPU",
            "there, weights are mapped from the checkpoint and take no memory of their own",
        )
    return Transformer(checkpoint, dtype, device, kv), []


def load_tokenizer(folder: Path) -> Any:
    """tokenizer.json of the checkpoint, or None. Raises DSV4Error if it cannot be read."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DSV4Error(f"{path}: {error}", "without tokenizer.json, --tokens FILE works") from None


def default_prompt(folder: Path) -> str:
    """prompt.txt of the checkpoint, if it has one it was trained for; else a few sentences."""
    try:
        return (folder / "prompt.txt").read_text().strip() or DEFAULT_PROMPT
    except (OSError, UnicodeDecodeError):
        return DEFAULT_PROMPT


def prompt_tokens(loaded: Loaded, prompt: str | None, tokens: list[int] | None) -> list[int]:
    """Ids to feed: `tokens`, or `prompt` encoded with begin-of-sentence, or a default prompt."""
    config = loaded.model.config
    if tokens is not None:
        if not tokens:
            raise DSV4Error("the prompt is empty", "give at least one token")
        check_token_ids(tokens, config.vocab_size)
        return list(tokens)
    if prompt is not None and not prompt:
        raise DSV4Error("the prompt is empty", "give at least one character")
    if loaded.tokenizer is None:
        if prompt is not None:
            raise DSV4Error(f"no tokenizer.json in {loaded.folder}", "give ids with --tokens FILE")
        return [(7 * i + 3) % config.vocab_size for i in range(160)]
    text = prompt or default_prompt(loaded.folder)
    ids = list(loaded.tokenizer.encode(text, add_special_tokens=False).ids)
    if not ids or ids[0] != config.bos_token_id:
        ids.insert(0, config.bos_token_id)
    check_token_ids(ids, config.vocab_size)
    return ids
