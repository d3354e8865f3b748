"""The parts that compute-sanitizer runs apart: by name, the cases and the CUDA sources that they cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import sanitize_cuda
import sanitize_cuda_attention
import sanitize_cuda_dsl
import sanitize_cuda_experts
import sanitize_cuda_probes
import sanitize_cuda_selection


class Part(NamedTuple):
    run: Callable[[], None]
    sources: tuple[str, ...]  # csrc/cuda/<source>_sm90.cu


# The slowest first: they start first.
PARTS = {
    name: Part(run, sources)
    for module in (
        sanitize_cuda_attention,
        sanitize_cuda_experts,
        sanitize_cuda_selection,
        sanitize_cuda,
        sanitize_cuda_probes,
        sanitize_cuda_dsl,
    )
    for name, (run, sources) in module.PARTS.items()
}
