"""A checkpoint of three layers of V4-Flash's sizes, one of each kind of attention: `flash_layers.py OUT`

Everything that a decode step reads has its real size; what it does not read is cut: 8 experts of
256 (6 are chosen for a token) and a vocabulary of 4096.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from dsv4_bench.engine.config import CSA_RATIO, FLASH, HCA_RATIO
from dsv4_bench.engine.synthetic import write_checkpoint

CONFIG = replace(
    FLASH,
    num_hidden_layers=3,
    compress_ratios=(0, CSA_RATIO, HCA_RATIO),
    num_hash_layers=1,
    n_routed_experts=8,
    vocab_size=4096,
)

if __name__ == "__main__":
    started = time.perf_counter()
    write_checkpoint(Path(sys.argv[1]), CONFIG, "nvfp4")
    print(f"{sys.argv[1]}: {time.perf_counter() - started:.0f} s")
