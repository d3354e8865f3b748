"""The quantisation microscope over a checkpoint: matrix by matrix, gate against up"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.errors import BadCheckpoint, DSV4Error, did_you_mean
from dsv4_bench.engine.microscope import BLOCKS, ROWS, Blocks, examine, gate_up, measured_noise

Progress = Callable[[str, int, int], None]

_EXPERT = re.compile(r"\.ffn\.experts\.(\d+)\.")
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass
class Pair:
    """Gate and up of one expert: w1 over w3, of the global and of the input scale."""

    expert: str
    global_ratio: float | None
    input_ratio: float | None


@dataclass
class BlockCensus:
    """What `inspect --microscope` says. `matched` quantised matrices fit the pattern; of them
    `matrices` were looked at. `measured`: relative noise against the original, as stored and with the
    best scales, by matrix, where an original was given. `problems` are matrices that cannot be read.
    """

    folder: str
    pattern: str
    matched: int
    matrices: list[Blocks]
    pairs: list[Pair]
    measured: dict[str, tuple[float, float]]
    experts: str | list[int]
    problems: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "matrices": [blocks.to_dict() for blocks in self.matrices],
            "pairs": [vars(pair) for pair in self.pairs],
        }

    def by_role(self) -> dict[str, list[Blocks]]:
        """The matrices by kind, such as ``layers.*.ffn.experts.*.w1``, in the order of the layers."""
        roles: dict[str, list[Blocks]] = {}
        for blocks in self.matrices:
            roles.setdefault(_NUMBER.sub(".*", blocks.name), []).append(blocks)
        return roles


def take_block_census(
    checkpoint: Checkpoint,
    pattern: str = "*",
    everything: bool = False,
    original: Checkpoint | None = None,
    progress: Progress | None = None,
) -> BlockCensus:
    """Examine the quantised matrices whose names match `pattern` (a glob).

    A pattern that names no expert looks at three experts a layer, and at `ROWS` rows and `BLOCKS`
    blocks of each matrix, unless `everything` is asked for. Raises DSV4Error if nothing matches, BadCheckpoint if `original`
    is of another shape.
    """
    started = time.perf_counter()
    quantised = [name for name, m in checkpoint.matrices.items() if m.format != "dense"]
    matched = [name for name in quantised if fnmatchcase(name, pattern)]
    if not matched:
        hint = did_you_mean(pattern, quantised) if quantised else "nothing in it is quantised"
        raise DSV4Error(f"no quantised matrix matches {pattern!r}", hint)
    count = checkpoint.config.n_routed_experts
    experts = {0, count // 2, count - 1}
    if everything or re.search(r"experts\.\d", pattern):
        experts = set(range(count))
    chosen = [n for n in matched if (m := _EXPERT.search(n)) is None or int(m[1]) in experts]
    census = BlockCensus(
        folder=str(checkpoint.folder),
        pattern=pattern,
        matched=len(matched),
        matrices=[],
        pairs=[],
        measured={},
        experts="all" if len(experts) == count else sorted(experts),
        problems=[],
        seconds=0.0,
    )
    for done, name in enumerate(chosen, 1):
        try:
            _look(census, checkpoint, original, name, everything)
        except BadCheckpoint as error:
            census.problems.append(error.message)
        if progress:
            progress("examining matrix", done, len(chosen))
    census.seconds = time.perf_counter() - started
    return census


def _look(
    census: BlockCensus,
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    name: str,
    everything: bool,
) -> None:
    """Examine one matrix; with a gate matrix its up matrix too."""
    weight = checkpoint.weight(name)
    rows = weight.shape[0] if everything else ROWS
    blocks = weight.scale.numel() if everything and weight.scale is not None else BLOCKS
    census.matrices.append(examine(weight, rows, blocks))
    if original is not None and weight.format != "fp8_block":
        truth = original.weight(name)
        if truth.shape != weight.shape:
            sizes = f"{list(truth.shape)} there, {list(weight.shape)} here"
            raise BadCheckpoint(f"{original.folder}: {name} is {sizes}", "it is another model")
        census.measured[name] = measured_noise(weight, truth, rows)
    up = f"{name[:-2]}w3"
    if name.endswith(".w1") and weight.format == "nvfp4" and up in checkpoint.matrices:
        census.pairs.append(Pair(name[:-3], **gate_up(weight, checkpoint.weight(up))))
