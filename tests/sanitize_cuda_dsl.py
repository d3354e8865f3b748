"""Cases for compute-sanitizer: the cutedsl kernels of linear and grouped_linear, ragged tiles. See sanitize.py."""

from __future__ import annotations

from sanitize_cuda import BF16, F32, randn, weight

import dsv4_bench.engine.dsl.linear  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.registry import IMPLEMENTATIONS


def tall() -> None:
    linear = IMPLEMENTATIONS["linear"]["cutedsl"].function
    grouped = IMPLEMENTATIONS["grouped_linear"]["cutedsl"].function
    for kind in ("nvfp4", "mxfp4", "fp8_e8m0", "bf16"):
        for n, k, m in ((264, 192, 257), (8, 64, 1)):
            w, x = weight(kind, n, k), randn(m, k, dtype=BF16)
            for dtype in (BF16, F32):
                linear(x, weight=w, out_dtype=dtype)
        grouped(randn(130, 256, dtype=BF16), weight=weight(kind, 512, 128), groups=2)


PARTS = {"dsl": (tall, ())}
