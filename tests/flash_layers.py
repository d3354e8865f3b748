"""A checkpoint of few layers of V4-Flash's sizes: `flash_layers.py OUT [SWA|CSA|HCA ...]`, else one of each

Everything that a decode step reads has its real size; what it does not read is cut: 16 experts of
256 (6 are chosen for a token) and a vocabulary of 4096. Tensors whose names differ in numbers only hold
the same random values, which saves a minute.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dsv4_bench.engine import synthetic
from dsv4_bench.engine.config import CSA_RATIO, FLASH, HCA_RATIO, Config
from dsv4_bench.engine.names import Expected

RATIOS = {"SWA": 0, "CSA": CSA_RATIO, "HCA": HCA_RATIO}
CONFIG = replace(FLASH, num_hash_layers=0, n_routed_experts=16, vocab_size=4096)
_MADE: dict[tuple[str, tuple[int, ...]], dict[str, Tensor]] = {}


def stored(item: Expected, config: Config, layout: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """As synthetic._stored, with the values of the first tensor that is called like this."""
    key = re.sub(r"\d+", "#", item.name), tuple(item.shape)
    if key not in _MADE:
        value = synthetic.make_tensor(config, item, seed)
        named = synthetic.encode(item, value, layout)
        _MADE[key] = {name.removeprefix(item.name): t for name, t in named.items()}
    for suffix, tensor in _MADE[key].items():
        yield item.name + suffix, tensor.clone()


if __name__ == "__main__":
    started = time.perf_counter()
    synthetic._stored = stored
    ratios = tuple(RATIOS[kind] for kind in sys.argv[2:] or RATIOS)
    config = replace(CONFIG, num_hidden_layers=len(ratios), compress_ratios=ratios)
    synthetic.write_checkpoint(Path(sys.argv[1]), config, "nvfp4")
    print(f"{sys.argv[1]}: {time.perf_counter() - started:.0f} s")
