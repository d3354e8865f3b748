"""Runs each cutedsl kernel of linear and grouped_linear once, for compute-sanitizer.

Ragged tiles in every direction; the sanitizer, not this file, says whether all went well.
"""

from __future__ import annotations

import torch
from sanitize_cuda import weights

import dsv4_bench.engine.dsl.linear  # noqa: F401  (registers the kernels)
from dsv4_bench.engine.registry import IMPLEMENTATIONS

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def main() -> None:
    linear = IMPLEMENTATIONS["linear"]["cutedsl"].function
    grouped = IMPLEMENTATIONS["grouped_linear"]["cutedsl"].function
    for n, k, m in ((264, 192, 257), (8, 64, 1)):
        x = torch.randn(m, k).to(CUDA, BF16)
        taken = [w for w in weights(n, k) if w.name in "abce"]
        for weight in taken:
            for dtype in (BF16, torch.float32):
                linear(x, weight=weight, out_dtype=dtype)
                torch.cuda.synchronize()
    for weight in weights(512, 128):
        if weight.name in "abce":
            grouped(torch.randn(130, 256).to(CUDA, BF16), weight=weight, groups=2)
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
